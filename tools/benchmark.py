"""Measure the speed and memory of parts, side by side in one run.

    python tools/benchmark.py head                                   # the table of sizes, on one CPU core: minutes
    python tools/benchmark.py head --sizes 1000x4 --views 64 --json head.json
    python tools/benchmark.py head --device cuda --json tools/benchmarks/
    python tools/benchmark.py loader --source ../shared/cifar10 -o tools/benchmarks/
    python tools/benchmark.py step resnet50 --classes 1000 8142 --precision bf16 --channels-last --device cuda
    python tools/benchmark.py step resnet32_cifar --classes 10 --per-class 64 --compile reduce-overhead --device cuda
    python tools/benchmark.py loop recipes/cifar10_lt_if100_r32.yaml speed.compile=reduce-overhead --steps 300
    python tools/benchmark.py startup recipes/digits_lt.yaml recipes/cifar10_lt_if100_r32.yaml

`head` is the contrastive part of a step, embeddings given: pairs, mining, loss, backward, enqueue (released mode).
yardstick    a straightforward dense form: index tensors, gathers, all similarities kept for backward, keys entering
             one by one
pairs        rescom_timm.contrast, put together from pairs: the definition
mined        rescom_timm.contrast.mined, all queries at once; mined/c, in chunks
floor        one (N x S) product and torch.topk over it (no loss, no gradient, nothing else); floor-u with sorted=False

Contenders take turns on the same new batch; figures are medians. On a CPU with one thread the clock counts this
process's CPU time, so that others on the machine disturb less. Embeddings are random unit vectors.

Tried for `mined` on a CPU and not worth it (one core, 512 views, S = 4000 unless said otherwise; topk itself 16 ms):
two-level top-k below S = 12 Qn (19 ms against 17); masking or clamping what is below the least group maximum before
topk (21 to 25); topk on floats (25; on their bits as integers 17); kthvalue (32); sort (150); groups as large as a
class, maxima along the last dimension (17 ms against 3 for strided groups at S = 32568); chunks of 16 queries (up to
2 times slower, the calls dominate); embedding_bag where S < 3 (Qp + Qn) (2 to 4 ms against 1.3 of a dense product).

`loader` is one core's way from encoded images to a batch of two views.
plain                the same policy of torchvision and timm over PIL, ToTensor, Normalize, default_collate;
                     plain, eight bits: without ToTensor and Normalize, which we leave to the device
image by image       ours with Pillow's steps, one image after the other (speed.batched=false, speed.cache=0)
batched              ours over whole batches, Pillow's pixels; batched, cached: images decoded once, at the start
planes               ours, one image after the other in NumPy where that is faster, Pillow's pixels; near resize, with
                     torch's resize (loader.near_resize)
for the device       decoding and the policy's first steps; the rest is done on the device (loader.device_views)

`step` is a whole training step as the trainer does it: forward of two views, loss, backward, SGD, on eight-bit images
that are on the device already.
plain                Balanced Softmax on both views; our aims in its terms, on a GPU: ResCom at most 1.03 of its time
                     and 1.05 of its memory with ResNet-50 at 224 (bf16, channels_last), 1.15 with a captured ResNet-32
rescom               the released mode; dense, with the yardstick above in its place
It ends with inference: the exported model against a plain timm model of the same weights (1.00, logits equal).

`loop` runs the trainer's own steps of a recipe, with its loader and then without (one batch again and again): images a
second, the share of time lost to loading, and how long the whole recipe would take.

`startup` is the time from the start of a process to the end of its first training step.
"""

from __future__ import annotations

import argparse
import datetime
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset as HuggingFaceDataset
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

from rescom_timm.contrast.losses import balanced_softmax
from rescom_timm.contrast.mined import composed, mined_supcon
from rescom_timm.contrast.queue import ClassBalancedQueue
from rescom_timm.data.loaders import LoaderConfig, SpeedConfig, finish_views, train_loader
from rescom_timm.data.sources import DataConfig, Split, load
from rescom_timm.data.views import CIFAR_MEAN, CIFAR_STD, ViewsConfig, decode, parse
from rescom_timm.methods.baselines import BalancedSoftmax, BalancedSoftmaxConfig
from rescom_timm.methods.rescom import QueueConfig, ResCom, RescomConfig
from rescom_timm.nets.net import Net, check_backbone, create_model
from rescom_timm.runs.build import build_method, speed_up
from rescom_timm.runs.launch import launch
from rescom_timm.runs.recipe import SpeedConfig as TrainSpeed
from rescom_timm.runs.recipe import load as load_recipe
from rescom_timm.runs.trainer import Trainer

SIZES = ["10x64", "100x8", "365x8", "1000x4", "1000x8", "8142x4", "8142x8"]
TEMPERATURE, POSITIVES = 0.2, 1
Step = Callable[[Tensor, Tensor], Tensor | None]


class Yardstick(nn.Module):
    """What one would write first. Its index tensor alone is K x (K-1)Q int64."""

    keys: Tensor
    pointer: Tensor
    own: Tensor
    others: Tensor

    def __init__(self, classes: int, per_class: int, dim: int) -> None:
        super().__init__()
        slots = torch.arange(classes * per_class)
        others = torch.empty(classes, (classes - 1) * per_class, dtype=torch.long)
        for k in range(classes):
            others[k, : k * per_class] = slots[: k * per_class]
            others[k, k * per_class :] = slots[(k + 1) * per_class :]
        self.register_buffer("keys", torch.zeros(len(slots), dim))
        self.register_buffer("pointer", torch.zeros(classes, dtype=torch.long))
        self.register_buffer("own", slots.view(classes, per_class))
        self.register_buffer("others", others)

    def loss(self, z: Tensor, labels: Tensor, weights: Tensor, negatives: int) -> Tensor:
        similarity = z @ self.keys.clone().T / TEMPERATURE
        positive = -torch.topk(-similarity.gather(1, self.own[labels]), POSITIVES, dim=1).values
        negative = torch.topk(similarity.gather(1, self.others[labels]), negatives, dim=1).values
        other = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = torch.cat([z @ z.T / TEMPERATURE, positive, negative], dim=1)
        same = ((labels[:, None] == labels) & other).float()
        mask = torch.cat([same, torch.ones_like(positive), torch.zeros_like(negative)], dim=1)
        valid = torch.cat([other.float(), torch.ones_like(positive), torch.ones_like(negative)], dim=1)
        logits = logits - logits.max(dim=1, keepdim=True).values.detach()
        log_p = logits - ((logits.exp() * valid).sum(dim=1, keepdim=True)).log()
        return (-(mask * log_p).sum(dim=1) / mask.sum(dim=1) * weights).mean()

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor) -> None:
        per_class = self.own.shape[1]
        for key, label in zip(keys, labels, strict=True):
            turn = int(self.pointer[label])
            self.keys[self.own[label, turn]] = key
            self.pointer[label] = (turn + 1) % per_class


class Head:
    """The contenders at one size, over queues that hold the same keys."""

    def __init__(self, classes: int, per_class: int, dim: int, negatives: int, chunk: int, device: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.classes, self.dim, self.negatives, self.device = classes, dim, negatives, device
        keys = F.normalize(torch.randn(classes * per_class, dim, generator=self.generator), dim=1)
        labels = torch.arange(classes).repeat_interleave(per_class)
        self.weights = torch.rand(classes, generator=self.generator).to(device)
        self.yardstick = Yardstick(classes, per_class, dim)
        self.yardstick.keys.copy_(keys)
        self.yardstick.to(device)
        self.queue = ClassBalancedQueue(classes, per_class, dim)
        self.queue.enqueue(keys, labels)
        self.queue.to(device)
        self.contenders: dict[str, Step] = {
            "yardstick": self._with_yardstick,
            "pairs": self._with_pairs,
            "mined": lambda z, y: self._with_mined(z, y, None),
            "mined/c": lambda z, y: self._with_mined(z, y, chunk),
            "floor": lambda z, y: self._floor(z, True),
            "floor-u": lambda z, y: self._floor(z, False),
        }

    def batch(self, views: int) -> tuple[Tensor, Tensor]:
        z = F.normalize(torch.randn(views, self.dim, generator=self.generator), dim=1)
        labels = torch.randint(self.classes, (views // 2,), generator=self.generator).repeat(2)
        return z.to(self.device), labels.to(self.device)

    def _with_yardstick(self, z: Tensor, y: Tensor) -> Tensor:
        loss = self.yardstick.loss(z, y, self.weights[y], self.negatives)
        loss.backward()
        self.yardstick.enqueue(z.detach()[: len(z) // 2], y[: len(y) // 2])
        return loss.detach()

    def _with_pairs(self, z: Tensor, y: Tensor) -> Tensor:
        loss = composed(z, y, self.queue, POSITIVES, self.negatives, TEMPERATURE, self.weights[y], z, y)
        loss.backward()
        self.queue.enqueue(z.detach()[: len(z) // 2], y[: len(y) // 2])
        return loss.detach()

    def _with_mined(self, z: Tensor, y: Tensor, chunk: int | None) -> Tensor:
        loss = mined_supcon(
            z, y, self.queue, POSITIVES, self.negatives, TEMPERATURE, self.weights[y], keys=z, key_labels=y, chunk=chunk
        )
        loss.backward()
        self.queue.enqueue(z.detach()[: len(z) // 2], y[: len(y) // 2])
        return loss.detach()

    def _floor(self, z: Tensor, in_order: bool) -> None:
        (z.detach() @ self.queue.keys.T).topk(self.negatives, dim=1, sorted=in_order)


def measure_head(
    classes: int, per_class: int, views: int, dim: int, negatives: int, chunk: int, repetitions: int, device: str,
    features: int,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table: milliseconds (medians), ratios, calls, bytes."""
    head = Head(classes, per_class, dim, negatives, chunk, device)
    z, y = head.batch(views)
    losses = {name: step(z.clone().requires_grad_(), y) for name, step in head.contenders.items()}  # warm-up, check
    found = [float(loss) for name, loss in losses.items() if loss is not None and name in ("yardstick", "pairs")]
    if abs(found[0] - found[1]) > 1e-3 * abs(found[0]):
        raise RuntimeError(f"yardstick and package disagree: {losses}")
    times: dict[str, list[float]] = {name: [] for name in head.contenders}
    for _ in range(repetitions):
        z, y = head.batch(views)
        for name, step in head.contenders.items():
            leaf = z.clone().requires_grad_()
            times[name].append(clocked(partial(step, leaf, y), device))
    milliseconds = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    least = {name: min(values) for name, values in times.items()}
    leaf = z.clone().requires_grad_()
    complete = {name: step for name, step in head.contenders.items() if not name.startswith("floor")}
    counts = {name: calls(partial(step, leaf, y), device) for name, step in complete.items()}
    state = sum(t.numel() * t.element_size() for t in head.queue.state_dict().values())
    return {
        "classes": classes, "per_class": per_class, "views": views, "dim": dim, "positives": POSITIVES,
        "negatives": negatives, "chunk": chunk, "milliseconds": milliseconds, "least": least,
        "yardstick_over_mined": milliseconds["yardstick"] / min(milliseconds["mined"], milliseconds["mined/c"]),
        "mined_over_floor": min(milliseconds["mined"], milliseconds["mined/c"]) / milliseconds["floor"],
        "mined_over_floor_unsorted": min(milliseconds["mined"], milliseconds["mined/c"]) / milliseconds["floor-u"],
        "calls": {name: both[0] for name, both in counts.items()},
        "synchronisations": {name: both[1] for name, both in counts.items()},
        "state_over_keys": state / (classes * per_class * dim * 4),
        "yardstick_state_over_keys": sum(t.numel() * t.element_size() for t in head.yardstick.buffers())
        / (classes * per_class * dim * 4),
        "peak_over_plain": peaks(head, z, y, features, device),
    }  # fmt: skip


def clocked(step: Callable[[], object], device: str) -> float:
    """Milliseconds of one step."""
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    step()
    return 1e3 * (clock() - begun)


class _Calls(TorchDispatchMode):
    """Counts calls that compute (not views, not allocations) and those that give data to the host."""

    to_host = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero", "item")
    allocate = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.number = self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.number += not (func.is_view or name in self.allocate)
        self.synchronisations += name in self.to_host
        return func(*args, **(kwargs or {}))


def calls(step: Callable[[], object], device: str) -> tuple[int, int]:
    """(launches, host synchronisations) of a step; on a CPU the calls of torch that would launch or synchronise."""
    if not device.startswith("cuda"):
        with _Calls() as counted:
            step()
        return counted.number, counted.synchronisations
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    launched = sum("LaunchKernel" in event.key and event.count or 0 for event in profiler.key_averages())
    return launched, sum("synchroniz" in str(one.message) for one in heard)


def peaks(head: Head, z: Tensor, y: Tensor, features: int, device: str) -> dict[str, float]:
    """MB (10^6 bytes) that each contender's head needs at its peak above the plain one (linear, Balanced Softmax,
    backward). The contrastive loss is taken first: its temporaries are gone when the logits come."""
    linear = nn.Linear(features, head.classes).to(device)
    counts = torch.ones(head.classes, device=device)
    x = torch.randn(len(z), features, device=device)

    def plain() -> None:
        balanced_softmax(linear(x), y, counts).backward()

    def whole(step: Step) -> None:
        step(z.clone().requires_grad_(), y)
        plain()

    plain()
    base = peak(plain, device)
    complete = {name: step for name, step in head.contenders.items() if not name.startswith("floor")}
    return {name: (peak(partial(whole, step), device) - base) / 1e6 for name, step in complete.items()}


def peak(step: Callable[[], object], device: str) -> int:
    """Bytes that a step holds at its peak above what is held before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def machine(device: str) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "allocator": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def head_command(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = machine(options.device)
    print(f"# {about['device']}, {about['threads']} thread(s) of {about['cores']} cores, load {about['load']}, torch "
          f"{about['torch']}, {about['date']}; milliseconds, medians of {options.repetitions}")  # fmt: skip
    names = ["yardstick", "pairs", "mined", "mined/c", "floor", "floor-u"]
    columns = [*names, "yard/mined", "mined/floor", "calls", "syncs", "MB", "MB/c", "MB yard"]
    print(f"{'K':>5} {'Q':>3} {'views':>5} {'Qn':>4} " + " ".join(f"{column:>11}" for column in columns))
    rows = []
    for size in options.sizes:
        classes, per_class = (int(number) for number in size.split("x"))
        negatives = options.negatives or (400 if classes <= 100 else 500)
        negatives = min(negatives, (classes - 1) * per_class)
        for views in options.views:
            row = measure_head(classes, per_class, views, options.dim, negatives, options.chunk, options.repetitions,
                               options.device, options.features)  # fmt: skip
            rows.append(row)
            ms, over = row["milliseconds"], row["peak_over_plain"]
            figures = [*(ms[name] for name in names), row["yardstick_over_mined"], row["mined_over_floor"]]
            counted = row["calls"]["mined"], row["synchronisations"]["mined"]
            print(f"{classes:>5} {per_class:>3} {views:>5} {negatives:>4} "
                  + " ".join([*(f"{figure:>11.2f}" for figure in figures), *(f"{number:>11}" for number in counted),
                              *(f"{over[name]:>11.1f}" for name in ("mined", "mined/c", "yardstick"))]),
                  flush=True)  # fmt: skip
    keep(options, "head", {**about, "rows": rows})
    return 0


def keep(options: argparse.Namespace, command: str, record: dict[str, Any]) -> None:
    """Write the record as --json says."""
    if not options.json:
        return
    path = Path(options.json)
    if options.json.endswith("/") or path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path = path / f"{record['date']}-{command}-{options.device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


# ------------------------------------------------------------------------------------------------------------- loader

PLAIN: dict[str, Callable[[], list[Any]]] = {
    "cifar": lambda: [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=128),  # type: ignore[arg-type]
        parse("cutout(16)").augment,
    ],
    "imagenet": lambda: [
        transforms.RandomResizedCrop(224, scale=(0.08, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0),
        transforms.RandomGrayscale(0.2),
        rand_augment_transform("rand-n2-m10-mstd0.5", {"img_mean": (125, 123, 114)}),
    ],
}
"""Policies as one would put them together, over PIL images; their last steps make a tensor of the image."""


class PlainDataset(Dataset[tuple[Tensor, int]]):
    """What one would write first: decode, augment twice, stack; default_collate makes the batch."""

    def __init__(self, encoded: list[bytes], policy: str, floats: bool) -> None:
        last = [transforms.ToTensor(), transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
        self.encoded = encoded
        self.transform = transforms.Compose([*PLAIN[policy](), *(last if floats else [transforms.PILToTensor()])])

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.encoded[position])).convert("RGB")
        return torch.stack([self.transform(image) for _ in range(2)]), position


def photographs(count: int, width: int, height: int, kind: str) -> list[bytes]:
    """Smooth colours under some noise: about 80 kB as a JPEG of 500 x 375."""
    random, encoded = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
        pixels = (smooth + random.integers(-16, 17, smooth.shape)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, quality=90)
        encoded.append(stream.getvalue())
    return encoded


def read_images(source: str | None, policy: str, count: int) -> tuple[list[bytes], str]:
    """(encoded images, where they are from): the first of a data set, CIFAR's by --source, or made up."""
    if policy == "cifar" and source is not None:
        column = load(DataConfig(source)).train.dataset.select(range(count))["image"]
        return [value["bytes"] for value in column], source
    if policy == "cifar":
        return photographs(count, 32, 32, "PNG"), "made up, PNG of 32 x 32"
    return photographs(count, 500, 375, "JPEG"), "made up, JPEG of 500 x 375"


def measure_loader(
    policy: str, source: str | None, count: int, batch: int, repetitions: int, device: str
) -> dict[str, Any]:
    """One policy: images a second (medians), from bytes to a batch of two views, and ratios to the plain pipeline."""
    encoded, origin = read_images(source, policy, count)
    dataset = HuggingFaceDataset.from_dict({"image": [{"bytes": each, "path": None} for each in encoded]})
    split = Split(origin, dataset, np.zeros(count, np.int64), np.arange(count))
    views, start = ViewsConfig(train=policy), [0]

    def ours(config: LoaderConfig = LoaderConfig(), **speed: Any) -> Callable[[], Any]:  # noqa: B008 (frozen)
        loader = train_loader(split, views, 2, batch, config=config, speed=SpeedConfig(workers=0, **speed))
        samples = list(loader.sampler)
        return lambda: loader.dataset.__getitems__(  # type: ignore[attr-defined]
            [samples[i % count] for i in range(start[0], start[0] + batch)]
        )

    def plain(floats: bool) -> Callable[[], Any]:
        dataset = PlainDataset(encoded, policy, floats)
        return lambda: default_collate([dataset[i % count] for i in range(start[0], start[0] + batch)])

    contenders = {
        "plain": plain(True),
        "plain, eight bits": plain(False),
        "image by image": ours(batched=False, cache=0),
        "decoding alone": lambda: [decode(encoded[i % count]) for i in range(start[0], start[0] + batch)],
    }
    if policy == "cifar":
        contenders |= {"batched": ours(cache=0), "batched, cached": ours()}
    else:
        contenders |= {"planes": ours(cache=0), "near resize": ours(LoaderConfig(near_resize=True), cache=0)}
    on_device = LoaderConfig(device_views=True)
    contenders["for the device"] = begin = ours(on_device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repetitions + 1):
        start[0] = turn * batch
        for name, step in contenders.items():
            taken = clocked(step, "cpu")
            if turn:  # the first warms up
                seconds[name].append(taken / 1e3)
    rate = {name: batch / sorted(values)[len(values) // 2] for name, values in seconds.items()}
    finish, begun = finish_views(views, on_device), begin()
    begun = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in begun.items()}
    turns = repetitions if device.startswith("cuda") else 1  # on a CPU it only has to run
    finished = sorted(clocked(partial(finish, begun), device) for _ in range(turns + 1))[turns // 2]
    return {
        "policy": policy,
        "source": origin,
        "images": count,
        "batch": batch,
        "images_per_second": rate,
        "over_plain": {name: value / rate["plain"] for name, value in rate.items()},
        "milliseconds_of_a_batch_on_the_device": finished,
    }


def loader_command(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    about = {
        **machine(options.device),
        "versions": {name: version(name) for name in ("torchvision", "timm", "pillow", "numpy", "datasets")},
    }
    print(f"# {about['device']}, one thread of {about['cores']} cores, load {about['load']}, {about['date']}, "
          f"{about['versions']}; images a second, medians of {options.repetitions} batches")  # fmt: skip
    rows = []
    for policy in options.policies:
        row = measure_loader(policy, options.source, options.images, options.batch, options.repetitions, options.device)
        rows.append(row)
        print(f"{policy} ({row['source']}, {row['images']} images, batches of {row['batch']})")
        for name, rate in row["images_per_second"].items():
            print(f"    {name:<20} {rate:>9.0f} {row['over_plain'][name]:>7.2f} x", flush=True)
        print(f"    (the rest of a batch on the device: {row['milliseconds_of_a_batch_on_the_device']:.1f} ms)")
    keep(options, "loader", {**about, "rows": rows})
    return 0


# --------------------------------------------------------------------------------------------------------------- step


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
        speed_up(method.net, TrainSpeed(channels_last=options.channels_last, compile=options.compile))
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


def step_command(options: argparse.Namespace) -> int:
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


# ------------------------------------------------------------------------------------------------- trainer and process


def loop_command(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    accelerator = launch(recipe)
    options.device = accelerator.device.type
    data = load(recipe.data)
    trainer = Trainer(recipe, accelerator, data, build_method(recipe, data))
    trainer.method.train()
    batches = itertools.chain.from_iterable(trainer.loader for _ in itertools.count())
    for _ in range(3):  # compiles, starts the workers
        _trainer_step(trainer, batch := next(batches))
    fed = _seconds(lambda: _trainer_step(trainer, next(batches)), options)
    unfed = _seconds(lambda: _trainer_step(trainer, batch), options)
    steps = trainer.steps_per_epoch * recipe.train.epochs
    row = {
        "recipe": Path(options.recipe).stem, "overrides": options.overrides, "steps": options.steps,
        "processes": accelerator.num_processes, "milliseconds": 1e3 * fed, "without_loading": 1e3 * unfed,
        "images_per_second": recipe.train.batch_size / fed, "lost_to_loading": max(0.0, 1 - unfed / fed),
        "steps_of_recipe": steps, "minutes_of_recipe": steps * fed / 60,
    }  # fmt: skip
    about = machine(options.device)
    if accelerator.is_main_process:
        print(f"# {about['device']}, torch {about['torch']}, {about['date']}, load {about['load']}\n"
              f"{row['recipe']}: {row['milliseconds']:.1f} ms a step, {row['images_per_second']:.0f} images a second, "
              f"{100 * row['lost_to_loading']:.1f}% lost to loading; {steps} steps, without evaluation: "
              f"{row['minutes_of_recipe']:.1f} minutes")  # fmt: skip
        keep(options, "loop", {**about, "rows": [row]})
    trainer.close()
    return 0


def _trainer_step(trainer: Trainer, batch: dict[str, Tensor]) -> None:
    trainer._forward_backward(batch, last=True)
    trainer._update(sound=True)


def _seconds(step: Callable[[], object], options: argparse.Namespace) -> float:
    """Mean seconds of a step, the device's work included; the host may run ahead within."""
    synchronize = torch.cuda.synchronize if options.device == "cuda" else int
    synchronize()
    begun = time.perf_counter()
    for _ in range(options.steps):
        step()
    synchronize()
    return (time.perf_counter() - begun) / options.steps


STARTUP = """
import sys, time
begun = [time.perf_counter()]
from rescom_timm.runs import recipe, trainer
begun.append(time.perf_counter())
chosen = recipe.load(sys.argv[1], sys.argv[2:])
accelerator, data = trainer.launch(chosen), trainer.load(chosen.data)
begun.append(time.perf_counter())
run = trainer.Trainer(chosen, accelerator, data, trainer.build_method(chosen, data))
begun.append(time.perf_counter())
run.method.train()
run._forward_backward(next(iter(run.loader)), last=True)["loss"].item()
run._update(sound=True)
begun.append(time.perf_counter())
print(*(after - before for before, after in zip(begun, begun[1:])))
"""


def startup_command(options: argparse.Namespace) -> int:
    """Each recipe in processes of their own, medians."""
    recipes = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    about = machine("cpu")
    print(f"# {about['device']}, {about['cores']} cores, load {about['load']}, torch {about['torch']}, {about['date']}"
          f"; seconds, medians of {options.repetitions}")  # fmt: skip
    parts = ("imports", "data", "build", "first step")
    print(f"{'':<32}" + "".join(f"{part:>12}" for part in (*parts, "process")))
    rows = []
    for recipe in recipes:
        runs = []
        for _ in range(options.repetitions):
            begun = time.perf_counter()
            child = subprocess.run([sys.executable, "-c", STARTUP, recipe, *overrides], capture_output=True, text=True)
            if child.returncode:
                print(f"{recipe}: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                return 1
            told = [float(word) for word in child.stdout.split()[-len(parts) :]]
            runs.append([*told, time.perf_counter() - begun])
        medians = [sorted(column)[len(column) // 2] for column in zip(*runs, strict=True)]
        rows.append({"recipe": recipe, **dict(zip((*parts, "process"), medians, strict=True))})
        print(f"{Path(recipe).stem:<32}" + "".join(f"{value:>12.2f}" for value in medians), flush=True)
    keep(options, "startup", {**about, "rows": rows})
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    head = commands.add_parser("head", help="the contrastive part of a step")
    head.add_argument("--sizes", nargs="+", default=SIZES, metavar="KxQ", help="classes x keys of each class")
    head.add_argument("--views", nargs="+", type=int, default=[64, 512], help="queries N, two of each image")
    head.add_argument("--negatives", type=int, help="Qn; default 400 up to 100 classes, 500 above, as the recipes")
    head.add_argument("--dim", type=int, default=128, help="D")
    head.add_argument("--features", type=int, default=2048, help="width of the plain head, for memory")
    head.add_argument("--chunk", type=int, default=128, help="queries at a time of mined/c")
    head.add_argument("--repetitions", type=int, default=15)
    head.add_argument("--threads", type=int, default=1)
    head.add_argument("--device", default="cpu", help="cpu, cuda")
    head.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    head.set_defaults(run=head_command)
    loader = commands.add_parser("loader", help="from encoded images to batches of two views")
    loader.add_argument("--policies", nargs="+", default=list(PLAIN), choices=list(PLAIN))
    loader.add_argument("--source", help="CIFAR's data set, as data.source of a recipe; made-up images otherwise")
    loader.add_argument("--images", type=int, default=256)
    loader.add_argument("--batch", type=int, default=128)
    loader.add_argument("--repetitions", type=int, default=11)
    loader.add_argument("--device", default="cpu", help="cpu, cuda: where views are finished with loader.device_views")
    loader.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    loader.set_defaults(run=loader_command)
    step = commands.add_parser("step", help="a whole training step, and inference")
    step.add_argument("backbone", help="any name of timm.list_models()")
    step.add_argument("--size", type=int, help="pixels of the square images; the backbone's by default")
    step.add_argument("--classes", nargs="+", type=int, default=[1000, 8142])
    step.add_argument("--per-class", type=int, default=4, help="Q")
    step.add_argument("--negatives", type=int, default=500, help="Qn, at most (K-1)Q")
    step.add_argument("--batch", type=int, default=64, help="images, of two views each")
    step.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    step.add_argument("--channels-last", action="store_true")
    step.add_argument("--compile", default="false", help="true, false or a mode, as speed.compile")
    step.add_argument("--repetitions", type=int, default=15)
    step.add_argument("--device", default="cpu", help="cpu, cuda")
    step.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    step.set_defaults(run=step_command)
    loop = commands.add_parser("loop", help="the trainer's own loop over a recipe's data")
    loop.add_argument("recipe")
    loop.add_argument("overrides", nargs="*", metavar="key=value")
    loop.add_argument("--steps", type=int, default=100)
    loop.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    loop.set_defaults(run=loop_command)
    startup = commands.add_parser("startup", help="from the start of a process to its first step")
    startup.add_argument("words", nargs="+", metavar="RECIPE or key=value")
    startup.add_argument("--repetitions", type=int, default=3)
    startup.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    startup.set_defaults(run=startup_command, device="cpu")
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "device", "cpu").startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here: leave out --device, or install a build of torch for your GPU")
        return int(options.run(options))
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
