"""`step`: a whole training step and inference, against plain ones.

    python tools/benchmark.py step resnet50 --classes 1000 8142 --precision bf16 --channels-last --device cuda
    python tools/benchmark.py step resnet32_cifar --classes 10 --per-class 64 --compile reduce-overhead --device cuda

A step is the trainer's: forward of two views, loss, backward, SGD, on eight-bit images that are on the device already.
plain                Balanced Softmax on both views; our aims in its terms, on a GPU: ResCom at most 1.03 of its time
                     and 1.05 of its memory with ResNet-50 at 224 (bf16, channels_last), 1.15 with a captured ResNet-32
rescom               the released mode
dense                the same with the yardstick of `head` in the place of mining and queue
It ends with inference: the exported model against a plain timm model of the same weights (1.00, logits equal).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarking.common import calls, clocked, common_arguments, keep, machine, peak
from benchmarking.head import Yardstick
from rescom_timm.methods.baselines import BalancedSoftmax, BalancedSoftmaxConfig
from rescom_timm.methods.rescom import QueueConfig, ResCom, RescomConfig
from rescom_timm.nets.net import Net, check_backbone, create_model
from rescom_timm.runs.build import speed_up
from rescom_timm.runs.recipe import SpeedConfig


class DenseResCom(ResCom):
    """ResCom's released mode with the yardstick in the place of mining and queue."""

    def __init__(self, net: Net, counts: Tensor, config: RescomConfig) -> None:
        super().__init__(net, counts, config)
        self.yardstick = Yardstick(len(counts), config.queue.per_class, self.queue.keys.shape[1])
        self.queue.enqueue = self.yardstick.enqueue  # type: ignore[method-assign]

    def contrast(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.yardstick.loss(embeddings, labels, self.weights[labels], cast(int, self.config.negatives))


def measure_step(options: argparse.Namespace, classes: int) -> dict[str, Any]:
    """One row: milliseconds of a step (medians), ratios to the plain one, memory, calls, and the same of inference."""
    check_backbone(options.backbone)
    size = options.size or timm.get_pretrained_cfg(options.backbone.split(".")[0]).input_size[-1]
    negatives = min(options.negatives, (classes - 1) * options.per_class)
    counts = torch.linspace(1000, 5, classes).long()
    rescom = RescomConfig(negatives=negatives, queue=QueueConfig(per_class=options.per_class))
    accelerator = Accelerator(mixed_precision=options.precision, cpu=options.device == "cpu")
    images = torch.randint(0, 256, (options.batch, 2, 3, size, size), dtype=torch.uint8, device=accelerator.device)
    batch = {"image": images, "label": torch.randint(classes, (options.batch,), device=accelerator.device)}
    steps: dict[str, Callable[[], object]] = {}
    methods: dict[str, Any] = {}
    config: Any
    for name, kind, config in (
        ("plain", BalancedSoftmax, BalancedSoftmaxConfig(views=2)), ("rescom", ResCom, rescom),
        ("dense", DenseResCom, rescom),
    ):  # fmt: skip
        torch.manual_seed(0)
        method = kind(create_model(options.backbone, classes), counts, config).train()
        keys = F.normalize(torch.randn(classes * options.per_class, 128), dim=1)
        if isinstance(method, ResCom):
            method.queue.enqueue(keys, torch.arange(classes).repeat_interleave(options.per_class))
        methods[name] = method.to(accelerator.device)
        speed_up(method.net, SpeedConfig(channels_last=options.channels_last, compile=options.compile))
        optimizer = torch.optim.SGD(method.net.parameters(), 1e-3, momentum=0.9)
        method.net, optimizer = accelerator.prepare(method.net, optimizer)
        steps[name] = partial(_train_step, accelerator, method, optimizer, batch)
    losses = {name: float(step()) for name, step in steps.items()}  # type: ignore[arg-type]
    if abs(losses["rescom"] - losses["dense"]) > 1e-2 * abs(losses["dense"]):
        raise RuntimeError(f"yardstick and package disagree: {losses}")
    milliseconds = _in_turn(steps, options)
    memory = {name: (_held(methods[name]) + peak(step, options.device)) / 1e6 for name, step in steps.items()}
    counted = {name: calls(step, options.device) for name, step in steps.items()}
    exported = accelerator.unwrap_model(methods["rescom"].net).to_timm().to(accelerator.device)
    plain = timm.create_model(options.backbone, num_classes=classes).eval().to(accelerator.device)
    plain.load_state_dict(exported.state_dict())
    x = torch.randn(options.batch, 3, size, size, device=accelerator.device)
    with torch.inference_mode():
        difference = float((plain(x) - exported(x)).abs().max())
        inference = _in_turn({"plain": lambda: plain(x), "exported": lambda: exported(x)}, options)
    accelerator.free_memory()
    return {
        "backbone": options.backbone, "size": size, "classes": classes, "per_class": options.per_class,
        "negatives": negatives, "batch": options.batch, "precision": options.precision,
        "channels_last": options.channels_last, "compile": options.compile, "losses": losses,
        "milliseconds": milliseconds, "over_plain": {k: v / milliseconds["plain"] for k, v in milliseconds.items()},
        "megabytes": memory, "memory_over_plain": {k: v / memory["plain"] for k, v in memory.items()},
        "calls": {name: both[0] for name, both in counted.items()},
        "synchronisations": {name: both[1] for name, both in counted.items()},
        "inference_milliseconds": inference, "inference_over_plain": inference["exported"] / inference["plain"],
        "largest_difference_of_logits": difference,
    }  # fmt: skip


def _train_step(accelerator: Accelerator, method: Any, optimizer: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = method(batch)["loss"]
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _held(method: nn.Module) -> int:
    """Bytes of weights, their momentum and buffers between two steps."""
    weights = 2 * sum(weight.numel() * weight.element_size() for weight in method.parameters())
    return weights + sum(buffer.numel() * buffer.element_size() for buffer in method.buffers())


def _in_turn(steps: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each, which take turns; the first three turns warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.repetitions + 3):
        for name, step in steps.items():
            taken = clocked(step, options.device)
            if turn >= 3:
                times[name].append(taken)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", help="any name of timm.list_models()")
    parser.add_argument("--size", type=int, help="pixels of the square images; the backbone's by default")
    parser.add_argument("--classes", nargs="+", type=int, default=[1000, 8142])
    parser.add_argument("--per-class", type=int, default=4, help="Q")
    parser.add_argument("--negatives", type=int, default=500, help="Qn, at most (K-1)Q")
    parser.add_argument("--batch", type=int, default=64, help="images, of two views each")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", default="false", help="true, false or a mode, as speed.compile")
    common_arguments(parser, repetitions=15)


def run(options: argparse.Namespace) -> int:
    if options.compile in ("true", "false"):
        options.compile = options.compile == "true"
    about = machine(options.device)
    print(f"# {about['device']}, torch {about['torch']}, {about['date']}; {options.backbone}, {options.batch} images "
          f"of two views, precision {options.precision}; milliseconds, medians of {options.repetitions}")  # fmt: skip
    rows = []
    for classes in options.classes:
        row = measure_step(options, classes)
        rows.append(row)
        print(f"K = {classes}, Q = {row['per_class']}, Qn = {row['negatives']}")
        for name, taken in row["milliseconds"].items():
            print(f"    {name:<8} {taken:>9.1f} ms {row['over_plain'][name]:>6.3f} x {row['megabytes'][name]:>9.0f} MB "
                  f"{row['memory_over_plain'][name]:>6.3f} x {row['calls'][name]:>7} calls "
                  f"{row['synchronisations'][name]:>5} synchronisations")  # fmt: skip
        print(f"    inference of the exported model {row['inference_over_plain']:.3f} x of timm's, largest difference "
              f"of logits {row['largest_difference_of_logits']:g}", flush=True)  # fmt: skip
    keep(options, "step", {**about, "rows": rows})
    return 0
