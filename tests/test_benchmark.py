"""tools/benchmark.py: each part at a size of a second."""

import json
from pathlib import Path

import pytest
import torch

import benchmark
from benchmarking.head import Head
from benchmarking.loader import PlainDataset, photographs
from rescom_timm.data.views import decode, parse, seed_all

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "recipes" / "digits_lt.yaml")


def test_the_yardstick_computes_the_same_loss_and_gradient():
    head = Head(20, 4, 8, 30, 4, "cpu")
    z, labels = head.batch(10)
    gradients = {}
    for name in ("yardstick", "pairs", "mined", "mined/c"):
        leaf = z.clone().requires_grad_()
        head.queue.keys.copy_(head.yardstick.keys)
        head.contenders[name](leaf, labels)
        gradients[name] = leaf.grad
        head = Head(20, 4, 8, 30, 4, "cpu")
    for name in ("pairs", "mined", "mined/c"):
        torch.testing.assert_close(gradients[name], gradients["yardstick"], rtol=1e-4, atol=1e-6)


def test_benchmark_writes_a_table_and_json(tmp_path, capsys):
    file = tmp_path / "head.json"
    small = ["--sizes", "6x2", "--views", "8", "--repetitions", "2", "--features", "4", "--dim", "8", "--chunk", "4"]
    assert benchmark.main(["head", *small, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert {"date", "device", "torch", "threads", "rows"} <= result.keys()
    row = result["rows"][0]
    assert (row["classes"], row["per_class"], row["views"], row["negatives"]) == (6, 2, 8, 10)
    assert row["synchronisations"]["mined"] == 0 < row["synchronisations"]["yardstick"]
    assert "yardstick" in capsys.readouterr().out


def test_benchmark_of_the_loader_writes_a_table_and_json(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        command = ["loader", "--images", "6", "--batch", "3", "--repetitions", "1", "-o", f"{tmp_path}/results/"]
        assert benchmark.main(command) == 0
    finally:
        torch.set_num_threads(threads)
    (path,) = (tmp_path / "results").glob("*-loader-cpu.json")
    record = json.loads(path.read_text())
    assert {"date", "device", "load", "torch", "versions"} <= record.keys()
    cifar, imagenet = record["rows"]
    assert cifar["over_plain"]["plain"] == 1
    assert "batched, cached" in cifar["images_per_second"] and "near resize" in imagenet["images_per_second"]
    assert all(rate > 0 for row in record["rows"] for rate in row["images_per_second"].values())
    assert "batched, cached" in capsys.readouterr().out


def test_the_plain_pipeline_of_the_benchmark_is_the_same_policy():
    (encoded,) = photographs(1, 32, 32, "PNG")
    plain = PlainDataset([encoded], "cifar", floats=False)
    seed_all(3)
    views = plain[0][0]
    seed_all(3)
    policy = parse("cifar")
    assert torch.equal(views, torch.stack([policy(decode(encoded)) for _ in range(2)]))
    floats = PlainDataset([encoded], "cifar", floats=True)
    assert floats[0][0].dtype == torch.float32 and floats[0][0].shape == (2, 3, 32, 32)


def test_step_compares_three_losses_of_one_net_and_the_exported_model(tmp_path, capsys):
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


def test_loop_runs_the_recipes_own_steps(tmp_path, monkeypatch, capsys):
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


def test_startup_is_cut_into_its_parts(tmp_path):
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
def test_what_cannot_be_measured_is_one_clear_line(capsys, words, message):
    assert benchmark.main(words) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(capsys):
    for words in (["step", "resnet8_cifar"], ["head"]):
        assert benchmark.main([*words, "--device", "cuda"]) == 1
        assert "torch sees no GPU here" in capsys.readouterr().err
