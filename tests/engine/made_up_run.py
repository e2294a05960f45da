"""A run's folder as training would have left it, made in a moment: nets of random weights, a filled queue."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import Recipe
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import build_net
from rescom_timm.engine.state import Progress
from rescom_timm.methods import create_method

COUNTS = [120, 40, 9, 3]
NAMES = ["cat", "dog", "emu", "fox"]
HOME = Path.home() / "photos"
"""A path that no file handed on may tell; nothing is written there."""


def recipe(**sections: Any) -> Recipe:
    method = {"name": "rescom", "queue": {"per_class": 2}, "negatives": 3}
    return load_dict(
        {
            "name": "tiny",
            "output": str(HOME / "runs"),
            "data": {"source": "digits", "validation": "holdout(0.1)"},
            "views": {"train": "digits", "eval": "none", "mean": [0.5] * 3, "std": [0.25] * 3},
            "net": {"backbone": "resnet20_cifar", "projector": {"hidden": 8, "dim": 4}},
            "method": method,
            **sections,
        }
    )


def randomize(net: nn.Module, seed: int) -> None:
    """Weights and statistics that no initialisation gives, so that a tensor left out is seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if "running_var" in name else value + 0.1 * noise)


def make_run(
    folder: Path, steps: tuple[int, ...] = (2, 4), best: int | tuple[int, ...] | None = 2, **sections: Any
) -> Path:
    """folder: the run's. steps: of its checkpoints. best: the step of the best one, or what it was at each checkpoint.
    sections: of the recipe."""
    made = recipe(**sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(made.to_yaml())
    (folder / "classes.json").write_text(
        json.dumps({"class_names": NAMES, "counts": COUNTS, "input_size": [3, 8, 8]}), encoding="utf-8"
    )
    net = build_net(made.net, made.views, len(COUNTS))
    method = create_method(net, torch.tensor(COUNTS), made.method)
    for number, step in enumerate(steps):
        best_then = best[number] if isinstance(best, tuple) else best
        randomize(method.net, step)
        if method.queue is not None:
            keys = torch.nn.functional.normalize(
                torch.randn(8, 4, generator=torch.Generator().manual_seed(step)), dim=1
            )
            method.queue.enqueue(keys, torch.arange(8) % 4)
        progress = Progress(epoch=step, step=step, seconds=7.0, best=50.0 if best else None, best_epoch=best_then)
        progress.best_checkpoint = f"step-{best_then:08d}" if best_then else None
        state = {
            "progress": asdict(progress),
            "recipe": made.to_dict(),
            "processes": 1,
            "method": {name: value for name, value in method.state_dict().items() if not name.startswith("net.")},
        }
        checkpoint.save(folder / "checkpoints", step, method.net.state_dict(), state)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"epoch": step, "step": step, "test/top1": 10.0 * step}) + "\n" for step in steps)
    )
    data = {
        "source": "digits",
        "train": {"name": "digits train", "rows": sum(COUNTS), "imbalance": 40.0, "sha256": "ab" * 32},
        "test": {"name": "digits test", "rows": 500, "imbalance": 1.0, "sha256": "cd" * 32},
    }
    environment = {
        "command": f"accelerate launch tools/train.py {HOME}/recipe.yaml",
        "packages": {"torch": torch.__version__},
        "gpus": [],
        "git": None,
        "processes": 1,
        "data": data,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def add_evaluation(run: Path, name: str, top1: float) -> None:
    split, which = name.split("-", 1)
    record = {
        "split": f"digits {split}",
        "images": 500,
        "checkpoint": which,
        "chosen": "epoch 4, not selected",
        "class_names": NAMES,
        "numbers": {"top1": top1, "many": 90.0, "medium": 60.0, "few": 21.5, "mean_class": top1, "ece": 4.25},
    }
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(record))
