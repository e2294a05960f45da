"""tools/benchmark.py: whole steps, the trainer's loop and start-up, at sizes of a second. The head's and the loader's
parts are tested beside the code that they measure."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "recipes" / "digits_lt.yaml")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("tools_benchmark", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_step_compares_three_losses_of_one_net_and_the_exported_model(benchmark, tmp_path, capsys):
    file = tmp_path / "step.json"
    small = ["--classes", "6", "--per-class", "3", "--negatives", "4", "--batch", "4", "--repetitions", "1"]
    assert benchmark.main(["step", "resnet8_cifar", *small, "-o", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["losses"]["rescom"] == pytest.approx(row["losses"]["dense"], rel=1e-3)
    assert row["losses"]["plain"] < row["losses"]["rescom"]
    assert row["over_plain"]["rescom"] == pytest.approx(row["milliseconds"]["rescom"] / row["milliseconds"]["plain"])
    assert row["memory_over_plain"]["plain"] == 1 and 0.9 < row["memory_over_plain"]["rescom"] < 2
    assert row["synchronisations"]["rescom"] == 0 < row["synchronisations"]["dense"]
    assert row["largest_difference_of_logits"] == 0
    assert "inference of the exported model" in capsys.readouterr().out


def test_loop_runs_the_recipes_own_steps(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["net.backbone=resnet8_cifar", "train.batch_size=8", "train.epochs=5", "schedule.warmup_epochs=0"]
    assert benchmark.main(["loop", DIGITS, *quick, "--steps", "2", "-o", "loop.json"]) == 0
    record = json.loads(Path("loop.json").read_text())
    (row,) = record["rows"]
    assert row["steps_of_recipe"] == 5 * (364 // 8)
    assert row["images_per_second"] == pytest.approx(8e3 / row["milliseconds"])
    assert row["minutes_of_recipe"] == pytest.approx(row["steps_of_recipe"] * row["milliseconds"] / 6e4)
    assert 0 <= row["lost_to_loading"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop.json"], "no run is written"
    assert "lost to loading" in capsys.readouterr().out


def test_startup_is_cut_into_its_parts(benchmark, tmp_path):
    file = tmp_path / "startup.json"
    words = [DIGITS, "net.backbone=resnet8_cifar", "train.batch_size=8"]
    assert benchmark.main(["startup", *words, "--repetitions", "1", "-o", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    parts = [row[part] for part in ("imports", "data", "build", "first step")]
    assert all(part > 0 for part in parts) and sum(parts) < row["process"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["step", "resnet8_cifr"], "did you mean resnet8_cifar"),
        (["loop", DIGITS, "train.epoch=5"], "did you mean train.epochs"),
        (["loop", "nowhere.yaml"], "nowhere.yaml"),
        (["startup", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(benchmark, capsys, words, message):
    assert benchmark.main(words) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(benchmark, capsys):
    for words in (["step", "resnet8_cifar"], ["head"]):
        assert benchmark.main([*words, "--device", "cuda"]) == 1
        assert "torch sees no GPU here" in capsys.readouterr().err
