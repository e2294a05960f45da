"""Right and wrong test images of the worst rare classes, from an evaluation and the run's data; no net is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rescom_timm import metrics
from rescom_timm.analysis.classes import Classes, Rarest
from rescom_timm.analysis.pages import Thumbnail, short, thumbnail
from rescom_timm.analysis.run_files import Evaluation, Missing, RunFolder
from rescom_timm.data.decoding import ReadConfig, name_of
from rescom_timm.data.splits import Split
from rescom_timm.engine.errors import FAILURES, message
from rescom_timm.engine.evaluate import data_of, digest_of
from rescom_timm.engine.run_folder import run_recipe
from rescom_timm.text import counted

SHOWN = 6
"""Classes."""
WRONG, RIGHT = 6, 3
"""Images of each class."""
LEGEND = (
    "Classes of the rarest group with mistakes, the lowest upper end of the interval first. Orange: the most confident "
    "mistakes; blue: the most confident right answers. A thumbnail opens its file."
)


@dataclass(frozen=True)
class Example:
    """A test image: its name (its row where it has none), what it was taken for and how surely, in percent."""

    image: str
    row: int
    taken_for: str
    confidence: float
    right: bool
    thumbnail: Thumbnail


@dataclass(frozen=True)
class ClassExamples:
    """A class and its images: the most confident mistakes, then the most confident right ones."""

    name: str
    about: str
    images: tuple[Example, ...]


def split_of(run: RunFolder, found: Evaluation, overrides: Sequence[str] = ()) -> tuple[Split, ReadConfig]:
    """The images of an evaluation, and how they are read. Raises Missing where they cannot be found."""
    try:
        own = run_recipe(run.path)
        recipe = run_recipe(run.path, overrides) if overrides else own
        data = data_of(run.path, own, recipe, found.class_names)
        name = found.name.split("-")[0]
        split = {"test": data.test, "validation": data.validation}.get(name)
    except (*FAILURES, ImportError) as error:
        raise Missing("plot.images", f"the images of run {run.name} cannot be read: {message(error)}") from error
    same = split is not None and np.array_equal(split.labels, found.labels)
    if split is None or not same or (found.digest and found.digest != digest_of(split)):
        raise Missing("plot.images", f"the {name} images of run {run.name} are not those of {found.title}")
    return split, recipe.loader.reading


def measure(
    found: Evaluation, details: Classes, rare: Rarest, split: Split, reading: ReadConfig
) -> list[ClassExamples]:
    """Images of the rarest group's classes, the worst first; classes without mistakes are left out."""
    worst = [k for k in rare.classes.tolist() if details.correct[k] < details.tested[k]][:SHOWN]
    return [
        ClassExamples(
            found.class_names[k],
            _about(found, details, k),
            tuple(_example(found, split, reading, i) for i in _of_class(found, k)),
        )
        for k in worst
    ]


def _of_class(found: Evaluation, label: int) -> npt.NDArray[np.int64]:
    """Positions of WRONG mistakes and RIGHT right images, each the most confident first."""
    own = np.flatnonzero(found.labels == label)
    own = own[np.argsort(-found.confidence[own], kind="stable")]
    right = found.predicted[own] == label
    return np.concatenate([own[~right][:WRONG], own[right][:RIGHT]])


def _about(found: Evaluation, details: Classes, k: int) -> str:
    number = 0 if found.counts is None else int(found.counts[k])
    ends = metrics.span((details.low[k], details.high[k]))
    right = f"{details.correct[k]:,} of {counted(details.tested[k], 'test image')} right ({ends}%)"
    text = f"{counted(number, 'training image')}, {right}"
    if not details.taken[k]:
        return text
    wrong = found.predicted[(found.labels == k) & (found.predicted != k) & (found.predicted >= 0)]
    others, times = np.unique(wrong, return_counts=True)
    order = np.argsort(times, kind="stable")[::-1][:3]
    return f"{text}; taken for " + ", ".join(f"{found.class_names[others[i]]} ({times[i]:,})" for i in order)


def _example(found: Evaluation, split: Split, reading: ReadConfig, i: int) -> Example:
    row, predicted = int(split.rows[i]), int(found.predicted[i])
    stored = split.dataset[int(i)]["image"]
    name = name_of(stored) or f"row {row}"
    taken = "no valid output" if predicted < 0 else found.class_names[predicted]
    share = 100 * float(found.confidence[i])
    right = predicted == int(found.labels[i])
    said = f"right, {share:.0f}%" if right else f"taken for {taken}, {share:.0f}%"
    return Example(name, row, taken, share, right, thumbnail(stored, row, reading, f"{short(name)}\n{said}"))
