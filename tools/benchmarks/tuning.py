"""`tuning`: a training step of one ViT with all, few and none of its weights trained.

    python tools/benchmark.py tuning                                   # ViT-S at 224, 100 classes
    python tools/benchmark.py tuning vit_base_patch16_224 --precision bf16 --device cuda --json tools/benchmarks/

Balanced Softmax on one view with SGD and momentum, eight-bit images that are on the device already. The contenders take
turns; memory is what each holds at its peak, from nothing to its second step: weights, momentum, activations.
full                  every weight trains
full, checkpointing   the same with speed.grad_checkpointing
lora, adaptformer, prompt   net.tuning over frozen weights, LIFT's rank
head                  the classifier alone
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.common import common_arguments, heading, keep, machine, peak, positive
from benchmarks.step import in_turn, over
from rescom_timm.config.recipe import OptimizerConfig, SpeedConfig
from rescom_timm.data.config import ViewsConfig
from rescom_timm.engine.build import build_net, build_optimizer, speed_up
from rescom_timm.methods.baselines import BalancedSoftmax, BalancedSoftmaxConfig
from rescom_timm.models.net import NetConfig, check_backbone
from rescom_timm.models.trainable import count_weights
from rescom_timm.models.tuning import TuningConfig

Step = Callable[[], Tensor]
CONTENDERS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {},
    "lora": {"tuning": TuningConfig("lora")},
    "adaptformer": {"tuning": TuningConfig("adaptformer")},
    "prompt": {"tuning": TuningConfig("prompt")},
    "head": {"trainable": ("none",)},
}


def contender(
    name: str, options: argparse.Namespace, accelerator: Accelerator, batch: dict[str, Tensor], trained: dict[str, int]
) -> Step:
    """A function that does one step and gives its loss, detached."""
    torch.manual_seed(0)
    config = replace(NetConfig(options.backbone, options={"img_size": options.size}), **CONTENDERS[name])
    net = build_net(config, ViewsConfig(), options.classes)
    method = BalancedSoftmax(net, torch.linspace(1000, 5, options.classes).long(), BalancedSoftmaxConfig(views=1))
    method.train().to(accelerator.device)
    trained[name] = count_weights(net)["trained"]
    speed_up(net, SpeedConfig(grad_checkpointing="checkpointing" in name))
    method.net, optimizer = accelerator.prepare(net, build_optimizer(OptimizerConfig(lr=1e-3), net))

    def step() -> Tensor:
        loss: Tensor = method(batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step (medians), megabytes, trained weights, ratios to full."""
    accelerator = Accelerator(mixed_precision=options.precision, cpu=options.device == "cpu")
    shape = (options.batch, 1, 3, options.size, options.size)
    batch = {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=accelerator.device),
        "label": torch.randint(options.classes, (options.batch,), device=accelerator.device),
    }
    steps: dict[str, Step] = {}
    trained: dict[str, int] = {}
    megabytes: dict[str, float] = {}

    def begin(name: str) -> None:
        steps[name] = contender(name, options, accelerator, batch, trained)
        for _ in range(2):
            steps[name]()

    for name in ("full", *CONTENDERS):  # the first one meets what libraries allocate once and keep
        steps.pop(name, None)
        accelerator.free_memory()
        megabytes[name] = peak(partial(begin, name), options.device) / 1e6
    milliseconds = in_turn(steps, options)
    return {
        "trained": trained, "milliseconds": milliseconds, "over_full": over(milliseconds, "full"),
        "megabytes": megabytes, "memory_over_full": over(megabytes, "full"),
    }  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", nargs="?", default="vit_small_patch16_224", help="a ViT of timm's")
    parser.add_argument("--size", type=positive, default=224, help="pixels of the square images")
    parser.add_argument("--classes", type=positive, default=100, help="K")
    parser.add_argument("--batch", type=positive, help="images; default 128 on a GPU, 8 on a CPU")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--steps", type=positive, help="of one turn, in a row; default 10 on a GPU, 1 on a CPU")
    common_arguments(parser, repetitions=7)


def run(options: argparse.Namespace) -> int:
    check_backbone(options.backbone)
    gpu = options.device == "cuda"
    options.batch, options.steps = options.batch or (128 if gpu else 8), options.steps or (10 if gpu else 1)
    keys = ("backbone", "size", "classes", "batch", "precision", "steps", "repetitions")
    about = {**machine(options.device), **{key: getattr(options, key) for key in keys}}
    print(f"{heading(about)}, timm {about['timm']}, {about['date']}\n# {options.backbone}, {options.batch} images of "
          f"{options.size} x {options.size}, {options.classes} classes, precision {options.precision}; medians of "
          f"{options.repetitions} turns")  # fmt: skip
    row = measure(options)
    print(f"{'':<22}{'trained':>12}{'ms':>10}{'x full':>8}{'MB':>9}{'x full':>8}")
    for name, taken in row["milliseconds"].items():
        print(f"{name:<22}{row['trained'][name]:>12,}{taken:>10.1f}{row['over_full'][name]:>8.2f}"
              f"{row['megabytes'][name]:>9.0f}{row['memory_over_full'][name]:>8.2f}")  # fmt: skip
    keep(options, f"tuning-{options.backbone}", {**about, **row})
    return 0
