"""Tables of the report: runs side by side, mean over seeds, confusions, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rescom_timm import metrics
from rescom_timm.analysis import classes, style
from rescom_timm.analysis.classes import Classes
from rescom_timm.analysis.run_files import Evaluation, RunFolder
from rescom_timm.engine.collapse import last_state, sentence
from rescom_timm.engine.run_folder import lines
from rescom_timm.text import counted

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
_NONE = "\N{EN DASH}"
CLASSES_SHOWN = 200
"""Classes in the page; the CSV has all."""
PAIRS_SHOWN = 15


class Td(NamedTuple):
    """A cell of a table."""

    text: str
    kind: str = ""
    """Classes of HTML: n for a number, best, wide for what a narrow screen leaves out, low, high, thin of classes."""
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


def summary(run: RunFolder, found: Evaluation | None) -> dict[str, str | float | None]:
    """One column of the summary: settings, evaluation, and its metrics in percent; None: not recorded."""
    recipe = run.recipe()
    settings = {name: _at(recipe, path) for name, path in _RECIPE.items()}
    numbers = found.numbers or _recomputed(found) if found else {}
    return (
        {"run": run.name}
        | {shown: _number(numbers.get(name)) for name, shown in _NUMBERS.items()}
        | {name: None if value is None else str(value) for name, value in settings.items()}
        | {"evaluation": found.name if found else None, "chosen": (found.chosen or None) if found else None}
        | {"images": len(found.labels) if found else None}
    )


def _recomputed(found: Evaluation) -> dict[str, float]:
    """The numbers that follow from the predictions alone, for an evaluation without its JSON."""
    correct = found.predicted == found.labels
    numbers = {"top1": 100 * float(correct.mean())}
    group = found.groups[found.labels]
    return numbers | {name: 100 * float(correct[group == name].mean()) for name in style.present(group)}


def summaries(runs: Sequence[RunFolder], found: Mapping[str, Evaluation]) -> ReportTable:
    """One column a run, one row a setting or metric."""
    columns = [summary(run, found.get(run.name)) for run in runs]
    doubts = [_doubts(found.get(run.name)) for run in runs]
    rows = []
    for name in columns[0]:
        if name == "run":
            continue
        values = [column[name] for column in columns]
        best = _best(name, values) if name in _NUMBERS.values() else None
        cells = [
            _td(value, value is not None and value == best, small.get(name, ""))
            for value, small in zip(values, doubts, strict=True)
        ]
        rows.append([Td(name, "name", group=name if name in metrics.GROUPS else ""), *cells])
    limits = next((one.limits for one in found.values()), metrics.LIMITS)
    note = (
        f"Accuracies and ECE in percent. {metrics.groups_defined(limits)}; class mean: the mean of all classes' "
        f"accuracies. {metrics.INTERVALS_DEFINED}, beside the number of test images and classes. "
        "chosen: how the checkpoint was chosen. " + ("Bold: the best of the runs. " if len(runs) > 1 else "")
    )
    states = {run.name: sentence(last_state(lines(run.path / "metrics.jsonl"))) for run in runs}
    note += "".join(f"{name}: {said}. " for name, said in states.items() if said)
    return ReportTable([Td(""), *(Td(run.name, "n") for run in runs)], rows, note)


def _doubts(found: Evaluation | None) -> dict[str, str]:
    """Of each shown accuracy its interval, its images and their classes."""
    doubts = {}
    for name, shown in _NUMBERS.items():
        if found is not None and name in found.intervals:
            images, number = found.size(name)
            of = f"{counted(images, 'image')} of {counted(number, 'class')}"
            doubts[shown] = f"{metrics.span(found.intervals[name])}; {of}"
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
        if run.name in found and (setting := run.setting()):
            # The same seed twice is no second sample.
            alike.setdefault(f"{setting[0]} {found[run.name].name}", {}).setdefault(setting[1], run)
    groups = []
    for members in alike.values():
        rows = [summary(run, found[run.name]) for run in members.values()]
        numbers = {}
        for name in _NUMBERS.values():
            values = [value for row in rows if isinstance(value := row[name], float)]
            if len(values) == len(rows) >= 2:
                numbers[name] = (float(np.mean(values)), float(np.std(values, ddof=1)))
        if numbers:
            groups.append(([run.name for run in members.values()], numbers))
    return groups


def seeds(runs: Sequence[RunFolder], found: Mapping[str, Evaluation]) -> list[ReportTable]:
    """One row for the seeds of a recipe; no table where there are none."""
    groups = over_seeds(runs, found)
    if not groups:
        return []
    by_name = {run.name: run for run in runs}
    names = [name for name in _NUMBERS.values() if any(name in numbers for _, numbers in groups)]
    head = [Td(name, "n" if name in names else "") for name in ("runs", *_RECIPE, "evaluation", *names)
            if name != "seed"]  # fmt: skip
    rows = []
    for members, numbers in groups:
        recipe = by_name[members[0]].recipe()
        said = [_at(recipe, path) for name, path in _RECIPE.items() if name != "seed"]
        row = [_td(None if cell is None else str(cell)) for cell in (", ".join(members), *said, found[members[0]].name)]
        for name in names:
            both = "{:.1f} \N{PLUS-MINUS SIGN} {:.1f}".format(*numbers[name]) if name in numbers else _NONE
            row.append(Td(both, "n"))
        rows.append(row)
    return [ReportTable(head, rows, "Mean and sample standard deviation of runs that differ only in the seed.")]


def confusions(found: Evaluation, details: Classes, named: bool) -> ReportTable:
    """The most frequent confusions with their counts."""
    pairs = classes.confusions(found)
    rows = []
    for label, other, images in pairs[:PAIRS_SHOWN]:
        names = [Td(found.class_names[k], group=str(found.groups[k])) for k in (label, other)]
        ends = metrics.span([float(end) for end in metrics.wilson(images, details.tested[label])])
        rows.append([*names, Td(f"{images:,} of {details.tested[label]:,} ({ends}%)", "n")])
    wrong = sum(images for _, _, images in pairs)
    note = (
        f"The most frequent of {counted(len(pairs), 'pair')} of classes with {counted(wrong, 'wrong image')}; share of "
        "the class's test images, with the 95% interval (Wilson)."
    )
    head = [Td("class" if not named else f"class, {found.run}"), Td("taken for"), Td("images", "n")]
    return ReportTable(head, rows, note)


def class_tables(found: Mapping[str, Evaluation], details: Mapping[str, Classes], csv: str) -> list[ReportTable]:
    """Accuracies of all runs side by side, of other classes in their own table."""
    tables: list[list[str]] = []
    for name, one in found.items():
        for members in tables:
            if _same_classes(found[members[0]], one):
                members.append(name)
                break
        else:
            tables.append([name])
    return [_class_table([(found[name], details[name]) for name in part], csv) for part in tables]


def _same_classes(one: Evaluation, other: Evaluation) -> bool:
    same = list(one.class_names) == list(other.class_names)
    return same and (one.counts is None) == (other.counts is None) and np.array_equal(one.counts, other.counts)  # type: ignore[arg-type]


def _class_table(runs: Sequence[tuple[Evaluation, Classes]], csv: str) -> ReportTable:
    first, details = runs[0]
    accuracy = ["accuracy"] if len(runs) == 1 else [f"{found.run}, percent" for found, _ in runs]
    head = [Td("class", "n wide"), Td("name"), Td("training images", "n"), Td("test images", "n"),
            *(Td(name, "n") for name in accuracy)]  # fmt: skip
    if len(runs) == 1:
        head += [Td("precision", "n wide"), Td("F1", "n wide"), Td("most confused with")]
    rows = []
    for k in details.worst_first[:CLASSES_SHOWN].tolist():
        trained = _NONE if first.counts is None else f"{first.counts[k]:,}"
        row = [Td(str(k), "n wide"), Td(first.class_names[k], group=str(first.groups[k])), Td(trained, "n"),
               Td(f"{details.tested[k]:,}", "n")]  # fmt: skip
        for _, one in runs:
            thin = " thin" if one.tested[k] < style.THIN else ""
            ends = metrics.span((one.low[k], one.high[k])) if one.tested[k] else ""
            row.append(Td(_cell(_number(one.accuracy[k])), f"n {one.verdict[k]}{thin}", small=ends))
        if len(runs) == 1:
            row += [Td(_cell(_number(column[k])), "n wide") for column in (details.precision, details.f1)]
            other = first.class_names[details.confused[k]] if details.taken[k] else _NONE
            row.append(Td(other, small=counted(int(details.taken[k]), "image") if details.taken[k] else ""))
        rows.append(row)
    of = "" if first.num_classes <= CLASSES_SHOWN else f"{CLASSES_SHOWN} of {first.num_classes:,} classes. "
    note = (
        f"{of}The lowest upper end of the interval first; {csv} has all classes. Accuracy in percent with its 95% "
        "interval (Wilson). "
        "Orange: the whole interval lies below the accuracy of all images; blue: above; without colour it may be "
        f"either. Hollow: below {style.THIN} test images."
    )
    return ReportTable(head, rows, note, sortable=True)


def _at(recipe: Mapping[str, object], path: str) -> object:
    """The value at a dotted path; None if there is none."""
    value: object = recipe
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _td(value: str | float | None, best: bool = False, small: str = "") -> Td:
    kind = "n best" if best else "n"
    return Td(_cell(value), kind, small=small if value is not None else "")


def _cell(value: str | float | None) -> str:
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
    return _NONE if value is None else value
