"""python tools/benchmark.py scale, classes and soak: at a tiny size, and their arithmetic by hand."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
from benchmarks import classes, scale, soak
from benchmarks.soak import Life, Sample
from rescom_timm.analysis import plots
from tests.raises import raises


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "number"), [(10, 10), (1000, 7), (5000, 1000)])
def test_made_up_counts_are_long_tailed_and_leave_no_class_out(rows, number):
    counts = scale.made_up_counts(rows, number)
    assert counts.sum() == rows and len(counts) == number and counts.min() >= 1
    if rows > 2 * number:
        assert counts[0] == counts.max() > rows / (1.5 * np.log(number + 1) + 1.5)


def test_images_are_links_to_a_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "LINKS", 4)
    monkeypatch.setattr(scale, "IN_A_FOLDER", 3)
    names = scale.image_names(10, "train")
    assert names[:4] == ["train/0000/000.png", "train/0000/001.png", "train/0000/002.png", "train/0001/000.png"]
    scale.link_images(tmp_path, names)
    found = [(tmp_path / name).stat() for name in names]
    assert [one.st_nlink for one in found] == [4] * 8 + [2] * 2
    assert len({one.st_ino for one in found}) == 3


def test_growth_is_the_exponent_between_neighbours():
    rows = [
        {"rows": n, "classes": k, "seconds": {"data": 3e-6 * n**1.5 * k, "step": 0.2}, "megabytes": {"data": 2.0 * n}}
        for n in (1000, 100, 10_000)
        for k in (10, 40)
    ]
    by_rows = scale.growth(rows, "rows")
    assert [(line["from"], line["to"], line["classes"]) for line in by_rows] == [
        (100, 1000, 10), (1000, 10_000, 10), (100, 1000, 40), (1000, 10_000, 40),
    ]  # fmt: skip
    for line in by_rows:
        assert line["seconds"] == pytest.approx({"data": 1.5, "step": 0})
        assert line["megabytes"] == pytest.approx({"data": 1})
    by_classes = scale.growth(rows, "classes")
    assert [(line["from"], line["to"]) for line in by_classes] == [(10, 40)] * 3
    assert by_classes[0]["seconds"] == pytest.approx({"data": 1, "step": 0})


PEAKS = """
import json, numpy as np
from benchmarks import scale
parts = scale.Parts()
with parts.measured("large"):
    np.ones(100_000_000, np.uint8)
with parts.measured("small", times=2):
    np.ones(1000, np.uint8)
print(json.dumps([parts.megabytes, parts.seconds, parts.wall]))
"""


def test_a_part_is_charged_with_its_own_peak():
    # In a process of its own, whose heap has no place for it of before.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "tools")}
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, env=environment)
    megabytes, seconds, wall = json.loads(done.stdout)
    assert megabytes["large"] > 80
    if Path("/proc/self/clear_refs").exists() and os.access("/proc/self/clear_refs", os.W_OK):
        assert megabytes["small"] < megabytes["large"] - 80
    assert seconds.keys() == wall.keys() == {"large", "small"}


def test_scale_measures_every_part_of_a_run(alone, tmp_path, capsys):
    alone.setattr(plots, "FROM_FILES", ("longtail",))
    scale.link_images(tmp_path / "images", [*scale.image_names(90, "train"), *scale.image_names(14, "test")])
    folder = tmp_path / "90x7"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(scale.recipe_of(folder, 90, 7, 14)))
    scale.child(str(folder), 2, ["train.batch_size=16"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["rows"], row["classes"], row["tests"]) == (90, 7, 14)
    assert list(row["seconds"]) == list(row["megabytes"]) == list(scale.PARTS)
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert row["files"]["list"] == (folder / "train.txt").stat().st_size / 1e6
    assert row["files"]["report"] == (folder / "run/figures/report.html").stat().st_size / 1e6
    record = json.loads((folder / "run/evaluation/test-last.json").read_text())
    assert record["images"] == 14 and len(record["per_class"]["count"]) == 7
    assert (folder / "run/checkpoints/step-00000003").is_dir()


def test_more_steps_than_there_are_batches_are_refused(alone, tmp_path):
    scale.link_images(tmp_path / "images", [*scale.image_names(24, "train"), *scale.image_names(2, "test")])
    folder = tmp_path / "24x2"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(scale.recipe_of(folder, 24, 2, 2)))
    with raises("usage.arguments", "--steps", "train.batch_size"):
        scale.child(str(folder), 3, ["train.batch_size=8"])


@pytest.mark.slow
def test_scale_tells_a_table_and_its_growth(tmp_path, capsys):
    words = ["--rows", "60", "120", "--classes", "6", "12", "--tests", "12", "--steps", "1", "--folder", str(tmp_path)]
    assert benchmark.main(["scale", *words, "-o", str(tmp_path / "scale.json")]) == 0
    record = json.loads((tmp_path / "scale.json").read_text())
    assert [(row["rows"], row["classes"]) for row in record["rows"]] == [(60, 6), (120, 6), (60, 12), (120, 12)]
    assert len(record["growth"]) == 4
    assert "growth from 60 to 120 rows, 6 classes:" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"], "lists and links are gone"


# --- classes ----------------------------------------------------------------------------------------------------


def options(**changed: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    classes.arguments(parser)
    chosen = parser.parse_args([])
    vars(chosen).update({"repetitions": 1, **changed})
    return chosen


def test_what_stays_is_what_it_is_on_paper():
    for per_class, features, dim in ((4, 16, 8), (1, 5, 12)):
        chosen = options(per_class=per_class, features=features, dim=dim, views=8, negatives=6)
        one = classes.Classes(50, 8, chosen)
        one.step()
        assert one.held() == classes.on_paper(50, 8, chosen)["held"]


@pytest.mark.parametrize("changed", [{}, {"per_class": 1, "features": 16}, {"per_class": 1, "features": 600}])
def test_the_peak_of_a_step_is_near_what_it_is_on_paper(changed):
    """Each of the three is the largest once: similarities, Balanced Softmax, gradients."""
    row = classes.measure(20_000, options(views=64, processes=1000, **changed))
    assert row["bytes"]["peak"] == pytest.approx(row["on_paper"]["peak"], rel=0.12)


def test_the_largest_is_told_beside_the_line_through_the_smallest():
    rows = [{"classes": k, "milliseconds": {"a": 2 + 0.5 * k, "b": 1.0}} for k in (10, 30, 70, 100)]
    assert classes.predicted(rows) == [None, None, pytest.approx(38.0), pytest.approx(53.0)]
    assert classes.predicted(rows[:2]) == [None, None]


def test_classes_writes_a_table_and_json(tmp_path, capsys):
    small = ["--views", "8", "--features", "6", "--dim", "4", "--negatives", "9", "--processes", "2"]
    command = ["classes", "--classes", "20", "10", "40", *small, "--repetitions", "1"]
    assert benchmark.main([*command, "-o", str(tmp_path / "classes.json")]) == 0
    record = json.loads((tmp_path / "classes.json").read_text())
    assert [row["classes"] for row in record["rows"]] == [10, 20, 40]
    for row in record["rows"]:
        assert set(row["cut"]) == {"whole", "shard"}
        assert row["bytes"]["held"] == row["on_paper"]["held"]
        assert all(row["milliseconds"][part] > 0 for part in classes.PARTS)
    assert "on the line through the two smallest" in capsys.readouterr().out


# --- soak -------------------------------------------------------------------------------------------------------


def life(epochs: list[int], memory: list[float], ended_by: str = "SIGTERM", **more: int) -> Life:
    samples = [
        Sample(10.0 * i, epoch, held, held + 500, 16, 2, 2 + epoch / 1024, 2, epoch / 2048)
        for i, (epoch, held) in enumerate(zip(epochs, memory, strict=True))
    ]
    return Life(samples, ended_by, **more)


def test_slopes_are_those_within_lives_after_their_warm_up():
    first = life([0, 10, 20, 30, 40], [100, 700, 900, 901, 902])  # grows by 0.1 a second once it is warm
    second = life([40, 60, 80, 100], [5000, 300, 301, 302])
    assert soak.slope([first, second], "memory", "seconds") == pytest.approx(0.1)
    assert 1024 * soak.slope([first, second], "tensorboard", "epoch") == pytest.approx(0.5)
    assert soak.slope([life([0, 5], [1, 2])], "memory", "seconds") is None


def test_workers_that_come_and_go_are_no_slope():
    one = life(list(range(20, 320, 20)), [900.0 + i for i in range(15)])
    for sample in one.samples[-4:]:
        sample.processes, sample.tree = 3, sample.tree + 500
    assert soak.slope([one], "tree", "seconds") == pytest.approx(0.1)


def test_what_should_not_be_is_told():
    good = life(list(range(60)), [900.0] * 60)
    epochs = list(range(1, 60))
    assert soak.wrongs([good], epochs, ["step-00000009"]) == []
    told = {
        "no epoch was trained": ([good], [], []),
        "an epoch is missing or logged twice": ([good], [1, 2, 2], []),
        "a run ended by itself": ([life([0], [1.0], "itself")], epochs, []),
        "processes were left over": ([life([0], [1.0], left_over=1)], epochs, []),
        "memory grew by more than 30 MiB in a life": ([life(list(range(60)), np.linspace(900, 960, 60))], epochs, []),
        "files of a checkpoint were left over": ([good], epochs, [".step-00000009.new"]),
    }
    for said, words in told.items():
        assert said in soak.wrongs(*words)
    for sample in good.samples[-3:]:
        sample.files += 6
    assert soak.wrongs([good], epochs, []) == ["open files grew"]


def test_sizes_and_rows_of_lives(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(bytes(3 * 2**20))
    (tmp_path / "c").write_bytes(bytes(2**20))
    assert soak.size(tmp_path) == 4 and soak.size(tmp_path / "none") == 0
    plain = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: plain(f"{path}/gone" if str(path).endswith("/a") else path))
    assert soak.size(tmp_path) == 1, "a folder that goes meanwhile is passed over"
    monkeypatch.undo()
    (row,) = soak.summary([life([0, 30, 50], [1, 2, 3])])
    assert row["epochs"] == [0, 50] and row["memory"] == [2, 3] and row["files"] == [16, 16]


def test_a_folder_with_a_soak_is_not_written_to(tmp_path, capsys):
    (tmp_path / "soak").mkdir()
    assert benchmark.main(["soak", "--folder", str(tmp_path)]) == 1
    assert "error[file.exists]" in capsys.readouterr().err


def test_a_soak_that_fails_leaves_no_run_behind(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(soak, "epochs_done", lambda folder: (started and 1 / 0) or started.append(1) or 0)
    seen = soak.subprocess.Popen

    def popen(words, **more):
        started.append(seen([words[0], "-c", "import time; time.sleep(60)"], **more))
        return started[-1]

    monkeypatch.setattr(soak.subprocess, "Popen", popen)
    with pytest.raises(ZeroDivisionError):
        soak.live(tmp_path, [], 1, soak.signal.SIGTERM, 0.01, 0.0)
    assert started[-1].returncode == -9


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    words = ["--minutes", "0.5", "--life", "10", "--every", "0.5", "--folder", str(tmp_path / "kept")]
    assert benchmark.main(["soak", *words, "-o", str(tmp_path / "soak.json")]) == 0
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["wrong"] == [] and record["epochs"] >= 1
    samples = [json.loads(line) for line in (tmp_path / "kept/samples.jsonl").read_text().splitlines()]
    assert all(sample["processes"] >= 1 and sample["files"] > 3 for sample in samples)
