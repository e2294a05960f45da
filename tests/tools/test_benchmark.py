"""tools/benchmark.py: each part at a size of a second."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

import benchmark
from benchmarks import ensembles, inference
from benchmarks.head import Head
from benchmarks.loader import PlainDataset, photographs
from benchmarks.loop import Watched
from rescom_timm.data.decoding import decode
from rescom_timm.data.transforms import parse, seed_all
from tests.fitting import made_up

ROOT = Path(__file__).parents[2]
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
    assert "batched, cached" in cifar["images_per_second"] and "planes" in imagenet["images_per_second"]
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


@pytest.mark.slow
def test_tuning_compares_all_few_and_none_of_the_weights(alone, tmp_path, capsys):
    file = tmp_path / "tuning.json"
    small = ["--size", "32", "--classes", "6", "--batch", "2", "--repetitions", "1"]
    assert benchmark.main(["tuning", "test_vit", *small, "-o", str(file)]) == 0
    record = json.loads(file.read_text())
    names = list(record["milliseconds"])
    assert names == ["full", "full, checkpointing", "lora", "adaptformer", "prompt", "head"]
    trained = record["trained"]
    assert trained["full"] == trained["full, checkpointing"] > trained["lora"] > trained["head"] == 6 * 64 + 6
    for name in names:
        assert record["over_full"][name] == record["milliseconds"][name] / record["milliseconds"]["full"] > 0
        assert record["memory_over_full"][name] == record["megabytes"][name] / record["megabytes"]["full"] > 0
    assert "adaptformer" in capsys.readouterr().out


@pytest.mark.slow
def test_step_compares_three_losses_of_one_net(alone, tmp_path, capsys):
    file = tmp_path / "step.json"
    small = ["--classes", "6", "8", "--per-class", "3", "--negatives", "4", "--batch", "4", "--repetitions", "1"]
    assert benchmark.main(["step", "resnet8_cifar", *small, "--steps", "2", "-o", str(file)]) == 0
    record = json.loads(file.read_text())
    assert {"date", "device", "torch", "timm", "threads"} <= record.keys()
    assert (record["backbone"], record["size"], record["batch"], record["compile"]) == ("resnet8_cifar", 32, 4, False)
    assert [row["classes"] for row in record["rows"]] == [6, 8]
    for row in record["rows"]:
        assert row["negatives"] == 4
        assert row["losses"]["rescom"] == pytest.approx(row["losses"]["dense"], rel=1e-4)
        assert row["losses"]["plain"] < row["losses"]["rescom"], "plain, and half a contrastive loss"
        for name in ("plain", "rescom", "dense"):
            assert row["over_plain"][name] == row["milliseconds"][name] / row["milliseconds"]["plain"] > 0
            assert row["memory_over_plain"][name] == row["megabytes"][name] / row["megabytes"]["plain"] > 0.9
        assert row["calls"]["plain"] < row["calls"]["rescom"] < row["calls"]["dense"]
        assert row["synchronisations"]["plain"] == row["synchronisations"]["rescom"] == 0
        assert row["synchronisations"]["dense"] >= 4, "keys enter one by one"
    out = capsys.readouterr()
    assert "rescom" in out.out and "USDT" not in out.err


@pytest.mark.slow
def test_the_exported_model_is_a_plain_timm_model(alone, tmp_path):
    file = tmp_path / "step.json"
    small = ["--classes", "5", "--batch", "2", "--repetitions", "1", "--size", "32"]
    assert benchmark.main(["step", "test_resnet", *small, "--precision", "bf16", "-o", str(file)]) == 0
    (row,) = json.loads(file.read_text())["inference"]
    assert row["difference_of_logits"] == row["difference_from_net"] == 0
    assert row["over_plain"]["exported"] == row["milliseconds"]["exported"] / row["milliseconds"]["plain"] > 0


@pytest.mark.slow
def test_memory_holds_what_a_large_queue_adds(alone, tmp_path):
    file = tmp_path / "step.json"
    small = ["--classes", "500", "--per-class", "8", "--batch", "2", "--repetitions", "1", "--negatives", "9"]
    assert benchmark.main(["step", "resnet8_cifar", *small, "-o", str(file)]) == 0
    megabytes = json.loads(file.read_text())["rows"][0]["megabytes"]
    assert megabytes["rescom"] - megabytes["plain"] > 500 * 8 * 128 * 4 / 1e6, "the keys"
    assert megabytes["dense"] - megabytes["rescom"] > 0.9 * 500 * 499 * 8 * 8 / 1e6, "the index of other classes' keys"


def test_loop_runs_the_trainers_own_epochs(alone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["net.backbone=resnet8_cifar", "train.batch_size=80", "train.epochs=5", "schedule.warmup_epochs=0"]
    quick += ["evaluation.every=2", "--evaluate"]
    assert benchmark.main(["loop", DIGITS, *quick, "--steps", "9", "-o", "loop.json"]) == 0
    record = json.loads(Path("loop.json").read_text())
    (row,) = record["rows"]
    assert row["steps_of_recipe"] == 5 * (364 // 80) and row["evaluations_of_recipe"] == 3
    assert row["images_per_second"] == pytest.approx(80e3 / row["milliseconds"])
    seconds = row["steps_of_recipe"] * row["milliseconds"] / 1e3 + 3 * row["seconds_of_evaluation"]
    assert row["minutes_of_recipe"] == pytest.approx(seconds / 60)
    assert 0 <= row["lost_to_loading"] < 1 and 0 < row["waiting"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop.json"], "no run is written"
    assert "of the time lost" in capsys.readouterr().out


def test_a_watched_loader_gives_as_many_batches_as_asked_over_any_number_of_epochs():
    watched = Watched([{"row": 0}, {"row": 1}, {"row": 2}])
    watched.left = 7
    epochs = []
    while watched.left:
        epochs.append([batch["row"] for batch in watched])
    assert epochs == [[0, 1, 2], [0, 1, 2], [0]]
    watched.left = 3  # what is left of an epoch, then the next
    assert [[batch["row"] for batch in watched] for _ in range(2)] == [[1, 2], [0]]
    watched.left, watched.again, watched.iterator = 4, True, None
    assert [[batch["row"] for batch in watched] for _ in range(2)] == [[0, 0, 0], [0]]


@pytest.mark.slow
def test_fit_is_timed(tmp_path):
    photos, file = made_up.photographs(tmp_path / "photos", [8, 6]), tmp_path / "fit.json"
    words = ["--minutes", "5", "--size", "16", "--backbone", made_up.NET, "--weights-file", "none"]
    assert benchmark.main(["fit", str(photos), *words, "-o", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["minutes"] == 5 and row["used"] > 0 and row["chosen"]


@pytest.mark.slow
def test_startup_is_cut_into_its_parts(tmp_path):
    file = tmp_path / "startup.json"
    words = [DIGITS, "net.backbone=resnet8_cifar", "train.batch_size=8"]
    assert benchmark.main(["startup", *words, "--repetitions", "1", "-o", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    *parts, whole = row["seconds"].values()
    assert list(row["seconds"]) == ["interpreter", "imports", "data", "build", "first step", "in all"]
    assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "resnet8_cifr"], "did you mean resnet8_cifar"),
        (["step", "resnet8_cifar", "--classes", "3", "--negatives", "9"], "lower negatives"),
        (["step", "resnet8_cifar", "--precision", "fp16"], "use bf16 or no"),
        (["loop", DIGITS, "train.epoch=5"], "did you mean train.epochs"),
        (["loop", "nowhere.yaml"], "nowhere.yaml"),
        (["startup", "nowhere.yaml"], "nowhere.yaml"),
        (["head", "--sizes", "1000000x4"], "python tools/benchmark.py classes measures so many"),
        (["classes", "--views", "7"], "views come in pairs"),
        (["scale", "--rows", "5", "--classes", "10"], "each class needs an image"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(capsys, words, message):
    assert benchmark.main(words) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and message in told[0]


def test_a_number_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["head", "--repetitions", "0"])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told(capsys):
    for words in (["step", "resnet8_cifar"], ["head"]):
        assert benchmark.main([*words, "--device", "cuda"]) == 1
        assert "finds no GPU" in capsys.readouterr().err


def test_every_part_says_what_it_measures():
    assert tuple(ensembles.PRECISIONS) == inference.PRECISIONS
    for part, summary in benchmark.PARTS.items():
        about = import_module(f"benchmarks.{part}").__doc__
        assert about.startswith(f"`{part}`: {summary}")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("startup none.yaml", 1, "]: no recipe none.yaml"),
        ("hed", 2, "invalid choice: 'hed'"),
        ("inference resnet33_cifar", 1, "]: timm has no model 'resnet33_cifar'"),
        ("inference resnet8_cifar x", 1, "]: 'x' is not key=value"),
        ("inference resnet8_cifar --experts x", 2, "argument --experts"),
    ],
)
def test_bad_input_is_one_line(words, code, message, capsys):
    try:
        found = benchmark.main(words.split())
    except SystemExit as ended:
        found = ended.code
    assert found == code and message in capsys.readouterr().err


def test_benchmark_of_peers_gives_ratios_with_their_spread(tmp_path, capsys):
    """Of the small parts; `epoch` and `predict` run a net at 224 pixels."""
    threads = torch.get_num_threads()
    small = ["--only", "doctor", "csv", "--images", "2", "--rows", "50", "--repetitions", "2"]
    try:
        assert benchmark.main(["peers", *small, "-o", f"{tmp_path}/"]) == 0
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("*-peers-cpu.json")
    doctor, csv = json.loads(path.read_text())["rows"]
    for row, peer in ((doctor, "imagehash and md5"), (csv, "pandas and exists")):
        middle, least, most = row["ratio"][peer]
        assert 0 < least <= middle <= most and row["milliseconds"].keys() == {"ours", peer}
