"""One HTML file about one or several runs side by side: it opens offline and contains its pictures.

A script in it sorts and searches the table of classes. The template text/report.html escapes everything that comes from
a run. Data that a run lacks is named.
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rescom_timm import metrics
from rescom_timm.analysis import longtail, plots, style
from rescom_timm.analysis.classes import Classes
from rescom_timm.analysis.classes import measure as measure_classes
from rescom_timm.analysis.conclusions import conclusions
from rescom_timm.analysis.plots import Drawn
from rescom_timm.analysis.run_files import Evaluation, Missing, RunFolder
from rescom_timm.analysis.seeds import setting_of
from rescom_timm.engine.collapse import last_state, sentence
from rescom_timm.engine.run_folder import lines
from rescom_timm.io import write_text
from rescom_timm.text.pages import render

_NUMBERS = {
    "top1": "all",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "mean_class": "class mean",
    "top5": "top-5",
    "ece": "ECE",
}
_RECIPE = {"method": "method.name", "backbone": "net.backbone", "epochs": "train.epochs", "seed": "seed"}
_TITLES = {
    "curves": "Learning curves",
    "schedule": "Learning rate",
    "longtail": "Long tail",
    "confusion": "Confusion matrix",
    "reliability": "Reliability diagram",
    "robustness": "Robustness to corruptions",
    "views": "Augmented views",
    "pairs": "Contrastive pairs in the batch",
    "queue_pairs": "Contrastive pairs against the queue",
    "queues": "Keys of each class in the queue",
    "similarity": "Similarity of positive pairs",
    "gradients": "Gradient of each pair",
    "tsne": "t-SNE of the features",
    "mistakes": "The most confident mistakes",
    "rare": "The rarest classes and what they are taken for",
}
_NONE = "\N{EN DASH}"


class Td(NamedTuple):
    """A cell of a table."""

    text: str
    kind: str = ""
    """Classes of HTML: n for a number, best, text for what needs width."""
    group: str = ""
    small: str = ""
    """Below the text: an interval, a number of images."""


@dataclass(frozen=True)
class ReportTable:
    """Rows under a head, with a note."""

    head: list[Td]
    rows: list[list[Td]]
    note: str = ""
    sortable: bool = False


@dataclass(frozen=True)
class Section:
    """Under a heading: texts, what is missing, tables, pictures (alt, and png in base64), and the files of runs."""

    heading: str
    missing: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    runs: list[dict[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Name of the section's link."""
        return re.sub(r"\W+", "-", self.heading.lower())


def write(
    runs: Sequence[RunFolder], path: str | Path, drawn: Iterable[Drawn] | None = None, evaluation: str = ""
) -> Path:
    """Write the report of `runs` to one HTML file and return its path.

    drawn: its plots, by default all of plots.FROM_FILES; evaluation as in plots.draw_all.
    """
    path = Path(path)
    text = page(runs, drawn, evaluation)
    write_text(path, text)
    return path


def page(runs: Sequence[RunFolder], drawn: Iterable[Drawn] | None = None, evaluation: str = "") -> str:
    """The report as text."""
    drawn = plots.draw_all(runs, evaluation=evaluation) if drawn is None else drawn
    found: dict[str, Evaluation] = {}
    for run in runs:
        with suppress(Missing):
            found[run.name] = run.evaluation(evaluation)
    missing: list[str] = []
    sections = [
        Section("Conclusions", texts=[text for one in found.values() for text in _concluded(one, len(found) > 1)]),
        Section("Summary", tables=[_summary(runs, found)]),
        Section("Over seeds", tables=_seeds(runs, found)),
        _classes(found),
        *_pictures(drawn, missing),
        Section("Recipes and versions", runs=[_sources(run) for run in runs]),
        Section("Not drawn", missing),
    ]
    shown = [one for one in sections if one.texts or one.missing or one.tables or one.pictures or one.runs]
    title = ", ".join(run.name for run in runs)
    return render("report.html", title=title, sections=shown, colors=style.GROUP_COLORS)


def _concluded(found: Evaluation, named: bool) -> list[str]:
    first, *others = conclusions(found)
    return [f"{found.run}: {first}" if named else first, *others]


def summary(run: RunFolder, found: Evaluation | None) -> dict[str, str | float | None]:
    """One row of the summary: settings, evaluation, and its metrics in percent; None: not recorded."""
    recipe = run.recipe()
    settings = {name: _at(recipe, path) for name, path in _RECIPE.items()}
    numbers = found.numbers or _recomputed(found) if found else {}
    return (
        {"run": run.name}
        | {name: None if value is None else str(value) for name, value in settings.items()}
        | {"evaluation": found.name if found else None, "chosen": (found.chosen or None) if found else None}
        | {"images": float(len(found.labels)) if found else None}
        | {shown: _number(numbers.get(name)) for name, shown in _NUMBERS.items()}
    )


def _recomputed(found: Evaluation) -> dict[str, float]:
    """The numbers that follow from the predictions alone, for an evaluation without its JSON."""
    correct = found.predicted == found.labels
    numbers = {"top1": 100 * float(correct.mean())}
    if found.counts is not None:
        group = style.group_of(found.counts, found.limits)[found.labels]
        numbers |= {name: 100 * float(correct[group == name].mean()) for name in style.present(group)}
    return numbers


def _summary(runs: Sequence[RunFolder], found: Mapping[str, Evaluation]) -> ReportTable:
    rows = [summary(run, found.get(run.name)) for run in runs]
    best = {name: _best(name, [row[name] for row in rows]) for name in _NUMBERS.values()}
    doubts = [_doubts(found.get(run.name)) for run in runs]
    cells = [
        [_td(value, value is not None and value == best.get(name), small.get(name, "")) for name, value in row.items()]
        for row, small in zip(rows, doubts, strict=True)
    ]
    limits = next((one.limits for one in found.values()), metrics.LIMITS)
    note = (
        f"Accuracies and ECE in percent. {metrics.groups_defined(limits)}; class mean: the mean of all classes' "
        f"accuracies. {metrics.INTERVALS_DEFINED}, beside the number of test images and classes. "
        "chosen: how the checkpoint was chosen. " + ("Bold: the best of the runs. " if len(runs) > 1 else "")
    )
    states = {run.name: sentence(last_state(lines(run.path / "metrics.jsonl"))) for run in runs}
    note += "".join(f"{name}: {said}. " for name, said in states.items() if said)
    return ReportTable([_th(name) for name in rows[0]], cells, note)


def _doubts(found: Evaluation | None) -> dict[str, str]:
    """Of each shown accuracy its interval, its images and their classes."""
    doubts = {}
    for name, shown in _NUMBERS.items():
        if found is not None and name in found.intervals:
            images, classes = found.size(name)
            doubts[shown] = f"{metrics.span(found.intervals[name])}; n {images:,} of {classes:,}"
    return doubts


def _best(name: str, values: Sequence[object]) -> float | None:
    numbers = [value for value in values if isinstance(value, float)]
    return (min if name == "ECE" else max)(numbers) if len(numbers) > 1 else None


def over_seeds(
    runs: Sequence[RunFolder], found: Mapping[str, Evaluation]
) -> list[tuple[list[str], dict[str, tuple[float, float]]]]:
    """Runs that differ only in the seed (and in output and speed), with evaluations of one name and at least two seeds.

    Returns their names, and the mean and the sample standard deviation of each number.
    """
    alike: dict[str, dict[str, RunFolder]] = {}
    for run in runs:
        if run.name in found and (setting := setting_of(run)):
            # The same seed twice is no second sample.
            alike.setdefault(f"{setting[0]} {found[run.name].name}", {}).setdefault(setting[1], run)
    groups = []
    for seeds in alike.values():
        rows = [summary(run, found[run.name]) for run in seeds.values()]
        numbers = {}
        for name in _NUMBERS.values():
            values = [value for row in rows if isinstance(value := row[name], float)]
            if len(values) == len(rows) >= 2:
                numbers[name] = (float(np.mean(values)), float(np.std(values, ddof=1)))
        if numbers:
            groups.append(([run.name for run in seeds.values()], numbers))
    return groups


def _seeds(runs: Sequence[RunFolder], found: Mapping[str, Evaluation]) -> list[ReportTable]:
    groups = over_seeds(runs, found)
    if not groups:
        return []
    by_name = {run.name: run for run in runs}
    names = [name for name in _NUMBERS.values() if any(name in numbers for _, numbers in groups)]
    head = [_th(name) for name in ("runs", *_RECIPE, "evaluation", *names) if name != "seed"]
    rows = []
    for members, numbers in groups:
        recipe = by_name[members[0]].recipe()
        said = [_at(recipe, path) for name, path in _RECIPE.items() if name != "seed"]
        cells = [", ".join(members), *said, found[members[0]].name]
        row = [_td(None if value is None else str(value)) for value in cells]
        for name in names:
            both = "{:.1f} \N{PLUS-MINUS SIGN} {:.1f}".format(*numbers[name]) if name in numbers else _NONE
            row.append(Td(both, "n"))
        rows.append(row)
    return [ReportTable(head, rows, "Mean and sample standard deviation of runs that differ only in the seed.")]


def _pictures(drawings: Iterable[Drawn], missing: list[str]) -> list[Section]:
    """A section of each plot, with the runs' pictures side by side; adds to `missing` those that cannot be drawn."""
    found: dict[str, Section] = {}
    for drawn in drawings:
        title = _TITLES[drawn.name]
        if drawn.figure is None:
            missing.append(f"No picture of {title}: {drawn.missing}.")
            continue
        buffer = io.BytesIO()
        style.write(drawn.figure, buffer, dpi=110)
        png = base64.b64encode(buffer.getvalue()).decode("ascii")
        picture = {"alt": f"{drawn.name} {drawn.run}".strip(), "png": png}
        found.setdefault(title, Section(title)).pictures.append(picture)
    return list(found.values())


def _classes(found: Mapping[str, Evaluation]) -> Section:
    """Per-class accuracy of all runs side by side; runs with other classes or counts get a table of their own."""
    tables: list[dict[str, longtail.LongTail]] = []
    for name, evaluation in found.items():
        if evaluation.counts is None:
            continue
        tail = longtail.measure(evaluation)
        same = [table for table in tables if _same_classes(next(iter(table.values())), tail)]
        (same[0] if same else tables.append({}) or tables[-1])[name] = tail  # type: ignore[func-returns-value]
    if not tables:
        return Section("Classes", ["No per-class table: no run has an evaluation that records its training counts."])
    details = measure_classes(next(iter(found.values()))) if len(found) == 1 else None
    return Section("Classes", tables=[_class_table(table, details) for table in tables])


def _same_classes(one: longtail.LongTail, other: longtail.LongTail) -> bool:
    return one.class_names == other.class_names and np.array_equal(one.counts, other.counts)


def _class_table(tails: Mapping[str, longtail.LongTail], details: Classes | None) -> ReportTable:
    first = next(iter(tails.values()))
    accuracies: list[npt.NDArray[np.float64]] = [tail.accuracy for tail in tails.values()]
    head = ["class", "name", "training images", "group", "test images", *(f"{name}, percent" for name in tails)]
    names = dict(zip(first.classes.tolist(), first.class_names, strict=True))
    if details is not None:
        head[-1:] = ["accuracy", "precision", "F1", "most confused with"]
    rows = []
    for place, label in enumerate(first.classes):
        group = str(first.groups[place])
        thin = "n thin" if first.tested[place] < style.THIN else "n"
        row_spans = [_span(tail.low[place], tail.high[place]) for tail in tails.values()]
        numbers = [_number(accuracy[place]) for accuracy in accuracies]
        row = [
            Td(str(label), "n"), Td(first.class_names[place]), Td(f"{first.counts[place]:,}", "n"),
            Td(group, group=group), Td(f"{first.tested[place]:,}", "n"),
        ]  # fmt: skip
        row += [Td(_cell(number), thin, small=small) for number, small in zip(numbers, row_spans, strict=True)]
        if details is not None:
            row += [Td(_cell(_number(value)), "n") for value in (details.precision[label], details.f1[label])]
        if details is not None:
            other = int(details.confused[label])
            row.append(Td(f"{names[other]}, {details.share[label]:.0f}%" if other >= 0 else _NONE))
        rows.append(row)
    note = f"Accuracy with its 95% interval (Wilson); grey: below {style.THIN} test images."
    note += "" if details is None else " Accuracy, precision and F1 in percent, of test images."
    return ReportTable([Td(name) for name in head], rows, note, sortable=True)


def _sources(run: RunFolder) -> dict[str, str]:
    environment = run.environment()
    versions = json.dumps(environment, indent=2, ensure_ascii=False) if environment else ""
    return {"name": run.name, "path": str(run.path), "recipe": run.recipe_text(), "versions": versions}


def _at(recipe: Mapping[str, Any], path: str) -> object:
    """The value at a dotted path; None if there is none."""
    value: Any = recipe
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _span(low: float, high: float) -> str:
    return metrics.span((low, high)) if np.isfinite(low) else ""


def _th(name: str) -> Td:
    """Headings of numbers stand over them, at the right."""
    return Td(name, "n" if name in (*_NUMBERS.values(), "images") else "")


def _td(value: str | float | None, best: bool = False, small: str = "") -> Td:
    kind = "n best" if best else "n"
    if not isinstance(value, float):
        kind = "text" if value is not None and " " in value else ""
    return Td(_cell(value), kind, small=small if value is not None else "")


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value > 100 else f"{value:.1f}"
    return _NONE if value is None else value
