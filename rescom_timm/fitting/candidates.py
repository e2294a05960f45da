"""What may be chosen, and the rule by which it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rescom_timm.engine.features import Features
from rescom_timm.fitting.choice import ENOUGH, Scored, choose, scored
from rescom_timm.fitting.training import Kind, floor_of
from rescom_timm.methods.heads import RIDGES, Head

Weights = dict[str, Tensor]
SHARES = (0.5, 0.25, 0.75)
"""Of the trained net in soups with its start, the default first."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """What may be chosen."""

    name: str
    about: str
    kind: Kind
    weights: Weights
    """Of the whole net."""
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


def row(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate's row of the table, plain JSON.

    name, about, by, and in percent mean_class and its 95% interval, None where there is nothing to score on.
    """
    scored = candidate.scored
    low, high = (None, None) if scored is None else scored.interval()
    value = None if scored is None else scored.mean_class
    about = {"name": candidate.name, "about": candidate.about, "by": candidate.by}
    return {**about, "mean_class": value, "low": low, "high": high}


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
                return place, f"{few}: half of the probe and half of the trained net, which never lost where measured"
    return 0, f"{few}: the probe"
