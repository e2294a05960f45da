"""What an evaluation says, in sentences with numbers: the beginning of the report."""

from __future__ import annotations

import numpy as np

from rescom_timm import metrics
from rescom_timm.analysis import classes, style
from rescom_timm.analysis.run_files import Evaluation
from rescom_timm.text import counted

NAMED = 5
"""Classes that are named at most."""


def conclusions(found: Evaluation) -> list[str]:
    """State in sentences what an evaluation shows.

    Accuracy and groups with their intervals; the rare classes whose interval lies below or above it, and what they
    are taken for; which classes have too few test images to say; whether the probabilities are too high.
    """
    right = found.labels == found.predicted
    accuracy, tested = 100 * float(right.mean()), found.tested
    mean = 100 * float(np.mean(found.correct[tested > 0] / tested[tested > 0]))
    told = [
        f"{accuracy:.1f}% of {counted(len(right), 'image')} are right{_interval(found, 'top1')}; the mean "
        f"over {counted(int((tested > 0).sum()), 'class')} is {mean:.1f}%{_interval(found, 'mean_class')}."
    ]
    if found.counts is not None:
        told += [*_groups(found), *_rare(found)]
    told += _untested(found)
    gap = 100 * float(found.confidence.mean()) - accuracy
    if abs(gap) >= 3:
        kind = "too high" if gap > 0 else "too low"
        told.append(
            f"The probabilities are {kind}: their mean is {accuracy + gap:.1f}% at an accuracy of {accuracy:.1f}%."
        )
    return told


def _interval(found: Evaluation, name: str) -> str:
    return f" ({metrics.span(found.intervals[name])})" if name in found.intervals else ""


def _groups(found: Evaluation) -> list[str]:
    assert found.counts is not None
    parts = []
    for name, members in metrics.groups(found.counts, found.limits).items():
        images, number = found.size(name)
        if images:
            value = 100 * found.correct[members.numpy()].sum() / images
            of = f"{counted(number, 'class')}, {counted(images, 'test image')}"
            parts.append(f"{name} {value:.1f}%{_interval(found, name)}, {of}")
    return [f"By group: {'; '.join(parts)}."]


def _rare(found: Evaluation) -> list[str]:
    """Rare classes whose whole interval lies below, or above, the accuracy of all images, the most extreme first."""
    assert found.counts is not None
    details = classes.measure(found)
    rare = classes.rarest(found, details)
    if rare is None or rare.group == "many":
        return []
    number, all_images = len(rare.classes), f"the accuracy of all images ({details.overall:.1f}%)"
    if not rare.failing:
        width = float(np.median((details.high - details.low)[rare.classes]))
        told = [
            f"No class of {rare.group} has its whole 95% interval below {all_images}; the interval of one of the "
            f"{number:,} is {width:.0f} points wide in the median."
        ]
    else:
        failing = [
            f"{_trained(found, k)}: {found.correct[k]} of {found.tested[k]} right"
            + (f", {details.taken[k]} taken for {found.class_names[details.confused[k]]}" if details.taken[k] else "")
            for k in rare.classes[: min(NAMED, rare.failing)].tolist()
        ]
        told = [
            f"{rare.failing:,} of {counted(number, 'class')} of {rare.group} have their whole 95% interval below "
            f"{all_images}, where about {0.025 * number:,.1f} would by chance: {_list(failing, rare.failing, '; ')}."
        ]
    above = rare.classes[details.verdict[rare.classes] == "high"][::-1]
    if len(above):
        named = [_trained(found, k) for k in above[:NAMED].tolist()]
        told.append(f"{len(above):,} of {number:,} above it: {_list(named, len(above), ', ')}.")
    return told


def _trained(found: Evaluation, k: int) -> str:
    assert found.counts is not None
    return f"{found.class_names[k]} ({counted(int(found.counts[k]), 'training image')})"


def _list(parts: list[str], number: int, separator: str) -> str:
    return separator.join(parts) + (f"{separator}and {number - len(parts):,} more" if number > len(parts) else "")


def _untested(found: Evaluation) -> list[str]:
    none, thin = int((found.tested == 0).sum()), int(((found.tested > 0) & (found.tested < style.THIN)).sum())
    parts = []
    if thin:
        parts.append(f"{_classes_have(thin)} fewer than {style.THIN} test images")
    if none:
        parts.append(f"{_classes_have(none)} no test image")
    return [f"{' and '.join(parts)}: read their accuracies with their intervals."] if parts else []


def _classes_have(number: int) -> str:
    return f"{counted(number, 'class')} {'have' if number > 1 else 'has'}"
