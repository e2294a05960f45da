"""Which class to answer: an operating point (at least some recall of named classes), or the least expected cost.

N images, K classes. Probabilities stay as they are: a rule decides beside them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rescom_timm.class_names import first_names, numbers_of
from rescom_timm.engine.evaluate import table
from rescom_timm.engine.logits import Logits
from rescom_timm.errors import InputError
from rescom_timm.inference.conformal import needed, order_statistic
from rescom_timm.io import read_text
from rescom_timm.metrics import CONFIDENCE, DRAWS, LIMITS, Limits, Meter, span, wilson
from rescom_timm.text import counted

ROUNDS = 10_000
"""Passes over the named classes, whose offsets depend on each other, at most."""


class Rule(Protocol):
    """A decision for every image."""

    @property
    def text(self) -> str:
        """The rule in words, for people."""

    def decide(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Classes (N,) for the net's own logits (N, K) and the probabilities (N, K) that are shown."""


class PointRecord(TypedDict):
    """One class of an operating point as JSON: its number and offset, its recall and its validation images."""

    number: int
    offset: float
    recall: float
    images: int


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """Offsets of the net's logits that give named classes at least a recall.

    Recall does not depend on how frequent classes are, so a class prior changes the probabilities and not this rule.
    """

    recall: Mapping[str, float]
    """The least recall by class name."""
    images: Mapping[str, int]
    """Validation images of each of these classes."""
    classes: tuple[int, ...]
    """The numbers of these classes."""
    offsets: Tensor
    """(K,) float64, added to the net's logits; 0 for other classes."""

    @property
    def text(self) -> str:
        """The rule in words."""
        parts = [
            f"recall of {name!r} at least {least:g} (from {counted(self.images[name], 'validation image')})"
            for name, least in self.recall.items()
        ]
        return ", ".join(parts)

    def decide(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Classes (N,) of the largest logits (N, K) with the offsets."""
        return (logits.cpu().double() + self.offsets).argmax(dim=1)

    def record(self) -> list[PointRecord]:
        """Plain JSON, which `read_point` reads."""
        return [
            {"number": k, "offset": float(self.offsets[k]), "recall": self.recall[name], "images": self.images[name]}
            for name, k in zip(self.recall, self.classes, strict=True)
        ]


def operating_point(
    logits: Tensor, labels: Tensor, recall: Mapping[str, float], class_names: Sequence[str]
) -> OperatingPoint:
    """The smallest offsets with which new images of each named class are found with at least its recall.

    Split conformal within the class: of its n validation images the ceil((n + 1) r)-th easiest is still found, so for
    images drawn as those were the expected recall is at least r. logits: (N, K) of validation images, labels: (N,).
    Raises InputError: predict.classes for unknown names, predict.value for a recall that is not between 0 and 1,
    predict.calibration for a class with fewer than r / (1 - r) images, or recalls that cannot be had together.
    """
    if not recall:
        raise InputError("predict.value", "an operating point needs a class and its recall")
    classes = numbers_of(recall, class_names, "predict.classes")
    numbers = dict(zip(classes, map(float, recall.values()), strict=True))
    images = torch.bincount(labels, minlength=len(class_names)).tolist()
    for k, least in numbers.items():
        if not 0 < least < 1:
            raise InputError("predict.value", f"recall of {class_names[k]!r} must be between 0 and 1, not {least:g}")
        if images[k] < needed(least):
            message = f"a recall of {least:g} needs {needed(least)} validation images of {class_names[k]!r}; there are"
            raise InputError("predict.calibration", f"{message} {images[k]}: ask for less, or hold out more images")
    asked = torch.isin(labels, torch.tensor(classes))
    scores, labels = logits[asked].double(), labels[asked]
    offsets = torch.zeros(len(class_names), dtype=torch.float64)
    most = 2 * float(scores.amax() - scores.amin()) + 1  # beyond this, classes only chase each other
    for _ in range(ROUNDS):
        before = offsets.clone()
        for k, least in numbers.items():
            own = scores[labels == k]
            others = (own + offsets).index_fill(1, torch.tensor(k), -math.inf).amax(dim=1)
            margin = order_statistic(others - own[:, k], least)
            assert margin is not None
            offsets[k] = max(0.0, margin + 1e-6)
        if torch.equal(before, offsets):
            named = {class_names[k]: least for k, least in numbers.items()}
            return OperatingPoint(named, {class_names[k]: images[k] for k in numbers}, tuple(numbers), offsets)
        if float(offsets.amax()) > most:
            break
    message = f"the recalls of {', '.join(map(repr, recall))} cannot be had together: these classes overlap"
    raise InputError("predict.calibration", f"{message}; ask for less")


def read_point(record: Sequence[PointRecord], class_names: Sequence[str]) -> OperatingPoint:
    """The operating point of a record. Raises InputError (model.details), KeyError, TypeError and ValueError."""
    offsets, numbers = torch.zeros(len(class_names), dtype=torch.float64), [int(one["number"]) for one in record]
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= k < len(class_names) for k in numbers):
        raise InputError("model.details", f"an operating point of classes {numbers}")
    offsets[numbers] = torch.tensor([float(one["offset"]) for one in record], dtype=torch.float64)
    recall = {class_names[int(one["number"])]: float(one["recall"]) for one in record}
    if not bool(offsets.isfinite().all()) or not all(0 < least < 1 for least in recall.values()):
        raise InputError("model.details", "an operating point needs finite offsets and recalls between 0 and 1")
    images = {class_names[int(one["number"])]: int(one["images"]) for one in record}
    return OperatingPoint(recall, images, tuple(numbers), offsets)


MOST_KEPT = 2000
"""Classes up to which an export keeps costs."""


@dataclass(frozen=True, eq=False)
class Costs:
    """The class of the least expected cost (Elkan 2001, eq. 1)."""

    matrix: Tensor
    """(K, K) float64: cost of answering column j for an image of class i."""
    text: ClassVar[str] = "least expected cost"

    def decide(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Classes (N,) of the least sum over i of p_i C_ij; of several the most probable."""
        probabilities = probabilities.cpu().double()
        expected = probabilities @ self.matrix
        least = expected.amin(dim=1, keepdim=True)
        return probabilities.masked_fill(expected > least + 1e-12 * self.matrix.abs().amax(), -1).argmax(dim=1)

    def record(self) -> list[list[float]]:
        """Plain JSON, which `read_matrix` reads. Raises InputError (predict.costs) for more than MOST_KEPT classes."""
        if len(self.matrix) > MOST_KEPT:
            message = f"an export keeps costs of at most {MOST_KEPT:,} classes, not {len(self.matrix):,}: give them to"
            raise InputError("predict.costs", f"{message} predict --costs")
        rows: list[list[float]] = self.matrix.tolist()
        return rows

    def paid(self, labels: Tensor, decided: Tensor) -> np.ndarray:
        """The cost of each image, (N,)."""
        found: np.ndarray = self.matrix[labels.cpu(), decided.cpu()].numpy()
        return found


def read_matrix(record: Sequence[Sequence[float]], classes: int) -> Costs:
    """The costs of a record. Raises InputError (model.details), TypeError and ValueError."""
    matrix = torch.tensor(record, dtype=torch.float64)
    if matrix.shape != (classes, classes) or not bool(matrix.isfinite().all()):
        raise InputError("model.details", f"costs must be {classes} x {classes} finite numbers")
    return Costs(matrix)


@dataclass(frozen=True)
class Share:
    """How many of some images are right, with the 95% interval in percent; None of no images."""

    right: int
    images: int
    low: float | None
    high: float | None

    @classmethod
    def of(cls, right: Tensor) -> Share:
        """right: bool (n,)."""
        number, images = int(right.sum()), len(right)
        ends = [float(end) for end in wilson(number, images)] if images else (None, None)
        return cls(number, images, *ends)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return "none of 0 images"
        return f"{100 * self.right / self.images:.1f}% ({span((self.low, self.high))}; n {self.images:,})"


@dataclass(frozen=True)
class Mean:
    """A mean over images with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} (95%: {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Price:
    """What a rule gains and costs on labelled images; pairs are of the most probable class and of the rule."""

    images: int
    numbers: dict[str, dict[str, float]]
    """The metrics of both in percent, with the intervals of each."""
    intervals: dict[str, dict[str, tuple[float, float]]]
    recall: dict[str, tuple[Share, Share]] = field(default_factory=dict)
    """Of the classes that an operating point names, as are precision, others (recall of all other classes) and lost."""
    precision: dict[str, tuple[Share, Share]] = field(default_factory=dict)
    others: tuple[Share, Share] | None = None
    lost: dict[str, dict[str, int]] = field(default_factory=dict)
    """Classes that lose most, at most five: right images "lost" of "images"."""
    cost: dict[str, Mean] = field(default_factory=dict)
    """Mean cost of an image by the most probable class and by the rule, and the difference, by a paired bootstrap."""

    def record(self) -> dict[str, object]:
        """Plain JSON, with the fields' names."""
        return asdict(self)

    @property
    def text(self) -> str:
        """For a terminal."""
        beside = {name: {"95%": {key: span(ends) for key, ends in own.items()}} for name, own in self.intervals.items()}
        lines = [table(self.numbers, beside)]
        for name in self.recall:
            for what, pairs in (("recall", self.recall), ("precision", self.precision)):
                lines.append(f"{what} of {name!r}: {' -> '.join(map(str, pairs[name]))}")
        if self.others:
            worst = ", ".join(f"{name!r} {one['lost']} of {one['images']}" for name, one in self.lost.items())
            change = " -> ".join(map(str, self.others))
            lines.append(f"recall of the other classes: {change}" + (f"; images lost: {worst}" if worst else ""))
        if self.cost:
            first, second, difference = self.cost.values()
            lines.append(f"mean cost of {counted(self.images, 'image')}: {first} -> {second}, difference {difference}")
        return "\n".join(lines)


def price(
    rule: Rule, kept: Logits, class_names: Sequence[str], counts: Tensor | None = None, limits: Limits = LIMITS,
    shift: Tensor | float = 0.0, temperature: float = 1.0,
) -> Price:  # fmt: skip
    """What a rule gains and costs on labelled images, with 95% intervals.

    kept: the logits s of an evaluation. counts: (K,) training images. softmax(s / temperature + shift) are the
    probabilities.
    """
    columns = []
    for values, true in kept.batches():
        probabilities = (values / temperature + shift).softmax(dim=1)
        columns.append((true, probabilities.argmax(dim=1), rule.decide(values, probabilities)))
    labels, before, after = map(torch.cat, zip(*columns, strict=True))
    numbers, intervals = {}, {}
    for name, answers in (("most probable class", before), ("by the rule", after)):
        meter = Meter(len(class_names), counts, topk=(1,), limits=limits)
        for own, true in zip(answers.split(1024), labels.split(1024), strict=True):
            meter.update(one_hot(own, len(class_names)).float(), true)
        figures, intervals[name] = meter.compute(), meter.intervals()
        numbers[name] = {figure: figures[figure] for figure in intervals[name]}
    found = Price(len(labels), numbers, intervals)
    if isinstance(rule, OperatingPoint):
        return _price_of_recall(found, rule, labels, before, after, class_names)
    return replace(found, cost=_mean_costs(rule, labels, before, after)) if isinstance(rule, Costs) else found


def _price_of_recall(
    found: Price, rule: OperatingPoint, labels: Tensor, before: Tensor, after: Tensor, class_names: Sequence[str]
) -> Price:
    def pair(*masks: Tensor) -> tuple[Share, Share]:
        first, second = masks[0], masks[-1]
        return Share.of(labels[first] == before[first]), Share.of(labels[second] == after[second])

    others = ~torch.isin(labels, torch.tensor(rule.classes))
    rights = [torch.bincount(labels[others & (one == labels)], minlength=len(class_names)) for one in (before, after)]
    lost, total = rights[0] - rights[1], torch.bincount(labels, minlength=len(class_names))
    most = [k for k in lost.argsort(descending=True, stable=True).tolist()[:5] if lost[k] > 0]
    return replace(
        found,
        recall={class_names[k]: pair(labels == k) for k in rule.classes},
        precision={class_names[k]: pair(before == k, after == k) for k in rule.classes},
        others=pair(others),
        lost={class_names[k]: {"lost": int(lost[k]), "images": int(total[k])} for k in most},
    )


def _mean_costs(rule: Costs, labels: Tensor, before: Tensor, after: Tensor) -> dict[str, Mean]:
    pairs = np.stack([rule.paid(labels, before), rule.paid(labels, after)])
    columns = np.stack([*pairs, pairs[1] - pairs[0]])
    generator, drawn = np.random.default_rng(0), np.empty((DRAWS, 3))
    for draw in drawn:
        draw[:] = columns[:, generator.integers(len(labels), size=len(labels))].mean(axis=1)
    ends = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    means = zip(columns.mean(axis=1).tolist(), *ends.tolist(), strict=True)
    return dict(zip(("most probable class", "by the rule", "difference"), (Mean(*each) for each in means), strict=True))


def read_costs(path: str | Path, class_names: Sequence[str]) -> Costs:
    """Costs by class names, in any order.

    A .json file: {true class: {predicted class: cost}}. Another file is CSV: the first line names the predicted
    classes after a first cell, each other line is a true class and its costs. Raises InputError: predict.classes for
    classes that are unknown, missing or double, predict.costs for what is not finite numbers, and as read_text.
    """
    text = read_text(path)
    rows = _json_rows(text, path) if Path(path).suffix.lower() == ".json" else _csv_rows(text, path)
    matrix = torch.zeros(len(class_names), len(class_names), dtype=torch.float64)
    every = _all_of([name for name, _ in rows], class_names, f"{path}: true classes")
    columns: dict[tuple[str, ...], list[int]] = {}
    for i, (name, costs) in zip(every, rows, strict=True):
        others, values = zip(*costs, strict=True) if costs else ((), ())
        if others not in columns:
            columns[others] = _all_of(others, class_names, f"{path}: predicted classes of {name!r}")
        what = f"{path}: each cost of {name!r} must be a finite number"
        matrix[i, columns[others]] = torch.tensor([_number(value, what) for value in values], dtype=torch.float64)
    return Costs(matrix)


Row = tuple[str, Sequence[tuple[str, object]]]
"""A true class, and the cost of each class that may be answered."""


def _json_rows(text: str, path: str | Path) -> Sequence[Row]:
    try:
        rows: Sequence[Row] = json.loads(text, object_pairs_hook=tuple)  # a dict would keep the last of equal names
    except (ValueError, RecursionError) as error:
        raise InputError("predict.costs", f"{path} is not JSON: {error}") from None
    if not isinstance(rows, tuple) or not all(isinstance(row, tuple) for _, row in rows):
        raise InputError("predict.costs", f"{path} must be of the form {{true class: {{predicted class: cost}}}}")
    return rows


def _csv_rows(text: str, path: str | Path) -> Sequence[Row]:
    try:
        lines = [row for row in csv.reader(io.StringIO(text, newline=""), skipinitialspace=True) if row]
    except csv.Error as error:
        raise InputError("predict.costs", f"{path} is no CSV: {error}") from None
    if len({len(row) for row in lines}) != 1:
        raise InputError("predict.costs", f"{path} is no table: its lines have different numbers of cells, or none")
    predicted = lines[0][1:]
    return [(row[0], list(zip(predicted, row[1:], strict=True))) for row in lines[1:]]


def _all_of(names: Sequence[str], class_names: Sequence[str], where: str) -> list[int]:
    """`numbers_of` names that must be all classes."""
    try:
        found = numbers_of(names, class_names, "predict.classes")
    except InputError as error:
        raise InputError(error.code, f"{where}: {error}") from None
    if missing := set(range(len(class_names))).difference(found):
        names = [class_names[k] for k in sorted(missing)]
        raise InputError("predict.classes", f"{where}: {first_names(names)} missing")
    return found


def _number(value: object, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError("predict.costs", f"{what}, not {value!r}")
    return number
