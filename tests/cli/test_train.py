"""tools/train.py: what it answers to the shell."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from rescom_timm.cli import train as tool
from rescom_timm.data.decoding import BrokenImage
from rescom_timm.engine.errors import one_line
from rescom_timm.engine.step import TrainingStep
from tests.raises import exits
from tests.recipes import UNDRAWN

DIGITS = str(Path(__file__).parents[2] / "recipes" / "digits_lt.yaml")
QUICK = [
    "+cross_entropy",
    "net.backbone=resnet8_cifar",
    "train.epochs=1",
    "schedule.warmup_epochs=0",
    "method.views=1",
    "train.batch_size=26",
    UNDRAWN,
]


def test_stopped_finished_and_refused_are_told_apart(alone, tmp_path, capsys):
    passes, forward_backward = [], TrainingStep.forward_backward

    def signalled(self, batch, last):
        passes.append(batch)
        if len(passes) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(self, batch, last)

    def train(*words):
        alone.setattr(sys, "argv", ["tools/train.py", DIGITS, *QUICK, f"output={tmp_path}", *words])
        return tool.main()

    alone.setattr(TrainingStep, "forward_backward", signalled)
    assert train() == 143 and "asked to stop" in capsys.readouterr().err
    assert train("--resume") == 0 and len(passes) == 14
    assert train("--resume", "optimizer.lr=0.3") == 1 and "error[" in capsys.readouterr().err
    assert train("train.batch_size=4000") == 1
    assert "4000" in capsys.readouterr().err


@pytest.mark.slow
def test_a_runs_own_recipe_resumes_that_run(alone, tmp_path, capsys):
    def train(*words):
        alone.setattr(sys, "argv", ["tools/train.py", *words])
        assert tool.main() == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("run folder"))

    first, second = (tmp_path / f"digits_lt_cross_entropy{end}" for end in ("", "-2"))
    assert train(DIGITS, *QUICK, f"output={tmp_path}") == f"run folder: {first}"
    assert train(DIGITS, *QUICK, f"output={tmp_path}") == f"run folder: {second}"
    assert train(DIGITS, *QUICK, f"output={tmp_path}", "--resume").startswith(f"run folder: {second}, resumed from")
    assert train(str(first / "recipe.yaml"), "--resume").startswith(f"run folder: {first}, resumed from step-")
    moved = first.rename(tmp_path / "moved")
    assert train(str(moved / "recipe.yaml"), "--resume").startswith(f"run folder: {moved}, resumed from step-")
    told = train(DIGITS, *QUICK, f"output={tmp_path / 'new'}", "--resume")
    assert told.endswith("no checkpoint to resume from: starting from the beginning")


def test_quiet_tells_the_last_figures_alone(alone, tmp_path, capsys):
    words = [DIGITS, *QUICK, f"output={tmp_path}", "--quiet"]
    assert tool.main(words) == 0
    told = capsys.readouterr()
    folder = tmp_path / "digits_lt_cross_entropy"
    numbers = json.loads((folder / "evaluation/test-last.json").read_text())["numbers"]
    assert told.out.startswith(f"{folder}: top1 {numbers['top1']:.2f}, ") and told.out.count("\n") == 1
    assert told.err == "", told.err
    assert tool.main([*words, "--dry-run"]) == 0 and capsys.readouterr().out.startswith("dry run: ")


def test_of_a_workers_error_its_own_words_are_told():
    sent = "Caught BrokenImage in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    assert one_line(BrokenImage(f"{sent}BrokenImage: row 3\n")) == "BrokenImage: row 3"
    assert one_line(OSError(28, "No space left on device")) == "OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "digits_lt"),
        (
            [DIGITS, "--epochs", "3"],
            "train.epochs=3",
        ),
        ([DIGITS, "--train.epochs=3"], "train.epochs=3"),
        ([DIGITS, "--lr", "0.3"], "optimizer.lr=0.3"),
        ([DIGITS, "--batch-size", "32"], "train.batch_size=32"),
        ([DIGITS, "--model=resnet50"], "net.backbone=resnet50"),
        ([DIGITS, "--learning-rate", "0.3"], "optimizer.lr=0.3"),
        ([DIGITS, "--device", "cpu"], "ACCELERATE_USE_CPU=1"),
        ([DIGITS, "--zzz"], "--zzz"),
        ([DIGITS, DIGITS], f"{DIGITS} and {DIGITS}"),
        ([DIGITS, "ldam"], "+ldam"),
        ([DIGITS, "train.epochs"], "train.epochs=VALUE"),
        ([DIGITS, "--report-to", "wandb"], "track.log_with=wandb"),
        ([DIGITS, "--fp16"], "train.precision=fp16"),
        (["hf://me/x"], "--resume"),
    ],
)
def test_a_command_that_cannot_be_is_told_how_it_is_written(alone, capsys, words, expected):
    alone.setattr(sys, "argv", ["tools/train.py", *words])
    with exits(2):
        tool.main()
    assert expected in capsys.readouterr().err
