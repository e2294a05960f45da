"""`head`: the contrastive part of a step, embeddings given: pairs, mining, loss, backward, enqueue (released mode).

    python tools/benchmark.py head                                   # the table of sizes, on one CPU core: minutes
    python tools/benchmark.py head --sizes 1000x4 --views 64 --json head.json
    python tools/benchmark.py head --device cuda --json tools/benchmarks/

yardstick    a straightforward dense form: index tensors, gathers, all similarities kept for backward, keys entering
             one by one
pairs        rescom_timm.contrastive, put together from pairs: the definition
mined        rescom_timm.contrastive.mined, all queries at once; mined/c, in chunks
floor        one (N x S) product and torch.topk over it (no loss, no gradient, nothing else); floor-u with sorted=False

Contenders take turns on the same new batch. Embeddings are random unit vectors.

Tried for `mined` on a CPU and not worth it (one core, 512 views, S = 4000 unless stated otherwise; topk itself 16 ms):
two-level top-k below S = 12 Qn (19 ms against 17); masking or clamping what is below the least group maximum before
topk (21 to 25); topk on floats (25; on their bits as integers 17); kthvalue (32); sort (150); groups as large as a
class, maxima along the last dimension (17 ms against 3 for strided groups at S = 32568); chunks of 16 queries (up to
2 times slower, the calls dominate); embedding_bag where S < 3 (Qp + Qn) (2 to 4 ms against 1.3 of a dense product).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median_high
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import calls, clocked, common_arguments, heading, keep, machine, peak
from rescom_timm.contrastive.mined import composed, mined_supcon
from rescom_timm.contrastive.queue import ClassBalancedQueue
from rescom_timm.errors import InputError
from rescom_timm.losses import balanced_softmax

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
        self.register_buffer("labels", slots // per_class)
        self.register_buffer("valid", torch.ones(len(slots), dtype=torch.bool))

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
    milliseconds = {name: median_high(values) for name, values in times.items()}
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


def peaks(head: Head, z: Tensor, y: Tensor, features: int, device: str) -> dict[str, float]:
    """Peak memory of the contenders.

    MB (10^6 bytes) that each contender's head needs at its peak above the plain one (linear, Balanced Softmax,
    backward). The contrastive loss comes first: its temporaries are freed before the logits.
    """
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


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="KxQ", help="classes x keys of each class")
    parser.add_argument("--views", nargs="+", type=int, default=[64, 512], help="queries N, two of each image")
    parser.add_argument("--negatives", type=int, help="Qn; default 400 up to 100 classes, 500 above, as the recipes")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument("--features", type=int, default=2048, help="width of the plain head, for memory")
    parser.add_argument("--chunk", type=int, default=128, help="queries at a time of mined/c")
    parser.add_argument("--threads", type=int, default=1)
    common_arguments(parser, repetitions=15)


def check_memory(sizes: list[tuple[int, int]]) -> None:
    """Raises ValueError where the yardstick's index of other classes' keys takes more than half of the memory."""
    for classes, per_class in sizes:
        needed, memory = 8 * classes * (classes - 1) * per_class, psutil.virtual_memory().total
        if needed > memory / 2:
            raise InputError(
                "usage.arguments",
                f"--sizes {classes}x{per_class}: the yardstick's index alone would take {needed / 2**30:,.0f} GiB of "
                f"this machine's {memory / 2**30:,.0f}; python tools/benchmark.py classes measures so many without it",
            )


def run(options: argparse.Namespace) -> int:
    sizes = [(int(classes), int(per_class)) for classes, per_class in (size.split("x") for size in options.sizes)]
    check_memory(sizes)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = machine(options.device)
    print(f"{heading(about)}, {about['date']}; milliseconds, medians of {options.repetitions}")
    names = ["yardstick", "pairs", "mined", "mined/c", "floor", "floor-u"]
    columns = [*names, "yard/mined", "mined/floor", "calls", "syncs", "MB", "MB/c", "MB yard"]
    print(f"{'K':>5} {'Q':>3} {'views':>5} {'Qn':>4} " + " ".join(f"{column:>11}" for column in columns))
    rows = []
    for classes, per_class in sizes:
        negatives = options.negatives or (400 if classes <= 100 else 500)
        negatives = min(negatives, (classes - 1) * per_class)
        for views in options.views:
            row = measure_head(classes, per_class, views, options.dim, negatives, options.chunk, options.repetitions,
                               options.device, options.features)  # fmt: skip
            rows.append(row)
            ms, over = row["milliseconds"], row["peak_over_plain"]
            cells = [*(ms[name] for name in names), row["yardstick_over_mined"], row["mined_over_floor"]]
            counted = row["calls"]["mined"], row["synchronisations"]["mined"]
            print(f"{classes:>5} {per_class:>3} {views:>5} {negatives:>4} "
                  + " ".join([*(f"{figure:>11.2f}" for figure in cells), *(f"{number:>11}" for number in counted),
                              *(f"{over[name]:>11.1f}" for name in ("mined", "mined/c", "yardstick"))]),
                  flush=True)  # fmt: skip
    keep(options, "head", {**about, "rows": rows})
    return 0
