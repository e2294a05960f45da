"""Runs, exports and tables of predictions compared image by image.

read(path) -> Answers              what one of them says of every image
measure(answers) -> Compared       seeds of one recipe together, the first system against each other one
table, record, draw, text          the same data for the CSV and JSON, as a picture, for a terminal
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.class_names import nfc
from rescom_timm.config.loading import load as load_recipe
from rescom_timm.data.sources import load as load_data
from rescom_timm.data.sources import numbered_as
from rescom_timm.engine.evaluate import digest_of
from rescom_timm.engine.evaluate import table as text_table
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.inference.export import DETAILS
from rescom_timm.inference.predict import predict
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.metrics import CONFIDENCE, LIMITS, Limits, span
from rescom_timm.paired import Comparison, compare
from rescom_timm.text import counted


@dataclass(frozen=True, eq=False)
class Answers:
    """Of N images in order: the class (a name) of each, and whether it was labelled right."""

    name: str
    labels: Sequence[str]
    right: npt.NDArray[np.bool_]
    images: Sequence[str] | None = None
    """What the images are called, where that is known."""
    digest: str | None = None
    """Of labels and images, as evaluations record it."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Training images by class name; empty where they are not known."""
    limits: Limits = LIMITS
    setting: str | None = None
    """Equal for runs that differ in nothing but the seed."""
    seed: str = ""


def read(path: str | Path, name: str = "", split: str = "test", checkpoint: str = "last") -> Answers:
    """Read the answers of a run, an export or a table of predictions with true labels.

    Of a run they are its evaluation <split>-<checkpoint>; an export predicts now, on the data of its recipe. Raises
    ValueError and FileNotFoundError.
    """
    path = Path(path)
    name = name or path.stem
    if path.is_file():
        return _of_table(path, name)
    if (path / DETAILS).is_file():
        return _of_export(path, name, split)
    run = RunFolder(path, name)
    stem = f"{split}-{checkpoint}"
    if stem not in run.evaluations():
        raise MissingFileError(
            "run.evaluation",
            f"{path} has no evaluation {stem}: write it with rescom-timm evaluate {path} --split {split} --checkpoint "
            f"{checkpoint}",
        )
    found = run.evaluation(stem)
    names = [nfc(str(one)) for one in found.class_names]
    counts = {} if found.counts is None else dict(zip(names, found.counts.tolist(), strict=True))
    setting, seed = run.setting() or (None, "")
    labels = [names[k] for k in found.labels.tolist()]
    return Answers(
        run.name,
        labels,
        found.labels == found.predicted,
        None,
        found.digest or None,
        counts,
        found.limits,
        setting,
        seed,
    )


def _of_table(path: Path, name: str) -> Answers:
    """Of a table that `predict` wrote: image, label_1, true_label."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except csv.Error as error:
        raise InputError("run.evaluation", f"{path} is no table of predictions: {error}") from error
    missing = {"image", "label_1", "true_label"} - set(rows[0] if rows else ())
    if missing or any(not row["true_label"] for row in rows):
        what = f"columns {', '.join(sorted(missing))}" if missing else "true_label of every image"
        raise InputError(
            "run.evaluation", f"{path} has no {what}: write it with rescom-timm predict MODEL --data SOURCE -o {path}"
        )
    labels = [nfc(row["true_label"]) for row in rows]
    right = np.array([nfc(row["label_1"]) == label for row, label in zip(rows, labels, strict=True)])
    return Answers(name, labels, right, [row["image"] for row in rows])


def _of_export(path: Path, name: str, split: str) -> Answers:
    model = from_pretrained(path)
    if model.recipe is None or model.counts is None:
        raise InputError(
            "run.evaluation",
            f"{path} holds no recipe, so its test images are not known: compare a table of rescom-timm predict --data",
        )
    data = numbered_as(load_data(load_recipe(path / "recipe.yaml").data), model.class_names, str(path))
    part = {"test": data.test, "validation": data.validation}.get(split)
    if part is None:
        raise InputError("data.split", f"the recipe of {path} has no {split} split")
    found = predict(model, part, top_k=1, class_names=data.class_names)
    labels = [nfc(one.label) for one in found]
    right = np.array([bool(one.labels) and one.labels[0] == one.label for one in found])
    counts = dict(zip(map(nfc, model.class_names), model.counts.tolist(), strict=True))
    return Answers(name, labels, right, [one.image for one in found], digest_of(part), counts, model.limits)


def _below(images: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of images below the folder that all share: the same for a data set that has moved."""
    paths = [PurePath(image).parts for image in images]
    first, last = min(path[:-1] for path in paths), max(path[:-1] for path in paths)
    shared = next((k for k, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))
    return [path[shared:] for path in paths]


def aligned(first: Answers, other: Answers) -> npt.NDArray[np.bool_]:
    """other.right (N,) in the order of first's images. Raises InputError where they are not the same images."""
    right, labels, others = other.right, list(other.labels), False
    if first.images is not None and other.images is not None:
        wanted, found = _below(first.images), _below(other.images)
        place = {image: k for k, image in enumerate(found)}
        if len(place) == len(found) and place.keys() == set(wanted):
            order = [place[image] for image in wanted]
            right, labels = right[order], [labels[k] for k in order]
        others = sorted(wanted) != sorted(found)
    digests = {first.digest, other.digest} - {None}
    if len(right) != len(first.right):
        wrong = f"{len(first.right):,} and {counted(len(right), 'image')}"
    elif labels != list(first.labels):
        differ = sum(a != b for a, b in zip(first.labels, labels, strict=True))
        wrong = f"{counted(differ, 'image')} of other classes"
    elif others or len(digests) > 1:
        wrong = "other images"
    else:
        return right
    raise InputError(
        "run.rows",
        f"{first.name} and {other.name} were evaluated on {wrong}: evaluate both on the same data, in the same split",
    )


@dataclass(frozen=True)
class Compared:
    """names of the systems, the first is compared with each other one; seeds of each; what was found."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    images: int
    classes: int
    limits: Limits
    found: Comparison


def measure(answers: Sequence[Answers], draws: int | None = None) -> Compared:
    """Seeds of one recipe become one system. Raises InputError where the images differ."""
    first = answers[0]
    systems: dict[str, list[Answers]] = {}
    seen: set[tuple[str, str]] = set()
    for number, one in enumerate(answers):
        # The same seed twice is no second sample.
        alone = one.setting is None or (one.setting, one.seed) in seen
        seen.add((one.setting or "", one.seed))
        systems.setdefault(f"{number}" if alone or one.setting is None else one.setting, []).append(one)
    stacks = [np.stack([aligned(first, one) for one in members]) for members in systems.values()]
    names = sorted(set(first.labels))
    counted = next((one for one in answers if one.counts and set(names) <= one.counts.keys()), None)
    counts = None if counted is None else np.array([counted.counts[name] for name in names])
    numbers = {name: k for k, name in enumerate(names)}
    labels = np.array([numbers[label] for label in first.labels])
    limits = LIMITS if counted is None else counted.limits
    options = {} if draws is None else {"draws": draws}
    return Compared(
        tuple(
            members[0].name + (f" ({len(members)} seeds)" if len(members) > 1 else "") for members in systems.values()
        ),
        tuple(map(len, systems.values())),
        len(labels),
        len(names),
        limits,
        compare(stacks, labels, counts, limits, **options),
    )


def text(compared: Compared) -> str:
    """For a terminal: accuracies in percent with their intervals, and what each system adds to the first."""
    found, (first, *others) = compared.found, compared.names
    rows = dict(zip(compared.names, found.accuracies, strict=True))
    beside: dict[str, dict[str, dict[str, str]]] = {
        name: {"95%": {figure: span(ends) for figure, ends in intervals.items()}}
        for name, intervals in zip(compared.names, found.intervals, strict=True)
    }
    told = []
    for name, differences, test, p in zip(others, found.differences, found.tests, found.adjusted, strict=True):
        beside[name] |= {
            "difference": {figure: f"{one.value:+.2f}" for figure, one in differences.items()},
            "its 95%": {figure: f"{one.low:+.1f} {one.high:+.1f}" for figure, one in differences.items()},
            "p": {figure: f"{one.p:.3f}" for figure, one in differences.items()},
        }
        if test is not None:
            gains = f"{counted(test[2], 'image')} gained, {test[1]:,} lost"
            told.append(f"{name} against {first}: McNemar p {test[0]:.3g} ({gains})")
        else:
            told.append(f"{name} against {first}: bootstrap p {differences['top1'].p:.3g} over seeds and images")
        if len(others) > 1:
            told[-1] += f", {p:.3g} by Holm for {len(others)} comparisons"
    about = f"{counted(compared.images, 'image')} of {counted(compared.classes, 'class')}; differences to {first}"
    return "\n".join([about, text_table(rows, beside), *told])


def table(compared: Compared) -> style.Table:
    """One row per system and figure."""
    rows = []
    for place, name in enumerate(compared.names):
        test = compared.found.tests[place - 1] if place else None
        for figure, value in compared.found.accuracies[place].items():
            one = compared.found.differences[place - 1][figure] if place else None
            ends = compared.found.intervals[place][figure]
            rows.append(
                (name, compared.seeds[place], figure, value, *ends)
                + ((None,) * 4 if one is None else (one.value, one.low, one.high, one.p))
                + (test[0] if test and figure == "top1" else None,)
                + (compared.found.adjusted[place - 1] if place and figure == "top1" else None,)
            )
    columns = (
        "run", "seeds", "figure", "percent", "low", "high", "difference", "difference_low", "difference_high",
        "bootstrap_p", "mcnemar_p", "holm_p",
    )  # fmt: skip
    return dict(zip(columns, zip(*rows, strict=True), strict=True))


def record(compared: Compared) -> dict[str, object]:
    """All as plain JSON.

    "systems": name, seeds, "numbers" and "intervals" by figure. "comparisons", of each other system to the first: name,
    "differences" by figure (value, low, high and the bootstrap's p), "mcnemar" (p and the images that one alone labels
    right; null with several seeds) and "holm_p".
    """
    found, (first, *others) = compared.found, compared.names
    about = zip(compared.names, compared.seeds, found.accuracies, found.intervals, strict=True)
    against = zip(others, found.differences, found.tests, found.adjusted, strict=True)
    return {
        "images": compared.images,
        "classes": compared.classes,
        "group_limits": list(compared.limits),
        "confidence": CONFIDENCE,
        "systems": [dict(zip(("name", "seeds", "numbers", "intervals"), one, strict=True)) for one in about],
        "comparisons": [
            {
                "name": name,
                "to": first,
                "differences": {figure: asdict(one) for figure, one in differences.items()},
                "mcnemar": test and dict(zip(("p", "lost", "gained"), test, strict=True)),
                "holm_p": adjusted,
            }
            for name, differences, test, adjusted in against
        ],
    }


def draw(compared: Compared) -> Figure:
    """The difference of every system to the first with its interval, one panel a figure."""
    first, *others = compared.names
    names = list(compared.found.differences[0])
    rules = style.group_labels(compared.limits)
    figure = style.new_figure(1.6 + 2.2 * len(names), 1.5 + 0.35 * len(others))
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    places = np.arange(len(others))
    for panel, name in zip(panels, names, strict=True):
        found = [differences[name] for differences in compared.found.differences]
        value = np.array([one.value for one in found])
        ends = [value - [one.low for one in found], [one.high for one in found] - value]
        shade = style.GROUP_COLORS.get(name, style.GREY)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.errorbar(value, places, xerr=ends, fmt="o", color=shade, capsize=3, markersize=5)
        style.tidy(panel, rules.get(name, name.replace("_", " ")), "points", "", "x")
        panel.set_ylim(len(others) - 0.5, -0.5)
        panel.set_yticks(places, [style.plain(other, 40) for other in others])
    what = f"difference to {style.plain(first, 50)} with 95% intervals, {counted(compared.images, 'image')}"
    figure.suptitle(what, fontsize=10, x=0.01, ha="left")
    return figure
