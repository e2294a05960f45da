"""Robustness: errors of an opened run on corrupted images, what is kept, and the figures over a baseline."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rescom_timm.analysis import robustness, style
from rescom_timm.analysis.opened_run import open_run
from rescom_timm.analysis.run_files import Missing, RunFolder
from rescom_timm.cli import robustness as command
from rescom_timm.data.corruptions import COMMON, prepared
from rescom_timm.engine import checkpoint
from tests.analysis.made_up import made_up_errors
from tests.analysis.test_opened_run import save_run
from tests.raises import raises


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "rescom")


@pytest.fixture(scope="module")
def digits_c(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images as a CIFAR-10-C: kind contrast is untouched, kind fog black."""
    root = tmp_path_factory.mktemp("prepared") / "digits-c"
    root.mkdir()
    run = open_run(folder)
    pixels = np.concatenate([batch["image"].permute(0, 2, 3, 1).numpy() for batch in run.loader(run.data.test)])
    np.save(root / "contrast.npy", np.concatenate([pixels] * 5))
    np.save(root / "fog.npy", np.zeros((5 * len(pixels), 8, 8, 3), np.uint8))
    np.save(root / "labels.npy", np.tile(run.data.test.labels, 5))
    return root


def test_errors_of_a_prepared_folder(folder: Path, digits_c: Path) -> None:
    run = open_run(folder)
    source = prepared(digits_c, run.data.class_names)
    steps: list[int] = []
    found = robustness.corrupted(
        run, run.data.test, source.kinds, source, limit=100, done=lambda one: steps.append(len(one.errors))
    )
    assert steps == [0, 1, 2] and found.setting.images == 100 and "digits-c" in found.setting.source
    assert found.errors["contrast"] == [found.clean["top1"]] * 5  # the same images give the same error
    assert len(set(found.errors["fog"])) == 1
    assert set(found.groups) == {"many", "medium", "few"}
    assert found.groups["few"]["contrast"][0] == found.clean["few"]
    assert found.curve()[0] == found.clean["top1"] and len(found.curve("few")) == 6


def test_what_is_known_is_not_measured_again(folder: Path, digits_c: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(folder)
    source = prepared(digits_c, run.data.class_names)
    half = robustness.corrupted(run, run.data.test, ["contrast"], source, limit=20)
    made_up = replace(half, errors={"contrast": [1.0] * 5})
    whole = robustness.corrupted(run, run.data.test, ["fog"], source, limit=20, known=made_up)
    assert whole.errors["contrast"] == [1.0] * 5 and "fog" in whole.errors
    assert list(robustness.of_kinds(whole, ["fog"]).errors) == ["fog"]
    other = robustness.corrupted(run, run.data.test, ["contrast"], source, limit=21, known=made_up)
    assert other.errors["contrast"] != [1.0] * 5  # other images
    retrained = replace(made_up, weights="other")
    again = robustness.corrupted(run, run.data.test, ["contrast"], source, limit=20, known=retrained)
    assert again.errors == half.errors
    with raises("data.corrupted"):
        robustness.corrupted(run, run.data.test, ["frost"], source)


def test_corruptions_made_here_are_the_same_again(folder: Path) -> None:
    pytest.importorskip("imagecorruptions", reason="needs the extra: pip install 'rescom-timm[robustness]'")
    run = open_run(folder)
    found = [robustness.corrupted(run, run.data.test, ["gaussian_noise"], limit=30, seed=seed) for seed in (0, 0, 1)]
    assert found[0].errors == found[1].errors and found[0].setting.seed == 0
    assert "imagecorruptions-imaug" in found[0].setting.source
    assert found[2].setting != found[0].setting


def test_summary_over_baselines() -> None:
    found = made_up_errors(kinds=COMMON)
    plain = robustness.summary(found)
    assert plain == {"kinds": 15, "clean_error": 20.0, "mean_error": pytest.approx(robustness.mean_error(found.errors))}
    over = robustness.summary(found, "alexnet")
    assert over["mCE"] == robustness.mean_corruption_error(found.errors)
    assert over["relative_mCE"] == robustness.relative_mean_corruption_error(found.errors, 20.0)
    itself = robustness.summary(found, replace(found, run="base"))
    assert itself["mCE"] == pytest.approx(100) and itself["relative_mCE"] == pytest.approx(100)
    assert itself["baseline"] == "base" and set(itself["corruption_errors"]) == set(COMMON)
    # The four other kinds count nowhere.
    more = replace(found, errors={**found.errors, "spatter": [99.0] * 5})
    assert robustness.summary(more, "alexnet") == over
    unharmed = replace(found, errors={kind: [20.0] * 5 for kind in COMMON})
    assert robustness.summary(found, unharmed)["relative_mCE"] is None


def test_baselines_that_do_not_fit() -> None:
    found = made_up_errors()
    with raises("plot.baseline", "brightness"):
        robustness.summary(found, "alexnet")
    with raises("plot.baseline"):
        robustness.summary(found, replace(found, setting=replace(found.setting, images=3)))
    with raises("plot.baseline", "alexnet"):
        robustness.summary(found, "alexnt")


def _kept(folder: Path, found: robustness.Robustness) -> RunFolder:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}")
    robustness.write(robustness.path_of(folder, "test", "last"), found, robustness.summary(found))
    return RunFolder(folder)


def test_results_are_read_compared_and_drawn(tmp_path: Path) -> None:
    one = _kept(tmp_path / "one", made_up_errors("one"))
    two = _kept(tmp_path / "two", made_up_errors("two", 5, kinds=("fog", "contrast", "snow")))
    path = robustness.path_of(one.path, "test", "last")
    assert robustness.read(path) == made_up_errors("one")
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "limits"})
    )
    assert robustness.read(path) == made_up_errors("one"), "as 0.2.0 wrote it, without limits"
    found = robustness.measure([one, two])
    assert [list(result.errors) for result in found] == [["fog", "contrast"]] * 2
    assert [result.run for result in found] == ["one", "two"]
    table = robustness.table(found)
    assert len(table["run"]) == 2 * (1 + 2 * 5) and table["severity"][0] == 0 and table["error_percent"][0] == 20
    for shown in (found, found[:1]):
        style.save(robustness.draw(shown), robustness.table(shown), tmp_path / "figure", dpi=40)
    other = made_up_errors("other")
    third = _kept(tmp_path / "other", replace(other, setting=replace(other.setting, images=3)))
    assert len(robustness.measure([one, third])) == 1  # of other images: not comparable
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text("{}")
    with raises("plot.robustness", "rescom-timm robustness", kind=Missing):
        robustness.measure([RunFolder(bare)])
    robustness.path_of(one.path, "test", "last").write_text("{}")
    with raises("plot.robustness"):
        robustness.measure([one])


def taught(folder: Path, path: Path) -> Path:
    """A copy of the run whose classifier is fitted to the test images by least squares."""
    run = open_run(folder)
    seen = run.look(run.data.test)
    features = torch.nn.functional.pad(seen.features, (0, 1), value=1.0)
    solution = torch.linalg.lstsq(features, torch.nn.functional.one_hot(torch.as_tensor(seen.labels)).float()).solution
    _, weights, state = checkpoint.newest(shutil.copytree(folder, path) / "checkpoints") or pytest.fail("no checkpoint")
    weights |= {"classifier.weight": solution[:-1].T.contiguous(), "classifier.bias": solution[-1].contiguous()}
    checkpoint.save(path / "checkpoints", 8, weights, state)
    return path


def test_tool_measures_a_run_over_a_baseline(
    folder: Path, digits_c: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = taught(folder, tmp_path / "base")
    words = [str(folder), "--prepared", str(digits_c), "--limit", "30", "--baseline", str(other), "data.test=test"]
    assert command.main(words) == 0
    base = open_run(other)
    source = prepared(digits_c, base.data.class_names)
    written = folder / "robustness" / f"test-last-{source.name}.json"
    record = json.loads(written.read_text())
    errors = robustness.corrupted(base, base.data.test, source.kinds, source, limit=30).errors
    expected = robustness.mean_corruption_error(record["errors"], {kind: np.mean(errors[kind]) for kind in errors})
    assert record["figures"]["mCE"] == pytest.approx(expected) and expected > 150
    assert record["figures"]["baseline"] == "base" and set(record["errors"]) == {"fog", "contrast"}
    assert all(written.with_suffix(end).is_file() for end in (".csv", ".png", ".svg"))
    out = capsys.readouterr().out
    assert "30 images" in out and "as it is" in out and "mCE" in out


def test_tool_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([str(folder), "--baseline", "alexnet"], "error[usage.arguments]: --baseline alexnet"),
        ([str(folder), "--prepared", str(tmp_path)], f"error[data.corrupted]: {tmp_path}"),
        ([str(folder), "--limit", "0"], "error[usage.arguments]: "),
        ([str(tmp_path / "absent")], "error[run.missing]: "),
    ):
        assert command.main(words) == 1
        assert message in capsys.readouterr().err
