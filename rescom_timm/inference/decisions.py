"""Decisions from logits: class priors, the prior of given images, temperature, abstention.

Logits s (N, K) are of evenly frequent classes, or made so by `even_shift`; then softmax(s / T + log q) are the
probabilities where the classes have the frequencies q.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from rescom_timm.config.recipe import Recipe
from rescom_timm.data.sampling import class_probabilities
from rescom_timm.errors import InputError
from rescom_timm.inference.conformal import (
    COVERAGES,
    Kind,
    PredictionSets,
    calibrated,
    needed,
    population,
    with_threshold,
)
from rescom_timm.losses import at_least_float32
from rescom_timm.metrics import LIMITS, Limits, groups, wilson

UNCOUNTED = "this model has no class counts of its training: give the prior as numbers"
LEAST = 200
"""Images from which on a prior is estimated without a warning, or five of each class if that is more."""


def leans(recipe: Recipe) -> bool:
    """Whether the net of this recipe favours frequent classes: by its loss and its sampler."""
    return recipe.method.long_tailed and recipe.loader.sampler not in ("class_balanced", "progressive")


def even_shift(recipe: Recipe | None, counts: Tensor | None, classes: int) -> Tensor:
    """Return what is added to a net's logits, (K,) float64, for those of evenly frequent classes.

    counts: (K,) of training. Raises InputError (predict.prior) where they are needed and not known.
    """
    if recipe is None or not leans(recipe):
        return torch.zeros(classes, dtype=torch.float64)
    if counts is None:
        raise InputError("predict.prior", UNCOUNTED)
    return -torch.from_numpy(class_probabilities(counts.numpy(), recipe.loader.sampler)).log()


def frequencies(prior: Sequence[float] | Tensor | str, counts: Tensor | None, classes: int) -> Tensor:
    """A prior as probabilities (K,) float64: numbers, "uniform" or "train". Raises InputError (predict.prior)."""
    if isinstance(prior, str):
        if prior not in ("uniform", "train"):
            message = f'prior must be {classes} numbers, "uniform", "train" or "estimate", not {prior!r}'
            raise InputError("predict.prior", message)
        if prior == "train" and counts is None:
            raise InputError("predict.prior", UNCOUNTED)
        prior = torch.ones(classes) if prior == "uniform" or counts is None else counts
    share = torch.as_tensor(prior, dtype=torch.float64)
    if (
        share.shape != (classes,)
        or not bool((share >= 0).all())
        or not bool(share.isfinite().all())
        or share.sum() == 0
    ):
        raise InputError(
            "predict.prior",
            f"prior must be {classes} counts or probabilities, one a class, at least 0 and not all 0; "
            f"got {len(share) if share.ndim else 1}: {share.flatten()[:5].tolist()}",
        )
    return share / share.sum()


def shift_of(prior: Tensor | None, even: Tensor, temperature: float = 1.0) -> Tensor:
    """What is added to s / T, (K,) float32: log prior, and `even_shift` over T. prior: (K,); None: as trained."""
    log_prior = -even if prior is None else prior.log()
    return (log_prior + even / temperature).float()


def sets_of(
    logits: Tensor, labels: Tensor, coverage: float, even: Tensor, kind: Kind = "marginal", temperature: float = 1.0,
    prior: Tensor | None = None, counts: Tensor | None = None, limits: Limits = LIMITS,
) -> PredictionSets:  # fmt: skip
    """Prediction sets from a net's logits (N, K) and the labels (N,) of images that it was not trained on.

    even: (K,), of `even_shift`. prior: (K,); None: as the net was trained to answer, and for prevalence-adjusted sets
    the frequencies of these labels. counts, limits and errors: as in `calibrated`.
    """
    adjusted = kind == "prevalence"
    if adjusted and prior is None:
        prior = population(labels, logits.shape[1])
    shift = shift_of(prior, even, temperature)
    probabilities = (logits.float() / temperature + shift).softmax(dim=1)
    found = calibrated(probabilities, labels, coverage, counts, limits, prior if adjusted else None)
    return replace(found, temperature=temperature, shift=shift)


class KeptSets(TypedDict):
    """Prediction sets in an export: images, the prior (K,), thresholds by coverage of both kinds."""

    images: int
    prior: list[float]
    marginal: dict[str, float]
    prevalence: dict[str, float]


def kept_sets(logits: Tensor, labels: Tensor, even: Tensor, temperature: float) -> KeptSets:
    """What an export keeps of its prediction sets; `read_sets` reads it. Arguments: as of `sets_of`.

    Marginal sets as the net answers, prevalence-adjusted ones with the temperature; of each coverage of COVERAGES that
    there are enough images for, the threshold of a class of prior 1.
    """
    prior = population(labels, logits.shape[1])
    kept = KeptSets(images=len(labels), prior=prior.tolist(), marginal={}, prevalence={})
    for coverage in (one for one in COVERAGES if needed(one) <= len(labels)):
        found = sets_of(logits, labels, coverage, even)
        kept["marginal"][f"{coverage}"] = float(found.thresholds[0]) - 1
        found = sets_of(logits, labels, coverage, even, "prevalence", temperature)
        kept["prevalence"][f"{coverage}"] = float((found.thresholds[0] - 1) / prior[0])
    return kept


def read_sets(kept: KeptSets, even: Tensor, temperature: float) -> dict[tuple[Kind, float], PredictionSets]:
    """The prediction sets of an export by kind and coverage. Raises InputError (model.details), KeyError, TypeError."""
    prior, images = torch.tensor(kept["prior"], dtype=torch.float64), int(kept["images"])
    given: tuple[tuple[Kind, float, Tensor | None], ...] = (("marginal", 1.0, None), ("prevalence", temperature, prior))
    numbers = [float(one) for kind, *_ in given for pair in kept[kind].items() for one in pair]
    if prior.shape != even.shape or not bool((prior > 0).all()) or not np.isfinite([*numbers, *prior.tolist()]).all():
        raise InputError("model.details", "kept prediction sets need a finite number above 0 of each class")
    return {
        (kind, float(coverage)): replace(
            with_threshold(float(coverage), float(threshold), torch.ones_like(prior) if own is None else own, images),
            temperature=scale, shift=shift_of(own, even, scale),
        )
        for kind, scale, own in given
        for coverage, threshold in kept[kind].items()
    }  # fmt: skip


def estimated_prior(logits: Tensor, temperature: float = 1.0, rounds: int = 1000, tolerance: float = 1e-6) -> Tensor:
    """The class frequencies (K,) float64 of the images with these logits (N, K), by EM (Saerens et al. 2002, eq. 2.8).

    Warns below max(LEAST, 5 K) images: the estimate then follows single images.
    """
    images, classes = logits.shape
    if images < (least := max(LEAST, 5 * classes)):
        warnings.warn(
            f"the prior is estimated from {images:,} images; with fewer than {least:,} it may do harm: check it, or "
            "give the prior by class names",
            stacklevel=2,
        )
    even = (at_least_float32(logits.detach()) / temperature).softmax(dim=1)
    prior = torch.full((classes,), 1 / classes, dtype=torch.float64)
    for _ in range(rounds):
        weighted = even * prior.to(even)
        new = (weighted / weighted.sum(dim=1, keepdim=True)).double().mean(dim=0)
        change = float((new - prior).abs().max())
        prior = new
        if change < tolerance:
            break
    return prior


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return T that minimises the cross-entropy of softmax(s / T + log pi) of labelled images that were not trained on.

    Guo et al. 2017; pi are the frequencies of labels (N,): otherwise a long-tailed validation part would bias T. Labels
    are smoothed by 1 / (N + 2), as Platt (1999) does: of a few images that are all right, no confidence is too high.

    logits: (N, K). Raises InputError (predict.calibration) without images.
    """
    if not len(labels):
        raise InputError("predict.calibration", "a temperature needs labelled images")
    from scipy.optimize import minimize_scalar  # a quarter of a second

    counts = torch.bincount(labels, minlength=logits.shape[1])
    seen = counts > 0  # the others have no probability
    scores, labels = at_least_float32(logits)[:, seen], (seen.cumsum(0) - 1)[labels]
    prior = counts[seen].to(scores)
    log_prior = (prior / prior.sum()).log()

    def loss(log_temperature: float) -> float:
        adjusted = scores / float(np.exp(log_temperature)) + log_prior
        return float(torch.nn.functional.cross_entropy(adjusted, labels, label_smoothing=1 / (len(labels) + 2)))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def coverage_table(
    confidence: np.ndarray, right: np.ndarray, labels: np.ndarray, counts: np.ndarray | None, limits: Limits = LIMITS,
    kept: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.5),
) -> list[dict[str, float | str]]:  # fmt: skip
    """What abstaining costs and whom: for the surest share of images, the risk and the share kept, of all and by group.

    confidence, right, labels: (N,). counts: (K,) training images. Rows: {"kept", "threshold", "group", "share",
    "risk", "low", "high", "images"}, percent: of the group's images `share` are kept, of these `risk` are wrong
    (95% interval).
    """
    order = np.argsort(-confidence, kind="stable")
    members = {"all": np.ones(len(labels), dtype=bool)}
    if counts is not None:
        members |= {name: np.isin(labels, found.numpy()) for name, found in groups(counts, limits).items()}
    rows: list[dict[str, float | str]] = []
    for share in kept:
        number = max(1, round(share * len(order)))
        inside = np.zeros(len(labels), dtype=bool)
        inside[order[:number]] = True
        for name, member in members.items():
            if not member.any():
                continue
            both = inside & member
            wrong, images = int((~right[both]).sum()), int(both.sum())
            low, high = wilson(wrong, images)
            rows.append({
                "kept": 100 * share, "threshold": float(confidence[order[number - 1]]), "group": name,
                "share": 100 * images / int(member.sum()), "risk": 100 * wrong / images if images else float("nan"),
                "low": float(low), "high": float(high), "images": images,
            })  # fmt: skip
    return rows
