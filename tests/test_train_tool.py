"""tools/train.py: what it answers to the shell."""

import os
import signal
import sys
from pathlib import Path

from rescom_timm.runs.trainer import Trainer
from tools import train as tool

DIGITS = str(Path(__file__).parents[1] / "recipes" / "digits_lt_cross_entropy.yaml")
QUICK = [
    "net.backbone=resnet8_cifar",
    "train.epochs=1",
    "schedule.warmup_epochs=0",
    "method.views=1",
    "train.batch_size=26",
]


def test_stopped_finished_and_refused_are_told_apart(alone, tmp_path, capsys):
    passes, forward_backward = [], Trainer._forward_backward

    def signalled(self, batch, last):
        passes.append(batch)
        if len(passes) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(self, batch, last)

    def train(*words):
        alone.setattr(sys, "argv", ["tools/train.py", DIGITS, *QUICK, f"output={tmp_path}", *words])
        return tool.main()

    alone.setattr(Trainer, "_forward_backward", signalled)
    assert train() == 143 and "Stopped: " in capsys.readouterr().err
    assert train("--resume") == 0 and len(passes) == 14
    assert train("--resume", "optimizer.lr=0.3") == 1 and "RecipeError: " in capsys.readouterr().err
