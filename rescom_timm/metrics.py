"""What a classifier is measured by; imports torch and numpy only. Every number is in percent.

Names: N test images, K classes, `counts` (K,) = TRAINING images of each class; they decide the groups
many, medium, few.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rescom_timm.errors import InputError

CONFIDENCE = 0.95
"""Coverage of every interval."""
DRAWS = 1000
"""Bootstrap replicates."""
QUICK_DRAWS = 200
"""Those of an evaluation during training, which is only printed."""
GROUPS = ("many", "medium", "few")
Limits = tuple[int, int]
LIMITS: Limits = (20, 100)
"""few: fewer training images than the first; many: more than the second (Liu et al. 2019, OLTR). The recipe key
evaluation.group_limits."""


def read_limits(recorded: object) -> Limits:
    """The limits that an evaluation recorded; those of 0.2.0 if it recorded none."""
    if isinstance(recorded, list) and len(recorded) == 2 and all(isinstance(limit, int) for limit in recorded):
        return recorded[0], recorded[1]
    return LIMITS


def group_rules(limits: Limits = LIMITS) -> dict[str, str]:
    """How many training images a class of each group has, as text."""
    low, high = limits
    return {"many": f"more than {high}", "medium": f"{low} to {high}", "few": f"fewer than {low}"}


def groups_defined(limits: Limits = LIMITS) -> str:
    """The groups in a sentence, for every place that shows them."""
    *rules, last = group_rules(limits).values()
    rules_text = f"{', '.join(rules)} and {last}"
    return f"many, medium and few: accuracy over the test images of classes with {rules_text} training images"


INTERVALS_DEFINED = "Intervals: 95%; of a class Wilson's, of groups and means a bootstrap over their classes and images"


def groups(counts: Tensor | Sequence[int] | np.ndarray, limits: Limits = LIMITS) -> dict[str, Tensor]:
    """Class numbers of each group, by training images. A group without classes is left out."""
    counts, (low, high) = torch.as_tensor(counts), limits
    masks = {"many": counts > high, "medium": (counts >= low) & (counts <= high), "few": counts < low}
    return {name: mask.nonzero().flatten() for name, mask in masks.items() if mask.any()}


def by_count(counts: ArrayLike) -> NDArray[np.int64]:
    """Class numbers (K,) from most to fewest training images; equal counts keep their order."""
    return np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")


def group_of(counts: ArrayLike | None, limits: Limits = LIMITS, classes: int = 0) -> NDArray[np.str_]:
    """The group's name of each class (K,); without counts "" for so many classes."""
    if counts is None:
        return np.full(classes, "")
    counts = np.asarray(counts, dtype=np.int64)
    names = np.empty(len(counts), dtype="<U6")
    for name, members in groups(counts, limits).items():
        names[members.numpy()] = name
    return names


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> dict[str, Tensor]:
    """Bins of equal width over the confidence of the predicted class, (a, b] as in Guo et al. 2017 (arXiv 1706.04599).

    confidence (N,) in 0..1, correct (N,) bool. Returns (bins,) float64: "count", and "confidence" and "accuracy", the
    means of the bin in percent (0 where the bin is empty).
    """
    confidence, correct = confidence.double(), correct.double()
    # ceil puts an upper edge into its own bin; a confidence of exactly 0 goes to the first.
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, index, torch.ones_like(confidence))
    sums = [torch.zeros(bins, dtype=torch.float64).index_add(0, index, x) for x in (confidence, correct)]
    means = [100 * x / count.clamp(min=1) for x in sums]
    return {"count": count, "confidence": means[0], "accuracy": means[1]}


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """ECE in percent: mean over images of |accuracy - confidence| of their bin (Guo et al. 2017, eq. 3)."""
    table = calibration(confidence, correct, bins)
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((table["count"] * gap).sum() / table["count"].sum())


class _Column:
    """Vectors put end to end, in one buffer that doubles as it fills.

    Not as a list of them: small tensors that stay cut up the free blocks that large ones leave on the heap of a CPU.
    With 10,000 classes each batch of an evaluation then costs the process two batches of logits for good.
    """

    first_size = 2**16

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def append(self, part: Tensor) -> None:
        end = self.length + len(part)
        if self.buffer is None:
            self.buffer = part.new_empty(max(self.first_size, end))
        elif end > len(self.buffer):
            self.buffer = torch.cat([self.buffer, self.buffer.new_empty(max(len(self.buffer), len(part)))])
        self.buffer[self.length : end] = part
        self.length = end

    def tensor(self) -> Tensor:
        """All that was put in."""
        assert self.buffer is not None
        return self.buffer[: self.length].clone()


class Meter:
    """Collects an evaluation on the device, without a host sync per step, and computes its numbers at the end.

    counts (K,) training images of each class; None: no groups. `topk` values that K classes cannot fail (k >= K) are
    left out, except 1. Rules:
    - A row whose softmax is not finite (NaN, +inf, or -inf everywhere) is wrong for every k: predicted -1, confidence
      0. Their share is reported as "invalid" where there are any.
    - Equal logits are ranked by class number, so that a constant output is not right by luck.
    - "many", "medium", "few" are means over the IMAGES of the group's classes. Where a group's test images are not
      balanced over its classes, "many_mean_class" ... give the mean over classes beside it.
    - A class without test images is left out of every mean; a group without test images has no entry.
    """

    def __init__(
        self,
        num_classes: int,
        counts: Tensor | Sequence[int] | None = None,
        topk: Sequence[int] = (1, 5),
        bins: int = 15,
        limits: Limits = LIMITS,
    ) -> None:
        if num_classes < 1 or bins < 1:
            raise InputError("metric.shape", f"num_classes and bins must be at least 1, not {num_classes} and {bins}")
        if any(k < 1 for k in topk):
            raise InputError("metric.shape", f"topk must be numbers of at least 1, not {tuple(topk)}")
        self.num_classes, self.bins, self.limits = num_classes, bins, limits
        self.topk = tuple(k for k in topk if k == 1 or k < num_classes)
        self.counts = None if counts is None else torch.as_tensor(counts).detach().cpu().long()
        if self.counts is not None and self.counts.shape != (num_classes,):
            raise InputError("metric.shape", f"counts must be ({num_classes},), not {tuple(self.counts.shape)}")
        self.own: dict[str, float] = {}
        """Further metrics of the caller, by name, in their own units."""
        self.reset()

    def reset(self) -> None:
        """Forgets every update."""
        self._kept = {name: _Column() for name in ("labels", "predicted", "confidence", "rank")}

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Takes logits (N, K) of any float type and labels (N,) of any integer type, both on one device."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or labels.shape != logits.shape[:1]:
            raise InputError(
                "metric.shape",
                f"logits must be (N, {self.num_classes}) and labels (N,), not {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}",
            )
        if labels.is_floating_point():
            raise InputError("metric.shape", f"labels must be integers, not {labels.dtype}")
        logits, labels = logits.detach().float(), labels.detach().long()
        probability = logits.softmax(dim=1)
        valid = probability.isfinite().all(dim=1)
        own = labels.clamp(0, self.num_classes - 1)[:, None]  # a wrong label is reported by compute: no sync here
        own_logit = logits.gather(1, own)
        earlier = torch.arange(self.num_classes, device=logits.device) < own
        rank = ((logits > own_logit) | ((logits == own_logit) & earlier)).sum(dim=1)
        self._kept["labels"].append(labels)
        self._kept["predicted"].append(torch.where(valid, logits.argmax(dim=1), -1))
        self._kept["confidence"].append(torch.where(valid, probability.amax(dim=1), 0.0))
        self._kept["rank"].append(torch.where(valid, rank, self.num_classes))

    def predictions(self) -> dict[str, Tensor]:
        """{"labels": int64 (N,), "predicted": int64 (N,), "confidence": float32 (N,)} on the CPU, as updated."""
        kept = self._gathered()
        return {name: kept[name] for name in ("labels", "predicted", "confidence")}

    def compute(self) -> dict[str, float]:
        """Flat name -> percent: top1, top5 ..., many, medium, few, mean_class, ece. See the class for the rules."""
        kept = self._gathered()
        numbers = {f"top{k}": 100 * float((kept["rank"] < k).double().mean()) for k in self.topk}
        per_class = self.per_class()
        for name, classes in self._groups().items():
            numbers |= _group_numbers(name, per_class["correct"][classes], per_class["total"][classes])
        numbers["mean_class"] = float(per_class["accuracy"].nanmean())
        correct = kept["predicted"] == kept["labels"]
        numbers["ece"] = expected_calibration_error(kept["confidence"], correct, self.bins)
        invalid = 100 * float((kept["predicted"] < 0).double().mean())
        return numbers | ({"invalid": invalid} if invalid else {}) | self.own

    def names(self, labels: Tensor) -> list[str]:
        """What compute() gives for images of these labels (N,), without ece: all of which larger is better."""
        meter = Meter(self.num_classes, self.counts, self.topk, limits=self.limits)
        values = {"labels": labels, "predicted": labels, "confidence": torch.ones(len(labels)), "rank": 0 * labels}
        for name, value in values.items():
            meter._kept[name].append(value)
        return [name for name in meter.compute() if name != "ece"]

    def per_class(self) -> dict[str, Tensor]:
        """Columns (K,) on the CPU, by class.

        "correct" and "total" (int64 test images), "accuracy" and its interval "low" to "high" (float64 percent, NaN if
        a class has no test image) and, if known, "count" (int64 training images).
        """
        kept = self._gathered()
        total = torch.bincount(kept["labels"], minlength=self.num_classes)
        correct = torch.bincount(kept["labels"][kept["predicted"] == kept["labels"]], minlength=self.num_classes)
        low, high = map(torch.from_numpy, wilson(correct.numpy(), total.numpy()))
        table = {
            "correct": correct, "total": total, "accuracy": 100 * correct.double() / total, "low": low, "high": high,
        }  # fmt: skip
        return table if self.counts is None else table | {"count": self.counts}

    def intervals(self, classes: bool = True, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
        """The 95% interval of every accuracy of compute(). classes: see `bootstrap`."""
        kept = self._gathered()
        total = torch.bincount(kept["labels"], minlength=self.num_classes).numpy()
        found: dict[str, tuple[float, float]] = {}
        for k in self.topk:
            right = torch.bincount(kept["labels"][kept["rank"] < k], minlength=self.num_classes).numpy()
            if k == 1:
                found |= intervals(right, total, self.counts, classes, draws, self.limits)
            else:
                found[f"top{k}"] = bootstrap(right, total, classes, draws)["images"]
        return {name: found[name] for name in self.compute() if name in found}

    def sizes(self) -> dict[str, dict[str, int]]:
        """Number of test images, and of their classes, of each accuracy of compute(): {"images": n, "classes": n}."""
        total = self.per_class()["total"]
        of = {name: total[classes] for name, classes in self._groups().items()}
        found = {}
        for name in self.compute():
            if name not in ("ece", "invalid", *self.own):
                own = of.get(name.removesuffix("_mean_class"), total)
                found[name] = {"images": int(own.sum()), "classes": int((own > 0).sum())}
        return found

    def record(self) -> dict[str, object]:
        """All as plain JSON, NaN as None.

        "numbers" (compute), "intervals", "image_intervals" (of the same classes: only images are drawn), "sizes",
        "group_limits", "per_class" {column: list}.
        """
        columns = {name: column.tolist() for name, column in self.per_class().items()}
        for name in ("accuracy", "low", "high"):
            columns[name] = [None if value != value else value for value in columns[name]]
        return {
            "numbers": self.compute(),
            "intervals": {name: list(ends) for name, ends in self.intervals().items()},
            "image_intervals": {name: list(ends) for name, ends in self.intervals(classes=False).items()},
            "sizes": self.sizes(),
            "group_limits": list(self.limits),
            "per_class": columns,
        }

    def _groups(self) -> dict[str, Tensor]:
        return {} if self.counts is None else groups(self.counts, self.limits)

    def _gathered(self) -> dict[str, Tensor]:
        if self._kept["labels"].buffer is None:
            raise InputError("metric.empty", "the meter has no images: call update(logits, labels) before compute()")
        kept = {name: column.tensor().cpu() for name, column in self._kept.items()}
        if not len(kept["labels"]):
            raise InputError("metric.empty", "the meter has only empty batches: check the evaluation split")
        low, high = int(kept["labels"].min()), int(kept["labels"].max())
        if low < 0 or high >= self.num_classes:
            raise InputError("metric.labels", f"labels must be 0..{self.num_classes - 1}, not {low}..{high}")
        return kept


def _group_numbers(name: str, correct: Tensor, total: Tensor) -> dict[str, float]:
    """Mean over the images of some classes; over the classes too where their test images are not balanced."""
    seen = total > 0
    if not seen.any():
        return {}
    correct, total = correct[seen].double(), total[seen].double()
    numbers = {name: 100 * float(correct.sum() / total.sum())}
    if bool((total != total[0]).any()):
        numbers[f"{name}_mean_class"] = 100 * float((correct / total).mean())
    return numbers


# Intervals, (low, high) in percent.


def wilson(
    correct: np.ndarray | float, total: np.ndarray | float, confidence: float = CONFIDENCE
) -> tuple[np.ndarray, np.ndarray]:
    """Score interval of a proportion (Wilson 1927), elementwise; NaN where total is 0. Bounds of the shape given."""
    n = np.where(np.asarray(total) > 0, np.asarray(total, dtype=float), np.nan)
    p, z2 = np.asarray(correct) / n, NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return 100 * np.clip(middle - half, 0, 1), 100 * np.clip(middle + half, 0, 1)


def span(ends: Sequence[float]) -> str:
    """An interval as short text, rounded outwards: 63-89, or 59.4-60.3 if it is narrower than 2."""
    low, high = ends
    if high - low >= 2:
        return f"{math.floor(low)}-{math.ceil(high)}"
    return f"{math.floor(10 * low) / 10:.1f}-{math.ceil(10 * high) / 10:.1f}"


def bootstrap(
    correct: np.ndarray, total: np.ndarray, classes: bool = True, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the mean accuracy of some classes: {"images": over their images, "classes": over them}.

    correct, total: (K,) test images. classes=True: each replicate draws K classes with replacement and then images
    within each, so the interval is about other classes of the same kind too; False: the images alone, of these classes.
    Classes without test images are left out; without any, the result is empty.

    A class drawn m times has a Binomial(m n, correct / n) number of correct images: one (draws, K) array of binomials
    does for both stages. Deviations are multiplied by sqrt(K / (K - 1)), which makes the variance between classes
    unbiased (Davison & Hinkley 1997, 3.8). No interval is narrower than Wilson's over the images (with the effective
    number of images for a mean over classes): where every image is right, a bootstrap alone would be of width 0.
    Simulated coverage (accuracies by Beta distributions, 5 to 50 images a class): 92 to 99% from ten classes on, 90 to
    98% with five, 80 to 99% with two.
    """
    seen = np.asarray(total) > 0
    right, n = np.asarray(correct)[seen].astype(np.int64), np.asarray(total)[seen].astype(np.int64)
    if not (k := len(n)):
        return {}
    generator = np.random.default_rng(seed)
    means = {"images": np.empty(draws), "classes": np.empty(draws)}
    step = max(1, 2**20 // k)
    for start in range(0, draws, step):
        part = slice(start, min(start + step, draws))
        size = len(means["images"][part])
        times = generator.multinomial(k, np.full(k, 1 / k), size=size) if classes else np.ones((size, k), np.int64)
        drawn = generator.binomial(times * n, right / n)
        means["images"][part] = drawn.sum(axis=1) / (times @ n)
        means["classes"][part] = drawn @ (1 / n) / k
    centres = {"images": (right.sum() / n.sum(), n.sum()), "classes": ((right / n).mean(), k * k / (1 / n).sum())}
    wider = math.sqrt(k / (k - 1)) if classes and k > 1 else 1.0
    found = {}
    for name, (mean, images) in centres.items():
        low, high = np.quantile(means[name], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        floor = wilson(mean * images, images)
        found[name] = (
            max(0.0, min(float(floor[0]), 100 * float(mean + wider * (low - mean)))),
            min(100.0, max(float(floor[1]), 100 * float(mean + wider * (high - mean)))),
        )
    return found


def intervals(
    correct: Tensor | np.ndarray, total: Tensor | np.ndarray, counts: Tensor | np.ndarray | None, classes: bool = True,
    draws: int = DRAWS, limits: Limits = LIMITS,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Intervals of top1, mean_class, and of each group and its mean over classes: names as in Meter.compute.

    correct, total, counts: (K,) correct and all test images, training images of each class. See `bootstrap`.
    """
    right, n = np.asarray(correct), np.asarray(total)
    whole = bootstrap(right, n, classes, draws)
    found = {"top1": whole["images"], "mean_class": whole["classes"]} if whole else {}
    for name, members in groups(counts, limits).items() if counts is not None else ():
        part = bootstrap(right[members.numpy()], n[members.numpy()], classes, draws)
        found |= {name: part["images"], f"{name}_mean_class": part["classes"]} if part else {}
    return found
