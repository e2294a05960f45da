"""`classes`: what the number of classes costs a step, measured, on paper, and cut over processes.

    python tools/benchmark.py classes                                    # 10,000 to 1,000,000 classes, on one CPU core
    python tools/benchmark.py classes --classes 10000 --features 2048 --device cuda -o tools/benchmarks/

Features and embeddings are given; all behind them is a real step: linear classifier, Balanced Softmax, mined
contrastive loss (released mode), backward, SGD with momentum, keys entering the queue. K classes, Q keys of each, N
views, width F of the features and D of the embeddings.

held          bytes that stay: weights, momentum, queue; on paper 8 K (F + 1) + K Q (4 D + 9) + 24 K
peak          bytes of a step on top: logits 4 N K with the most of: similarities and maxima of their groups 16/3 N K Q
              (of at most 2^28 at a time), what Balanced Softmax makes of the logits 12 N K, and gradients of logits and
              weights 4 N K + 4 K (F + 1)
milliseconds  on paper a + b K, through the two smallest numbers of classes: the largest checks it
cut           the same K on P processes. whole: each has all classes and its N / P views, as now. shard: each has K / P
              classes and sees all N views, as a classifier and a queue cut by class would; without what they would send
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median_high
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import clocked, common_arguments, heading, keep, machine, peak, positive
from rescom_timm.contrastive.mined import SIMILARITIES_AT_ONCE, mined_supcon
from rescom_timm.contrastive.queue import ClassBalancedQueue
from rescom_timm.errors import InputError
from rescom_timm.losses import balanced_softmax

PARTS = ("classifier", "contrast", "optimizer", "enqueue")


class Classes:
    """What of a step knows the classes, over a full queue. `parts` does each alone, `step` all."""

    def __init__(self, classes: int, views: int, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        device, self.negatives = options.device, min(options.negatives, (classes - 1) * options.per_class)
        self.linear = nn.Linear(options.features, classes, device=device)
        self.optimizer = torch.optim.SGD(self.linear.parameters(), 0.1, momentum=0.9)
        self.queue = ClassBalancedQueue(classes, options.per_class, options.dim).to(device)
        for keys in self.queue.keys.split(65536):
            keys.copy_(F.normalize(torch.randn(keys.shape, generator=generator), dim=1))
        self.queue.valid.fill_(True)
        self.counts = torch.linspace(1000, 5, classes, device=device).round()
        self.weights = torch.ones(classes, device=device)
        self.x = torch.randn(views, options.features, generator=generator).to(device).requires_grad_()
        self.z = F.normalize(torch.randn(views, options.dim, generator=generator), dim=1).to(device).requires_grad_()
        self.y = torch.randint(classes, (views // 2,), generator=generator).repeat(2).to(device)
        self.parts: dict[str, Callable[[], object]] = {
            "classifier": lambda: self.classified(self.linear(self.x)).backward(),
            "contrast": lambda: self.contrast().backward(),
            "optimizer": self.update,
            "enqueue": lambda: self.queue.enqueue(self.z.detach()[: views // 2], self.y[: views // 2]),
        }

    def classified(self, logits: Tensor) -> Tensor:
        return balanced_softmax(logits, self.y, self.counts)

    def contrast(self) -> Tensor:
        z, y = self.z, self.y
        return mined_supcon(z, y, self.queue, 1, self.negatives, 0.2, self.weights[y], keys=z, key_labels=y)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """In the order of ResCom's."""
        logits = self.linear(self.x)
        contrast = self.contrast()
        (self.classified(logits) + 0.5 * contrast).backward()
        del logits
        self.update()
        self.parts["enqueue"]()

    def held(self) -> int:
        """Bytes that stay between steps."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        tensors = [*self.linear.parameters(), *moments, *self.queue.state_dict().values(), self.queue.ring_start]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def on_paper(classes: int, views: int, options: argparse.Namespace) -> dict[str, float]:
    """Bytes that stay and that a step takes on top, by hand."""
    q, f, d = options.per_class, options.features, options.dim
    at_a_time = max(1, min(views, SIMILARITIES_AT_ONCE // (classes * q)))
    logits, similarities = 4 * views * classes, 16 / 3 * at_a_time * classes * q
    return {
        "held": 8 * classes * (f + 1) + classes * q * (4 * d + 9) + 24 * classes,
        "peak": logits + max(similarities, 3 * logits, logits + 4 * classes * (f + 1)),
    }


def measure(classes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    whole = Classes(classes, options.views, options)
    whole.step()
    milliseconds = medians(whole, options)
    most = peak(whole.step, options.device)
    row: dict[str, Any] = {
        "classes": classes, "milliseconds": milliseconds, "bytes": {"held": whole.held(), "peak": most},
        "on_paper": on_paper(classes, options.views, options),
    }  # fmt: skip
    del whole
    p = options.processes
    if options.views % (2 * p) or classes // p < 2:
        return row
    cuts = {"whole": (classes, options.views // p), "shard": (classes // p, options.views)}
    row["cut"] = {}
    for name, (own, views) in cuts.items():
        part = Classes(own, views, options)
        part.step()
        taken, held = medians(part, options), part.held() + peak(part.step, options.device)
        row["cut"][name] = {"milliseconds": taken, "bytes": held}
        del part
    return row


def medians(one: Classes, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each part, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(options.repetitions):
        for name in PARTS:
            taken[name].append(clocked(one.parts[name], options.device))
    return {name: median_high(times) for name, times in taken.items()}


def predicted(rows: list[dict[str, Any]]) -> list[float | None]:
    """Milliseconds of all parts together, on the line through the first two rows; None of those two themselves."""
    times = [sum(row["milliseconds"].values()) for row in rows]
    if len(rows) < 3:
        return [None] * len(rows)
    first, second = (row["classes"] for row in rows[:2])
    slope = (times[1] - times[0]) / (second - first)
    return [None, None, *(times[0] + slope * (row["classes"] - first) for row in rows[2:])]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", nargs="+", type=positive, default=[10_000, 100_000, 1_000_000], metavar="K")
    parser.add_argument("--per-class", type=positive, default=4, help="Q")
    parser.add_argument("--views", type=positive, default=64, help="N, two of each image")
    parser.add_argument("--features", type=positive, default=256, help="F")
    parser.add_argument("--dim", type=positive, default=128, help="D")
    parser.add_argument("--negatives", type=positive, default=500, help="Qn")
    parser.add_argument("--processes", type=positive, default=8, help="P")
    parser.add_argument("--threads", type=positive, default=1)
    common_arguments(parser, repetitions=5)


def run(options: argparse.Namespace) -> int:
    if options.views % 2 or min(options.classes) < 2:
        raise InputError(
            "usage.arguments", "views come in pairs, and there are at least two classes: change --views or --classes"
        )
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = machine(options.device)
    keys = ("per_class", "views", "features", "dim", "negatives", "processes", "repetitions")
    about |= {key: getattr(options, key) for key in keys}
    print(
        f"{heading(about)}, {about['date']}; medians of {options.repetitions}\n# Q = {options.per_class}, "
        f"N = {options.views}, F = {options.features}, D = {options.dim}, Qn = {options.negatives}"
    )
    columns = [*(f"{part}, ms" for part in PARTS), "held, MB", "on paper", "peak, MB", "on paper"]
    print(f"{'K':>9} " + " ".join(f"{column:>14}" for column in columns))
    rows = []
    for classes in sorted(options.classes):
        rows.append(row := measure(classes, options))
        cells = [row["milliseconds"][part] for part in PARTS]
        cells += [row[of][kind] / 1e6 for kind in ("held", "peak") for of in ("bytes", "on_paper")]
        print(f"{classes:>9} " + " ".join(f"{figure:>14.1f}" for figure in cells), flush=True)
    for row, expected in zip(rows, predicted(rows), strict=True):
        if expected is not None:
            row["expected"] = expected
            print(f"K = {row['classes']:,}: {sum(row['milliseconds'].values()):,.0f} ms in all, {expected:,.0f} on the "
                  "line through the two smallest")  # fmt: skip
    for row in rows:
        for name, cut in row.get("cut", {}).items():
            print(f"K = {row['classes']:,}, one of {options.processes} processes, {name}: "
                  + ", ".join(f"{part} {cut['milliseconds'][part]:.1f}" for part in PARTS)
                  + f" ms; {cut['bytes'] / 1e6:.0f} MB")  # fmt: skip
    keep(options, "classes", {**about, "rows": rows})
    return 0
