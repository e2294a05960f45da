"""One HTML file about one or several runs side by side: it opens offline and contains its pictures.

A script in it sorts and searches the table of classes. The template text/report.html escapes everything that comes from
a run. Data that a run lacks is named. All classes stand in the CSV beside it, the findings in the JSON.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rescom_timm.analysis import classes, examples, pages, plots, style
from rescom_timm.analysis.classes import Classes
from rescom_timm.analysis.conclusions import conclusions
from rescom_timm.analysis.examples import ClassExamples
from rescom_timm.analysis.plots import Drawn
from rescom_timm.analysis.report_tables import CLASSES_SHOWN, ReportTable, class_tables, confusions, seeds, summaries
from rescom_timm.analysis.run_files import Evaluation, Missing, RunFolder
from rescom_timm.text.pages import render

_SECTIONS = {
    "longtail": "Groups",
    "confusion": "Confusion",
    "reliability": "Reliability",
    "curves": "Learning curves",
    "robustness": "Robustness to corruptions",
}
"""The other plots are folded away."""
_MORE = "More plots"
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


@dataclass(frozen=True)
class Section:
    """Under a heading: texts, what is missing, tables, images of classes, pictures, and the files of runs.

    pictures: title, alt, and png in base64. folded: the summary of a section that is closed at first.
    """

    heading: str
    missing: list[str] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    runs: list[dict[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    examples: list[ClassExamples] = field(default_factory=list)
    folded: str = ""

    @property
    def anchor(self) -> str:
        """Name of the section's link."""
        return re.sub(r"\W+", "-", self.heading.lower())


@dataclass(frozen=True)
class Findings:
    """Of runs by name: their evaluations, the metrics of each class, and images of the worst ones with why not."""

    evaluations: dict[str, Evaluation]
    classes: dict[str, Classes]
    examples: list[ClassExamples]
    missing: str


def write(
    runs: Sequence[RunFolder], path: str | Path, drawn: Iterable[Drawn] | None = None, evaluation: str = "",
    overrides: Sequence[str] = (),
) -> list[Path]:  # fmt: skip
    """Write the report of `runs` to one HTML file, with its findings beside it; returns the paths (`pages.files`).

    drawn: its plots, by default all of plots.FROM_FILES; evaluation and overrides as in plots.draw_all.
    """
    found = find(runs, evaluation, overrides)
    tables = [classes.table(one, found.classes[name]) for name, one in found.evaluations.items()]
    columns = {name: [value for table in tables for value in table[name]] for name in (tables[0] if tables else ())}
    text = page(runs, drawn, evaluation, found, pages.files(path)[1].name)
    return pages.write(path, text, columns, record(found))


def find(runs: Sequence[RunFolder], evaluation: str = "", overrides: Sequence[str] = ()) -> Findings:
    """What the report states. Images are read for a single run."""
    found: dict[str, Evaluation] = {}
    for run in runs:
        with suppress(Missing):
            found[run.name] = run.evaluation(evaluation)
    details = {name: classes.measure(one) for name, one in found.items()}
    if len(runs) > 1 or not found:
        return Findings(found, details, [], "")
    ((name, one),) = found.items()
    rare = classes.rarest(one, details[name])
    try:
        images = examples.measure(one, details[name], rare, *examples.split_of(runs[0], one, overrides)) if rare else []
    except Missing as error:
        return Findings(found, details, [], f"No images of the worst classes: {error}.")
    return Findings(found, details, images, "")


def record(found: Findings) -> dict[str, object]:
    """The findings as plain JSON: for each run its conclusions, metrics, most frequent confusions and images shown."""
    runs = []
    for name, one in found.evaluations.items():
        pairs = classes.confusions(one)[:CLASSES_SHOWN]
        runs.append({
            "run": name, "evaluation": one.name, "chosen": one.chosen, "conclusions": conclusions(one),
            "group_limits": list(one.limits), "numbers": one.numbers,
            "intervals": {key: list(ends) for key, ends in one.intervals.items()},
            "confusions": [
                {"name": one.class_names[label], "taken_for": one.class_names[other], "images": images}
                for label, other, images in pairs
            ],
        })  # fmt: skip
    shown = [
        {"name": one.name, "about": one.about}
        | {"images": [
            {key: value for key, value in dataclasses.asdict(image).items() if key != "thumbnail"}
            for image in one.images
        ]}
        for one in found.examples
    ]  # fmt: skip
    return {"runs": runs, "worst_classes": shown}


def page(
    runs: Sequence[RunFolder], drawn: Iterable[Drawn] | None = None, evaluation: str = "",
    found: Findings | None = None, table: str = "report-findings.csv",
) -> str:  # fmt: skip
    """The report as text. found: by default `find` of the runs; table: name of the CSV beside it."""
    found = find(runs, evaluation) if found is None else found
    missing: list[str] = []
    pictures = _pictures(plots.draw_all(runs, evaluation=evaluation) if drawn is None else drawn, missing)
    if found.examples:
        pictures[_MORE] = [one for one in pictures.get(_MORE, []) if one["title"] != _TITLES["rare"]]
    several = len(found.evaluations) > 1
    every = found.evaluations.items()
    tables = {
        "Groups": [summaries(runs, found.evaluations), *seeds(runs, found.evaluations)],
        "Confusion": [confusions(one, found.classes[name], several) for name, one in every],
    }
    more = pictures.get(_MORE, [])
    sections = [
        Section("Conclusions", texts=[text for _, one in every for text in _concluded(one, several)]),
        Section(
            "Worst rare classes",
            [found.missing] if found.missing else [],
            texts=[examples.LEGEND] if found.examples else [],
            examples=found.examples,
        ),
        *(Section(one, tables=tables.get(one, []), pictures=pictures.get(one, [])) for one in _SECTIONS.values()),
        Section(
            "Classes",
            [] if found.evaluations else ["No per-class table: no run has an evaluation with predictions."],
            class_tables(found.evaluations, found.classes, table),
        ),
        Section(_MORE, pictures=more, folded=", ".join(dict.fromkeys(one["title"] for one in more))),
        Section("Recipes and versions", runs=[_sources(run) for run in runs]),
        Section("Not drawn", missing, folded=f"{len(missing)} plots that need what the run does not have"),
    ]
    shown = [one for one in sections if any(vars(one)[name] for name in vars(one) if name not in ("heading", "folded"))]
    title = ", ".join(run.name for run in runs)
    return render("report.html", title=title, sections=shown, colors=style.GROUP_COLORS)


def _concluded(found: Evaluation, named: bool) -> list[str]:
    first, *others = conclusions(found)
    return [f"{found.run}: {first}" if named else first, *others]


def _pictures(drawings: Iterable[Drawn], missing: list[str]) -> dict[str, list[dict[str, str]]]:
    """The pictures of each section; adds to `missing` those that cannot be drawn."""
    found: dict[str, list[dict[str, str]]] = {}
    for drawn in drawings:
        title = _TITLES[drawn.name]
        if drawn.figure is None:
            missing.append(f"No picture of {title}: {drawn.missing}.")
            continue
        buffer = io.BytesIO()
        style.write(drawn.figure, buffer, dpi=110)
        png = base64.b64encode(buffer.getvalue()).decode("ascii")
        picture = {"title": title, "alt": f"{title} {drawn.run}".strip(), "png": png}
        found.setdefault(_SECTIONS.get(drawn.name, _MORE), []).append(picture)
    return found


def _sources(run: RunFolder) -> dict[str, str]:
    environment = run.environment()
    versions = json.dumps(environment, indent=2, ensure_ascii=False) if environment else ""
    return {"name": run.name, "path": str(run.path), "recipe": run.recipe_text(), "versions": versions}
