"""Averages of weights."""

import pytest
import torch

import rescom_timm
from rescom_timm.__main__ import main
from rescom_timm.api import train_recipe as train
from rescom_timm.engine import checkpoint
from rescom_timm.fitting.averaging import average_runs
from rescom_timm.fitting.soups import soup
from rescom_timm.io import read_json
from tests.raises import raises
from tests.recipes import UNDRAWN, load_recipe


def test_a_soup_is_the_weighted_mean():
    nets = [{"w": torch.tensor([float(i), 2.0]), "n": torch.tensor(i)} for i in range(3)]
    found = soup(nets, [0.5, 0.25, 0.25])
    assert found["w"].tolist() == [0.75, 2.0] and found["w"].dtype == torch.float32 and found["n"].item() == 2
    assert soup(nets[:1], [1.0])["w"].equal(nets[0]["w"])


@pytest.mark.parametrize("shares", [[0.5], [0.5, 0.6], [-0.5, 1.5]])
def test_shares_are_of_sum_one(shares):
    with pytest.raises(ValueError, match="shares"):
        soup([{"w": torch.ones(1)}] * 2, shares)


def test_nets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="classifier"):
        soup([{"classifier": torch.ones(2)}, {"classifier": torch.ones(3)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="other"):
        soup([{"w": torch.ones(2)}, {"w": torch.ones(2), "other": torch.ones(1)}], [0.5, 0.5])


WORDS = [
    "train.batch_size=182", "train.epochs=1", "schedule.warmup_epochs=0", "data.validation=holdout(0.2)",
    "net.projector.hidden=8", "net.projector.dim=8", "net.backbone=resnet8_cifar", UNDRAWN,
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    words = [[f"output={place}", *WORDS, f"seed={seed}"] for seed in (0, 1)]
    return [train(load_recipe("digits_lt +cross_entropy", one)) for one in words]


def weights(run):
    return checkpoint.newest(run / "checkpoints")[1]


@pytest.mark.slow
def test_a_soup_of_runs_is_a_run(runs, tmp_path):
    found = average_runs(runs, tmp_path / "soup", [0.25, 0.75], "last")
    own, (a, b) = weights(tmp_path / "soup"), map(weights, runs)
    for name in ("encoder.conv1.weight", "encoder.bn1.running_var", "classifier.bias"):
        torch.testing.assert_close(own[name], 0.25 * a[name] + 0.75 * b[name])
    assert found.shares == [0.25, 0.75] and found.temperature == 1
    run = rescom_timm.Run(tmp_path / "soup")
    assert run.recipe.train.epochs == 0 and run.recipe.method.name == "cross_entropy"
    assert run.evaluate(split="validation")["mean_class"] == pytest.approx(found.together)
    assert run.pretrained().class_names == [str(k) for k in range(10)]


def test_other_classifiers_and_widths_are_refused(runs, tmp_path):
    for word in ("net.classifier.kind=cosine", "net.backbone=resnet20_cifar"):
        other = train(load_recipe("digits_lt +cross_entropy", [f"output={tmp_path}", *WORDS, word]))
        with raises("fit.soup"):
            average_runs([runs[0], other], tmp_path / "soup", [0.5, 0.5], "last")


def test_a_greedy_soup_is_no_worse_than_its_best_run(runs, tmp_path, capsys):
    assert main(["soup", *map(str, runs), str(runs[0]), "-o", str(tmp_path / "soup")]) == 0
    out = capsys.readouterr().out
    record = read_json(tmp_path / "soup/evaluation/validation-last.json")["numbers"]
    alone = [read_json(run / "evaluation/validation-last.json")["numbers"]["mean_class"] for run in runs]
    assert record["mean_class"] >= max(alone) - 1e-6 and f"{record['mean_class']:.2f}" in out


def test_the_temperature_of_a_run(runs, tmp_path):
    found = average_runs(runs[:1], tmp_path / "run", temperature=True)
    before, after = weights(runs[0]), weights(tmp_path / "run")
    torch.testing.assert_close(after["classifier.weight"], before["classifier.weight"] / found.temperature)
    assert found.temperature != 1 and found.together == pytest.approx(found.alone[0])


def test_what_cannot_be_averaged(runs, tmp_path):
    with raises("fit.soup", "shares"):
        average_runs(runs, tmp_path / "soup", [0.5, 0.6])
    with raises("file.exists", "there"):
        (tmp_path / "there").mkdir()
        average_runs(runs, tmp_path / "there")
    with pytest.raises(SystemExit):
        main(["soup", str(runs[0]), "-o", str(tmp_path / "soup")])
