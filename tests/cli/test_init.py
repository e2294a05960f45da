"""What `init` proposes by its options, and the measured step. tests/cli/test_index.py has the splits that it makes."""

import pytest
import yaml

from rescom_timm.__main__ import main
from rescom_timm.api import train_recipe
from rescom_timm.cli.parts import init as parts
from rescom_timm.config import own_rules
from rescom_timm.config.loading import load
from rescom_timm.config.own_data import Proposal, Wanted


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """A recipe of the embedded digits, made long-tailed: (exit code, what was printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def go(*words: str) -> tuple[int, str]:
        code = main(["init", "digits", "--imbalance", "50", "-o", "d.yaml", "--force", *words])
        out = capsys.readouterr()
        return code, out.out + out.err

    return go


SMALL = ("--backbone", "test_resnet", "--size", "32")


def unmeasured(monkeypatch):
    monkeypatch.setattr(parts, "training_time", lambda recipe, wanted: "not measured")


def test_the_time_is_measured_without_the_weights(run):
    code, said = run(*SMALL)
    assert code == 0 and "time: about " in said and "a CPU" in said, said
    made = load("d.yaml")
    assert made.net.pretrained and made.net.classifier.init == "class_means" and made.method.name == "balanced_softmax"
    assert "center_crop(32)" in made.views.eval and made.train.epochs == 10
    train_recipe(load("d.yaml", ["net.pretrained=false", "speed.workers=0"]), dry_run=True)


def test_small_images_train_from_scratch_at_their_size(run):
    code, said = run("--backbone", "resnet8_cifar")
    made = load("d.yaml")
    assert code == 0 and "time: about " in said and not made.net.pretrained and made.method.views == 2
    assert made.views.eval == "resize(8) | center_crop(8)" and "crop(8,1)" in made.views.train


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--backbone", "resnet51"], "net.backbone", "resnet50"),
        (["--backbone", "resnet50.a9"], "net.backbone", "resnet50.a1_in1k"),
        (["--size", "0"], "recipe.value", "0"),
        (["--size", "-8"], "recipe.value", "-8"),
        (["--size", "100000"], "recipe.value", "100000"),
        (["--method", "balanced_sofmax"], "recipe.unknown_method", "balanced_softmax"),
        (["--method", "crt"], "recipe.missing_key", "from=RUN"),
        (["--method", "dive"], "recipe.missing_key", "method.teacher=RUN"),
        (["--method", "probe"], "recipe.missing_key", "from=RUN"),  # over a net from scratch
        (["--backbone", "test_vit", "--size", "33"], "recipe.conflict", "33"),
        (["--backbone", "test_vit", "--method", "experts"], "net.branch", "layer2"),
    ],
)
def test_bad_options_are_errors_and_nothing_is_written(run, tmp_path, words, code, named):
    exit_code, said = run(*words)
    assert exit_code == 1 and f"error[{code}]" in said and named in said, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--size", "many"], ["--device", "tpu"], ["--tune", "all"]])
def test_words_that_an_option_does_not_take_are_usage_errors(run, words):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2


@pytest.mark.parametrize("size", [None, 64])
def test_images_smaller_than_the_size_are_enlarged_and_that_is_printed(run, monkeypatch, size):
    unmeasured(monkeypatch)
    code, said = run(*(["--size", str(size)] if size else []))
    assert code == 0 and f"resize({size or 8})" in load("d.yaml").views.eval and ("enlarged" in said) == bool(size)


def test_a_training_on_a_gpu_is_not_measured_on_a_cpu(run):
    code, said = run("--device", "cuda")
    assert code == 0 and "no GPU" in said and load("d.yaml").train.epochs == 200
    assert Wanted(device="cpu").is_cpu and not Wanted(device="cuda").is_cpu and Wanted().is_cpu


@pytest.mark.parametrize(
    ("name", "method", "keeps_head"),
    [("rescom", "rescom", True), ("ldam", "ldam", False), ("sam", "balanced_softmax", True)],
)
def test_a_named_method_is_over_the_other_settings(run, monkeypatch, name, method, keeps_head):
    unmeasured(monkeypatch)
    assert run(*SMALL, "--method", name)[0] == 0
    made = load("d.yaml")
    assert made.method.name == method and (made.net.classifier.kind == "cosine") == keeps_head
    assert (made.optimizer.sam is not None) == (name == "sam")
    if name == "rescom":
        assert made.method.positives == made.method.queue.per_class == 10
    if name == "ldam":
        train_recipe(load("d.yaml", ["net.pretrained=false", "speed.workers=0"]), dry_run=True)


def test_many_images_on_a_cpu_get_a_head_over_the_frozen_net(run, monkeypatch):
    row = own_rules.Row("weights", "cpu", 1e9, "probe", 0, 32)
    monkeypatch.setattr(own_rules, "ROWS", (row,))
    code, said = run(*SMALL)
    made = load("d.yaml")
    assert code == 0 and "time: about " in said and made.method.name == "probe" and made.train.epochs == 0, said
    unmeasured(monkeypatch)
    assert run(*SMALL, "--method", "focal")[0] == 0
    assert load("d.yaml").method.name == "focal" and load("d.yaml").train.epochs == 1


def test_reasons_are_comments_whatever_the_source_is_called():
    text = Proposal({"name": "x"}, ("images", "net: a\nb: 1")).text("a\nname: other\u2028c: 2")
    assert yaml.safe_load(text) == {"name": "x"}
