"""Comparing candidates on validation images: cross-validation of heads, scores with their errors, and the rule.

Shapes: N scored images, K classes, S settings of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rescom_timm.engine.features import Features
from rescom_timm.methods.heads import Fitted, standard, temperature
from rescom_timm.metrics import bootstrap

ENOUGH = 5
"""Validation images that every class needs for a choice among methods: with one a class such choices lost up to five
points against always taking the probe, with five up to three, and the probe at most 1.5."""
FOLDS = 5
SMALL, LARGE = 2e7, 1e9
"""Products of images, classes and features: cross-validation is done twice below the first, not at all above the
second, where it takes minutes and validation parts are large."""


HELD = 2**21
"""Logits that a Scored keeps."""
TENSORS = ("predicted", "labels", "logits", "truth")
"""Of a Scored, in order."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What a candidate is scored by.

    Of validation images, or of training images by heads that were fitted without them.
    """

    predicted: Tensor
    """(N,) classes."""
    labels: Tensor
    """(N,)."""
    logits: Tensor
    """(n, K) for the temperature: of all N images, or an even sample of them where N * K is above HELD."""
    truth: Tensor
    """(n,) labels of the logits."""
    repeats: int = 1
    """How often each image stands there, as by repeated cross-validation; errors count it once."""

    def scaled(self, factor: float) -> Scored:
        """With all logits times the factor."""
        return replace(self, logits=self.logits * factor)

    @property
    def correct(self) -> np.ndarray:
        """(N,) whether each image is right."""
        return (self.predicted == self.labels).numpy()

    @property
    def weights(self) -> np.ndarray:
        """(N,) by which a mean over images is the mean over classes; they sum to 1."""
        return class_weights(self.labels)

    @property
    def mean_class(self) -> float:
        """Percent, the mean over classes."""
        return 100 * float(self.weights @ self.correct)

    def interval(self) -> tuple[float, float]:
        """95% of `mean_class`, over other images of these classes."""
        labels, classes = self.labels.numpy(), self.logits.shape[1]
        right = np.bincount(labels, self.correct, classes)
        total = np.bincount(labels, minlength=classes)
        return bootstrap(np.round(right / self.repeats), total / self.repeats, classes=False)["classes"]

    def loss(self) -> float:
        """Mean over classes of the negative log-likelihood."""
        own = self.logits.double().log_softmax(dim=1).gather(1, self.truth[:, None])[:, 0]
        return -float(torch.from_numpy(class_weights(self.truth)) @ own)


def scored(logits: Iterable[Tensor], labels: Tensor) -> Scored:
    """Of logits (m, K), which may come in chunks, and labels (N,)."""
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    done = 0
    for chunk in (each.cpu() for each in logits):
        truth = labels[done : done + len(chunk)]
        done += len(chunk)
        step = -(-len(labels) * chunk.shape[1] // HELD)
        parts.append((chunk.argmax(dim=1), truth, chunk[::step].clone(), truth[::step]))
    return of_tensors([torch.cat(part) for part in zip(*parts, strict=True)])


def of_tensors(tensors: Sequence[Tensor], repeats: int = 1) -> Scored:
    """A Scored of its TENSORS."""
    predicted, labels, logits, truth = tensors
    return Scored(predicted, labels, logits, truth, repeats)


def class_weights(labels: Tensor) -> np.ndarray:
    """Return (N,) weights by which a mean over images is the mean over classes; they sum to 1."""
    counts = np.bincount(labels.numpy())
    return np.asarray((1 / counts[labels.numpy()]) / np.count_nonzero(counts))


def error_of_difference(a: Scored, b: Scored) -> float:
    """Return the standard error, in points, of a.mean_class - b.mean_class over the same images.

    It is that of a stratified mean of paired differences, whose variance within classes is pooled, for a class of one
    image has none.
    """
    labels, difference = a.labels.numpy(), a.correct.astype(float) - b.correct
    counts = np.bincount(labels)
    means = np.bincount(labels, difference) / np.maximum(counts, 1)
    free = len(labels) - np.count_nonzero(counts)
    spread = np.square(difference - means[labels]).sum() / free if free else np.square(difference).mean()
    return 100 * float(np.sqrt(a.repeats * spread * np.square(a.weights).sum()))


def decides(labels: np.ndarray, classes: int) -> bool:
    """Whether validation labels (N,) have ENOUGH images of every class to choose among methods."""
    return int(np.bincount(labels, minlength=classes).min()) >= ENOUGH


def choose(candidates: Sequence[Scored]) -> tuple[int, int]:
    """Return the places (chosen, best) of candidates, which are in order, the simplest first.

    The best has the highest mean over classes; chosen is the simplest that is within one standard error of it.
    """
    best = int(np.argmax([one.mean_class for one in candidates]))
    top = candidates[best]
    near = (top.mean_class - one.mean_class <= error_of_difference(top, one) for one in candidates)
    return next(i for i, close in enumerate(near) if close), best


def temperature_of(scored: Scored) -> float:
    """Return T by which the logits are divided so that the loss, a mean over classes, is least.

    Labels are smoothed by 1 / (N + 2), as Platt (1999) does: of a few images that are all right, no confidence would be
    too high.
    """
    smoothing = 1 / (len(scored.labels) // scored.repeats + 2)
    return temperature(scored.logits, scored.truth, torch.from_numpy(class_weights(scored.truth)), smoothing)


def folds(labels: np.ndarray, parts: int, repeats: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (training, scored) positions of repeated stratified cross-validation.

    The only image of a class always trains and is never scored; of every other class each fold leaves an image or more
    to train on.
    """
    for repeat in range(repeats):
        random = np.random.default_rng((seed, repeat))
        fold = np.full(len(labels), -1)
        for label in np.unique(labels):
            rows = random.permutation(np.flatnonzero(labels == label))
            if len(rows) > 1:
                fold[rows] = (np.arange(len(rows)) + random.integers(parts)) % parts
        for part in range(parts):
            if (fold == part).any():
                yield np.flatnonzero(fold != part), np.flatnonzero(fold == part)


def repetitions(images: int, classes: int, width: int) -> int:
    """How often cross-validation is repeated, 0 where it takes too long."""
    size = images * classes * width
    return 2 if size <= SMALL else 1 if size <= LARGE else 0


def cross_validated(
    features: Features, fit: Fitted, classes: int, repeats: int = 1, seed: int = 0, parts: int = FOLDS
) -> list[Scored]:
    """Of each of the S settings, every image of a class of two or more `repeats` times by heads fitted without it."""
    found: list[list[Scored]] = []
    for trained, held in folds(features.labels, parts, repeats, seed):
        rows = features.rows(trained)
        scale = standard(rows)
        counts = torch.from_numpy(np.bincount(features.labels[trained], minlength=classes))
        truth = torch.from_numpy(features.labels[held])
        heads = fit(rows, counts, scale)
        found.append([scored((head(scale(x)) for x, _ in features.rows(held, 1)), truth) for head in heads])
    return [joined(of_setting, repeats) for of_setting in zip(*found, strict=True)]


def joined(parts: Sequence[Scored], repeats: int) -> Scored:
    """The parts of a cross-validation together."""
    return of_tensors([torch.cat([getattr(part, name) for part in parts]) for name in TENSORS], repeats)
