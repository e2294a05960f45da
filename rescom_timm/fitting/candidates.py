"""What may be chosen, and the rule by which it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import load_file
from torch import Tensor

from rescom_timm.config.recipe import Recipe
from rescom_timm.engine.features import Features
from rescom_timm.fitting.choice import ENOUGH, Scored, choose, scored
from rescom_timm.fitting.soups import soup
from rescom_timm.fitting.training import Kind, floor_of, weights_of
from rescom_timm.methods.heads import RIDGES, Head
from rescom_timm.models.net import Net

Weights = dict[str, Tensor]
SHARES = (0.5, 0.25, 0.75)
"""Of the trained net in soups with its start, the default first."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """What may be chosen."""

    name: str
    about: str
    kind: Kind
    weights: Callable[[], Weights]
    """Of the whole net, read or averaged anew each time: many nets in memory would be too large."""
    scored: Scored | None
    """On validation; None: there is nothing to score it on."""
    by: str = "validation"
    """On what: validation, or cross-validation of the training images."""
    shown: Scored | None = None
    """On the validation images, few as they may be."""
    start: Scored | None = None
    """Of a soup: its start's `shown`."""
    fitted: tuple[str, int] | None = None
    """Of a head over features: its kind and the place of its setting."""
    factor: float = 1.0
    """By which that head was scaled."""
    tried: int = 1
    """Settings among which validation chose: the more they are, the more its figure flatters."""
    share: float = 1.0
    """Of the trained net in a soup."""


class Row(TypedDict):
    """A candidate in the table: in percent the mean over classes and its 95% interval, None where nothing scores it."""

    name: str
    about: str
    by: str
    mean_class: float | None
    low: float | None
    high: float | None


def row(candidate: Candidate) -> Row:
    """Return a candidate's row of the table."""
    scored = candidate.scored
    low, high = (None, None) if scored is None else scored.interval()
    value = None if scored is None else scored.mean_class
    return Row(name=candidate.name, about=candidate.about, by=candidate.by, mean_class=value, low=low, high=high)


def encoder_of(net: Net) -> Weights:
    """The weights of a net without its head."""
    return {f"encoder.{name}": value.cpu() for name, value in net.encoder.state_dict().items()}


def with_head(weights: Callable[[], Weights], head: Weights) -> Weights:
    """The weights with another head."""
    return weights() | head


def soup_of(start: Path, training: Recipe, share: float) -> Weights:
    """The average of the weights in a file and those of the training from there, which has this share."""
    return soup([load_file(start), weights_of(training)], [1 - share, share])


def score(head: Head, features: Features) -> Scored:
    """The head on the features of images as they are."""
    return scored((head(values) for values, _ in features.rows(versions=1)), torch.from_numpy(features.labels))


def best(candidates: Sequence[Candidate]) -> int:
    """The place of the simplest candidate within one standard error of the best; all are scored."""
    return choose([one.scored for one in candidates if one.scored is not None])[0]


def decide(candidates: Sequence[Candidate], enough: bool) -> tuple[int, str]:
    """(which candidate, why). enough: whether validation has enough images of each class to choose among methods.

    What has more settings than the probe counts as less simple than all others.
    """
    if enough:
        order = sorted(range(len(candidates)), key=lambda i: candidates[i].tried > len(RIDGES))
        scores = [scored for i in order if (scored := candidates[i].scored) is not None]
        place, top_place = (order[i] for i in choose(scores))
        if place == top_place:
            return place, "the best on validation, and no simpler one is within a standard error of it"
        top = candidates[top_place]
        return place, f"the simplest within one standard error of the best on validation, {top.name}"
    few = f"validation has fewer than {ENOUGH} images of a class, so nothing is chosen among methods"
    for place, one in enumerate(candidates):
        if one.name.startswith("soup"):
            floor = floor_of(one.start)
            if one.shown is None or floor is None or one.shown.mean_class >= floor:
                return place, f"{few}: the average of the net before and after training, as it was rarely worse"
    return 0, f"{few}: the probe"
