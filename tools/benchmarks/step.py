r"""`step`: a whole training step, and inference, against plain ones.

    python tools/benchmark.py step                                     # ResNet-50 at 224, 1000 and 8142 classes
    python tools/benchmark.py step resnet50 --precision bf16 --channels-last --device cuda --json tools/benchmarks/
    python tools/benchmark.py step resnet32_cifar --classes 10 --per-class 64 --dim 32 --batch 128 \
        --precision bf16 --channels-last --compile true --capture --device cuda
    python tools/benchmark.py step resnet8_cifar --classes 10 100 --batch 32               # seconds on a CPU

A step is the trainer's: forward of two views, loss, backward, SGD with momentum, on eight-bit images that are on the
device already. All contenders start from the same weights and take turns; memory is what each holds at its peak, from
nothing to its fifth step: weights, momentum, queue, activations.
plain        Balanced Softmax on both views, the project's own, without a projector
rescom       ResCom, released mode, queue full
dense        the same with the yardstick of `head` instead of mining and queue; not with --capture

Aims, on a GPU: rescom at most 1.03 x the time and 1.05 x the memory of plain with ResNet-50 at 224 in bf16 and
channels_last, and at most 1.15 x the time with ResNet-32 at 32 pixels captured as a graph (--capture).

Inference: a plain timm model with the trained weights against the one that timm reads from our export; aim 1.00 +-
0.02 and the same logits. The difference from our own net's logits is given beside.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median_high
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from benchmarks.common import calls, clocked, common_arguments, heading, keep, machine, peak, positive
from benchmarks.head import POSITIVES, TEMPERATURE, Yardstick
from rescom_timm.config.recipe import OptimizerConfig, SpeedConfig
from rescom_timm.engine.build import build_optimizer, speed_up
from rescom_timm.engine.captured_step import CapturedStep
from rescom_timm.errors import InputError
from rescom_timm.inference.export import export
from rescom_timm.methods.baselines import BalancedSoftmax, BalancedSoftmaxConfig
from rescom_timm.methods.rescom import QueueConfig, ResCom, RescomConfig
from rescom_timm.models.net import Net, ProjectorConfig, check_backbone, create_model

Step = Callable[[], Tensor]
COMPILE = {"false": False, "true": True, "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}
WARM_UP = 5  # compiling, running as it is, recording a graph, replaying it


class DenseResCom(ResCom):
    """ResCom's released mode with the yardstick instead of mining and queue."""

    def __init__(self, net: Net, counts: Tensor, config: RescomConfig) -> None:
        super().__init__(net, counts, config)
        self.queue = Yardstick(len(counts), config.queue.per_class, self.queue.keys.shape[1])  # type: ignore[assignment]

    def contrast(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        yardstick = cast(Yardstick, self.queue)
        return yardstick.loss(embeddings, labels, self.weights[labels], cast(int, self.config.negatives))


CONTENDERS: dict[str, type[Any]] = {"plain": BalancedSoftmax, "rescom": ResCom, "dense": DenseResCom}


def contender(
    name: str, options: argparse.Namespace, classes: int, accelerator: Accelerator, batch: dict[str, Tensor]
) -> Step:
    """A function that does one step and gives its loss, detached."""
    torch.manual_seed(0)
    counts = torch.linspace(1000, 5, classes).long()
    net = create_model(options.backbone, classes, projector=ProjectorConfig(dim=options.dim))
    config = BalancedSoftmaxConfig(views=2) if name == "plain" else rescom_config(options, classes)
    method = CONTENDERS[name](net, counts, config).train()
    if name != "plain":
        keys = F.normalize(torch.randn(classes * options.per_class, options.dim), dim=1)
        method.queue.enqueue(keys, torch.arange(classes).repeat_interleave(options.per_class))
    method.to(accelerator.device)
    speed_up(net, SpeedConfig(channels_last=options.channels_last, compile=options.compile))
    method.net, optimizer = accelerator.prepare(net, build_optimizer(OptimizerConfig(lr=1e-3), net))

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss: Tensor = method(batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.detach()}

    whole = CapturedStep(step, optimizer, accelerator.device) if options.capture else step
    return lambda: whole(batch)["loss"]


def rescom_config(options: argparse.Namespace, classes: int) -> RescomConfig:
    """Raises ValueError where Q, Qn and K do not fit."""
    default = min(400 if classes <= 100 else 500, (classes - 1) * options.per_class)
    config = RescomConfig(
        negatives=options.negatives or default, positives=POSITIVES, temperature=TEMPERATURE,
        queue=QueueConfig(per_class=options.per_class),
    )  # fmt: skip
    return config.for_classes(classes)


def measure_steps(options: argparse.Namespace, classes: int) -> dict[str, Any]:
    """One row: milliseconds of a step (medians), megabytes, ratios to the plain one, calls, first losses."""
    torch.compiler.reset()  # what was compiled for other numbers of classes counts as recompiling otherwise
    accelerator = Accelerator(mixed_precision=options.precision, cpu=options.device == "cpu")
    shape = (options.batch, 2, 3, options.size, options.size)
    batch = {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=accelerator.device),
        "label": torch.randint(classes, (options.batch,), device=accelerator.device),
    }
    steps: dict[str, Step] = {}
    losses: dict[str, float] = {}
    megabytes: dict[str, float] = {}

    def begin(name: str) -> None:
        steps[name] = contender(name, options, classes, accelerator, batch)
        losses[name], *_ = (float(steps[name]()) for _ in range(WARM_UP))

    contenders = [name for name in CONTENDERS if name != "dense" or not options.capture]  # it waits for the device
    for name in ("plain", *contenders):  # the first one meets what libraries allocate once and keep
        steps.pop(name, None)
        accelerator.free_memory()
        megabytes[name] = peak(partial(begin, name), options.device) / 1e6
    if not options.capture and abs(losses["rescom"] - losses["dense"]) > 1e-2 * abs(losses["dense"]):
        raise RuntimeError(f"yardstick and package disagree: {losses}")
    milliseconds = in_turn(steps, options)
    countable = options.device != "cpu" or not options.compile  # a compiled net cannot be counted on a CPU
    counted = {name: calls(step, options.device) for name, step in steps.items() if countable}
    accelerator.free_memory()
    return {
        "classes": classes, "per_class": options.per_class, "negatives": rescom_config(options, classes).negatives,
        "losses": losses,
        "milliseconds": milliseconds, "over_plain": over(milliseconds, "plain"),
        "megabytes": megabytes, "memory_over_plain": over(megabytes, "plain"),
        "calls": {name: both[0] for name, both in counted.items()},
        "synchronisations": {name: both[1] for name, both in counted.items()},
    }  # fmt: skip


def measure_inference(options: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Milliseconds of a batch (medians) and the largest differences of logits.

    Raises ValueError for a backbone that cannot be exported.
    """
    device, size = torch.device(options.device), options.size
    torch.manual_seed(0)
    net = create_model(options.backbone, classes)
    with torch.no_grad():
        net.train()(torch.randn(4, 3, size, size))  # so that running statistics are no longer a fresh model's
    plain = net.to_timm()
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, [str(k) for k in range(classes)], (3, size, size))
        exported = timm.create_model(f"local-dir:{folder}", pretrained=True)
    x = torch.randn(options.batch, 3, size, size, device=device)
    for model in (net, plain, exported):
        model.to(device).eval()
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision is not None):
        milliseconds = in_turn({"plain": partial(plain, x), "exported": partial(exported, x)}, options)
        logits = exported(x)
        difference, from_net = (float((logits - other).abs().max()) for other in (plain(x), net(x).logits))
    return {
        "classes": classes, "milliseconds": milliseconds, "over_plain": over(milliseconds, "plain"),
        "difference_of_logits": difference, "difference_from_net": from_net,
    }  # fmt: skip


def in_turn(steps: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each. A turn is --steps of them, so that the host may run ahead as in training."""
    times: dict[str, list[float]] = {name: [] for name in steps}

    def several(step: Step) -> None:
        for _ in range(options.steps):
            step()

    for turn in range(options.repetitions + 1):
        for name, step in steps.items():
            taken = clocked(partial(several, step), options.device) / options.steps
            if turn:  # the first warms up
                times[name].append(taken)
    return {name: median_high(values) for name, values in times.items()}


def over(values: dict[str, float], name: str) -> dict[str, float]:
    return {key: value / values[name] for key, value in values.items()}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", nargs="?", default="resnet50", help="any name of timm.list_models(); resnet50")
    parser.add_argument("--size", type=positive, help="pixels of the square images; the backbone's by default")
    parser.add_argument("--classes", nargs="+", type=positive, default=[1000, 8142], help="K")
    parser.add_argument("--per-class", type=positive, default=4, help="Q")
    parser.add_argument("--negatives", type=positive, help="Qn; default 400 up to 100 classes, 500 above")
    parser.add_argument("--dim", type=positive, default=128, help="D")
    parser.add_argument("--batch", type=positive, help="images, of two views each; default 128 on a GPU, 8 on a CPU")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", default="false", choices=list(COMPILE), help="as speed.compile of a recipe")
    parser.add_argument("--capture", action="store_true", help="the whole step as one CUDA graph: speed.capture")
    parser.add_argument("--steps", type=positive, help="of one turn, in a row; default 10 on a GPU, 1 on a CPU")
    common_arguments(parser, repetitions=15)


def run(options: argparse.Namespace) -> int:
    check_backbone(options.backbone)
    gpu = options.device == "cuda"
    if options.precision == "fp16" and not gpu:
        raise InputError("usage.arguments", "--precision fp16 does nothing on a CPU; use bf16 or no")
    options.size = options.size or timm.get_pretrained_cfg(options.backbone.split(".")[0]).input_size[-1]
    options.batch = options.batch or (128 if gpu else 8)
    options.compile = COMPILE[options.compile]
    options.steps = options.steps or (10 if gpu else 1)
    for classes in options.classes:
        rescom_config(options, classes)  # errors come before minutes are spent
    about = {
        **machine(options.device),
        **{key: getattr(options, key) for key in ("backbone", "size", "batch", "dim", "precision", "channels_last",
                                                  "compile", "capture", "steps", "repetitions")},
    }  # fmt: skip
    print(f"{heading(about)}, timm {about['timm']}, {about['date']}\n# {options.backbone}, {options.batch} images of "
          f"{options.size} x {options.size} in two views, precision {options.precision}, channels_last "
          f"{options.channels_last}, compile {options.compile}, capture {options.capture};\n"
          f"# medians of {options.repetitions} turns")  # fmt: skip
    rows, inference = [], []
    for classes in options.classes:
        inference.append(exported := measure_inference(options, classes))
        rows.append(row := measure_steps(options, classes))
        print(f"K = {classes}, Q = {row['per_class']}, Qn = {row['negatives']}")
        print(f"    {'':<10}{'ms':>10}{'x plain':>9}{'MB':>10}{'x plain':>9}{'calls':>8}{'syncs':>7}")
        for name, taken in row["milliseconds"].items():
            print(f"    {name:<10}{taken:>10.2f}{row['over_plain'][name]:>9.3f}{row['megabytes'][name]:>10.1f}"
                  f"{row['memory_over_plain'][name]:>9.3f}{row['calls'].get(name, '-'):>8}"
                  f"{row['synchronisations'].get(name, '-'):>7}")  # fmt: skip
        print(f"    inference {exported['milliseconds']['plain']:.2f} ms, of the exported model "
              f"{exported['over_plain']['exported']:.3f} x; its logits differ by {exported['difference_of_logits']:g}, "
              f"from our net's by {exported['difference_from_net']:g}", flush=True)  # fmt: skip
    keep(options, f"step-{options.backbone}", {**about, "rows": rows, "inference": inference})
    return 0
