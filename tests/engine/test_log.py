"""What a run writes beside its checkpoints."""

import json
import sys

import psutil
import torch
import yaml

from rescom_timm.config.loading import load, load_dict
from rescom_timm.data.progress import bars_shown, quiet
from rescom_timm.engine.log import Log, environment, evaluation_line, lines, peak_memory
from tests.engine.child import recipe
from tests.raises import raises


def test_lines_are_written_and_those_after_the_checkpoint_dropped(tmp_path):
    made = load_dict(recipe(tmp_path, track__log_with=["tensorboard"]))
    log = Log(tmp_path, made, {"processes": 1})
    for epoch in (1, 2, 3):
        log.write(epoch, 10 * epoch, {"train/loss": 0.1 * epoch})
    log.close()
    assert lines(tmp_path / "metrics.jsonl")[1] == {"epoch": 2, "step": 20, "train/loss": 0.2}
    log = Log(tmp_path, made, {}, step=20)
    log.write(3, 30, {"train/loss": 9.0})
    log.close()
    assert [(line["step"], line["train/loss"]) for line in lines(log.path)] == [(10, 0.1), (20, 0.2), (30, 9.0)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "step": 5}\n{"epoch": 2, "st')
    assert lines(path) == [{"epoch": 1, "step": 5}]
    Log(tmp_path, load_dict(recipe(tmp_path)), {}, step=5).close()
    assert path.read_text() == '{"epoch": 1, "step": 5}\n'
    assert lines(tmp_path / "nowhere.jsonl") == []


def test_the_recipe_kept_is_the_recipe(tmp_path):
    made = load_dict(recipe(tmp_path, train__epochs=7))
    Log(tmp_path, made, {"data": {"source": "digits"}}).close()
    assert load(tmp_path / "recipe.yaml") == made
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]["epochs"] == 7
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["data"] == {"source": "digits"} and about["packages"]["torch"]


def test_environment_names_versions_and_code():
    about = environment()
    assert {"started", "command", "python", "packages", "platform", "gpus", "git"} <= set(about)
    assert about["git"] is None or len(about["git"]["commit"]) == 40


def test_the_command_is_that_of_the_launcher(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/train.py", "my recipe.yaml"])
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment()["command"] == "python tools/train.py 'my recipe.yaml'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert environment()["command"].startswith("torchrun --nproc_per_node 4 tools/train.py ")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment()["command"].startswith("accelerate launch --num_processes 2 tools/train.py ")


def test_an_evaluation_is_one_line():
    figures = {"test": {"top1": 88.123, "few": 79.0}, "validation": {"top1": 90.0}}
    text = "after epoch 3: test  top1 88.12  few 79.00; validation  top1 90.00"
    assert evaluation_line(3, figures, {}) == text
    intervals = {"test": {"few": (63.2, 88.9)}, "validation": {"top1": (89.42, 90.61)}}
    text = "after epoch 3: test  top1 88.12  few 79.00 (63-89); validation  top1 90.00 (89.4-90.7)"
    assert evaluation_line(3, figures, intervals) == text


def test_the_most_memory_held_never_falls_and_is_of_this_process():
    before, held = peak_memory(), torch.zeros(2**24)  # 64 MiB
    assert peak_memory() >= before >= psutil.Process().memory_info().rss / 2
    assert peak_memory() < psutil.virtual_memory().total and held.sum() == 0


def test_quiet_is_for_what_happens_within(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert bars_shown()
    with quiet():
        print("an epoch")
        print("an error", file=sys.stderr)
        assert not bars_shown()
    assert bars_shown() and tuple(capsys.readouterr()) == ("", "an error\n")


def test_a_full_disk_is_an_error_of_the_write(tmp_path, monkeypatch):
    log = Log(tmp_path, load_dict(recipe(tmp_path)), {})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with raises("file.failed", "No space left", kind=OSError):
        log.write(1, 1, {"x": 1.0})
    log.close()
