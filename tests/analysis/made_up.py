"""Small made-up run folders, as the trainer writes them, without any training."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rescom_timm.analysis import robustness
from rescom_timm.analysis.robustness import Robustness, Setting
from rescom_timm.metrics import Meter

RECIPE = """\
# a recipe & its <header>
seed: {seed}
method:
  name: rescom
net:
  backbone: resnet32_cifar
train:
  epochs: {epochs}
"""


def long_tail(num_classes: int, most: int, imbalance: float) -> list[int]:
    return [int(most * imbalance ** (-k / max(num_classes - 1, 1))) for k in range(num_classes)]


def make_run(
    path: Path,
    counts: Sequence[int],
    class_names: Sequence[str] | None = None,
    per_class: int = 20,
    epochs: int = 12,
    seed: int = 0,
    skill: float = 1.0,
    evaluation: str = "test-last",
) -> Path:
    """A run whose net knows frequent classes better; returns the folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(RECIPE.format(seed=seed, epochs=epochs), encoding="utf-8")
    (path / "environment.json").write_text(json.dumps({"torch": "2.x <tag>", "git": {"commit": "abc"}}))
    with (path / "metrics.jsonl").open("w") as file:
        for epoch in range(epochs):
            lr = 0.1 * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
            row = {"epoch": epoch, "step": 10 * (epoch + 1), "lr": lr, "images_per_second": 900.0}
            row |= {"train/loss": 2 * np.exp(-epoch / 5) + 0.1 * seed, "train/top1": 90 * (1 - np.exp(-epoch / 4))}
            file.write(json.dumps(row) + "\n")
            if epoch % 3 == 2:
                tested = {name: level * (1 - np.exp(-epoch / 4)) for name, level in
                          (("top1", 70), ("many", 80), ("medium", 60), ("few", 40 + 5 * seed))}  # fmt: skip
                row = {"epoch": epoch, "step": 10 * (epoch + 1), **{f"test/{name}": v for name, v in tested.items()}}
                file.write(json.dumps(row) + "\n")
    add_evaluation(path, counts, class_names, per_class, seed, skill, evaluation)
    robustness.write(robustness.path_of(path, "test", "last"), made_up_errors(path.name, 10.0 * seed), {})
    return path


def made_up_errors(run: str = "run", more: float = 0.0, kinds: Sequence[str] = ("fog", "contrast")) -> Robustness:
    """Errors that rise with the severity."""
    errors = {
        kind: [20.0 + 5 * severity + index + more for severity in range(1, 6)] for index, kind in enumerate(kinds)
    }
    groups = {"few": {kind: [value + 10 for value in values] for kind, values in errors.items()}}
    setting = Setting("made up test", 160, "made up", 0)
    clean = {"top1": 20.0 + more, "few": 30.0 + more}
    return Robustness(run, "last", "the last epoch", "abc", setting, clean, errors, groups)


def add_evaluation(
    path: Path,
    counts: Sequence[int],
    class_names: Sequence[str] | None,
    per_class: int = 20,
    seed: int = 0,
    skill: float = 1.0,
    evaluation: str = "test-last",
) -> None:
    k = len(counts)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(k).repeat_interleave(per_class)
    logits = torch.randn(len(labels), k, generator=generator)
    prior = torch.tensor(counts, dtype=torch.float).clamp(min=1).log()
    logits += 0.6 * (prior - prior.mean())
    logits[torch.arange(len(labels)), labels] += skill * (2.5 + 0.3 * np.log(k))
    meter = Meter(k, counts)
    meter.update(1.5 * logits, labels)
    folder = path / "evaluation"
    folder.mkdir(exist_ok=True)
    about = {"split": "made up test", "checkpoint": "last", "chosen": "the last epoch"}
    names = list(class_names) if class_names else [f"class {c}" for c in range(k)]
    (folder / f"{evaluation}.json").write_text(json.dumps({**about, "class_names": names, **meter.record()}))
    save_file(meter.predictions(), folder / f"{evaluation}.safetensors")
