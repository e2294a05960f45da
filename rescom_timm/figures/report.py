"""One HTML file about one or several runs side by side: opens offline and holds its pictures. A script of its own,
which it can do without, sorts and searches the table of classes.

Everything that comes from a run passes through html.escape. What a run lacks is named, not skipped in silence.
"""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rescom_timm import metrics
from rescom_timm.figures import files, longtail, style
from rescom_timm.figures.classes import Classes
from rescom_timm.figures.classes import measure as measure_classes
from rescom_timm.figures.files import Drawn
from rescom_timm.figures.folder import Evaluation, Missing, RunFolder
from rescom_timm.files import write_text
from rescom_timm.recipe.config import RecipeError
from rescom_timm.recipe.loading import load as load_recipe

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
_SAME = ("seed", "name", "output", "hub", "speed", "checkpoint")  # keys in which runs of one setting may differ
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; } h3 { font-size: 1em; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: 3px 9px; border-bottom: 1px solid #e4e4e4; }
th { text-align: left; background: #f5f5f5; position: sticky; top: 0; } .n { text-align: right; }
td { min-width: 2em; } td.n { white-space: nowrap; } td.text { min-width: 9em; }
td.best { font-weight: bold; } .scroll { overflow: auto; max-height: 36em; } img { max-width: 100%; height: auto; }
pre { background: #f7f7f7; padding: 1em; overflow: auto; font-size: 12px; } .missing { color: #8a4b00; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1em; align-items: start; }
nav ul { columns: 3; padding-left: 1.2em; }
.many, .medium, .few { border-left: 5px solid; padding-left: 6px; }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const rows = [...table.rows].slice(1), search = table.closest("div").previousElementSibling;
  const value = (row, i) => { const t = row.cells[i].textContent, n = parseFloat(t.replaceAll(",", ""));
    return /^[-\\d.,]+%?$/.test(t) ? n : t; };
  [...table.rows[0].cells].forEach((head, i) => {
    let rising = false;
    head.style.cursor = "pointer";
    head.addEventListener("click", () => {
      rising = !rising;
      const order = (a, b) => typeof a == typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a == "number" ? -1 : 1;
      rows.sort((a, b) => order(value(a, i), value(b, i)) * (rising ? 1 : -1));
      for (const row of rows) table.tBodies[0].append(row);
    });
  });
  search.hidden = false;
  search.addEventListener("input", () => {
    const word = search.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
}
"""


def write(
    runs: Sequence[RunFolder], path: str | Path, drawn: Iterable[Drawn] | None = None, evaluation: str = ""
) -> Path:
    """Writes the report of `runs` to one HTML file and returns its path. drawn: its figures, by default all those of
    files.FROM_FILES; evaluation as in files.draw_all."""
    path = Path(path)
    text = page(runs, drawn, evaluation)
    write_text(path, text)
    return path


def page(runs: Sequence[RunFolder], drawn: Iterable[Drawn] | None = None, evaluation: str = "") -> str:
    """The report as text."""
    drawn = files.draw_all(runs, evaluation=evaluation) if drawn is None else drawn
    title = _text(", ".join(run.name for run in runs))
    found: dict[str, Evaluation] = {}
    for run in runs:
        with suppress(Missing):
            found[run.name] = run.evaluation(evaluation)
    missing: list[str] = []
    sections = {
        "Summary": _summary(runs, found),
        "Over seeds": _seeds(runs, found),
        "Classes": _classes(found),
        **_pictures(drawn, missing),
        "Recipes and versions": "\n".join(map(_sources, runs)),
        "Not drawn": "\n".join(missing),
    }
    sections = {heading: content for heading, content in sections.items() if content}
    links = "".join(f'<li><a href="#{_anchor(heading)}">{_text(heading)}</a></li>' for heading in sections)
    parts = [f"<h1>{title}</h1>", f"<nav><ul>{links}</ul></nav>"]
    for heading, content in sections.items():
        parts += [f'<h2 id="{_anchor(heading)}">{_text(heading)}</h2>', content]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}{_group_style()}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def summary(run: RunFolder, found: Evaluation | None) -> dict[str, str | float | None]:
    """One line of the summary: what the recipe says, which evaluation, its numbers in percent; None: not recorded."""
    recipe = run.recipe()
    said = {name: _at(recipe, path) for name, path in _RECIPE.items()}
    numbers = found.numbers or _recomputed(found) if found else {}
    return (
        {"run": run.name}
        | {name: None if value is None else str(value) for name, value in said.items()}
        | {"evaluation": found.name if found else None, "chosen": (found.chosen or None) if found else None}
        | {"images": float(len(found.labels)) if found else None}
        | {shown: _number(numbers.get(name)) for name, shown in _NUMBERS.items()}
    )


def _recomputed(found: Evaluation) -> dict[str, float]:
    """The numbers that follow from the predictions alone, for an evaluation without its JSON."""
    correct = found.predicted == found.labels
    numbers = {"top1": 100 * float(correct.mean())}
    if found.counts is not None:
        group = style.group_of(found.counts)[found.labels]
        numbers |= {name: 100 * float(correct[group == name].mean()) for name in style.present(group)}
    return numbers


def _summary(runs: Sequence[RunFolder], found: Mapping[str, Evaluation]) -> str:
    rows = [summary(run, found.get(run.name)) for run in runs]
    best = {name: _best(name, [row[name] for row in rows]) for name in _NUMBERS.values()}
    cells = []
    for row in rows:
        cells.append("".join(_td(value, value is not None and value == best.get(name)) for name, value in row.items()))
    note = (
        f"Accuracies and ECE in percent. {metrics.GROUPS_DEFINED}; class mean: the mean of all classes' accuracies. "
        "chosen: how the checkpoint was chosen. " + ("Bold: the best of the runs." if len(runs) > 1 else "")
    )
    head = "".join(_th(name) for name in rows[0])
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div><p>{note}</p>'


def _best(name: str, values: Sequence[object]) -> float | None:
    numbers = [value for value in values if isinstance(value, float)]
    return (min if name == "ECE" else max)(numbers) if len(numbers) > 1 else None


def over_seeds(
    runs: Sequence[RunFolder], found: Mapping[str, Evaluation]
) -> list[tuple[list[str], dict[str, tuple[float, float]]]]:
    """Runs whose recipes differ in nothing but the seed (and where they are written, and their speed), with at least
    two seeds and an evaluation of the same name: their names, and of each number the mean and the sample deviation."""
    alike: dict[str, dict[str, RunFolder]] = {}
    for run in runs:
        recipe = _whole(run)
        if run.name in found and recipe:
            kept = {key: value for key, value in recipe.items() if key not in _SAME}
            setting = json.dumps([kept, found[run.name].name], sort_keys=True, default=str)
            # The same seed twice is no second sample.
            alike.setdefault(setting, {}).setdefault(str(recipe.get("seed", 0)), run)
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


def _whole(run: RunFolder) -> dict[str, Any]:
    """The recipe with every key that later versions have added; as it was saved where it is not one of ours."""
    with suppress(RecipeError):
        return load_recipe(run.path / "recipe.yaml").to_dict()
    return run.recipe()


def _seeds(runs: Sequence[RunFolder], found: Mapping[str, Evaluation]) -> str:
    groups = over_seeds(runs, found)
    if not groups:
        return ""
    by_name = {run.name: run for run in runs}
    names = [name for name in _NUMBERS.values() if any(name in numbers for _, numbers in groups)]
    head = "".join(_th(name) for name in ("runs", *_RECIPE, "evaluation", *names) if name != "seed")
    body = ""
    for members, numbers in groups:
        recipe = by_name[members[0]].recipe()
        said = [_at(recipe, path) for name, path in _RECIPE.items() if name != "seed"]
        cells = [", ".join(members), *said, found[members[0]].name]
        line = "".join(_td(None if value is None else str(value)) for value in cells)
        for name in names:
            both = f"{numbers[name][0]:.1f} &plusmn; {numbers[name][1]:.1f}" if name in numbers else "&ndash;"
            line += f'<td class="n">{both}</td>'
        body += f"<tr>{line}</tr>"
    return (
        f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>\n'
        "<p>Mean and sample standard deviation of runs that differ in nothing but their seed.</p>"
    )


def _pictures(figures: Iterable[Drawn], missing: list[str]) -> dict[str, str]:
    """Of each figure, under its title, the runs' pictures side by side; in `missing`, in words, those that are not
    there."""
    found: dict[str, str] = {}
    for drawn in figures:
        title = _TITLES[drawn.name]
        if drawn.figure is None:
            missing.append(f'<p class="missing">No picture of {_text(title)}: {_text(drawn.missing)}.</p>')
            continue
        buffer = io.BytesIO()
        style.write(drawn.figure, buffer, dpi=110)
        image = base64.b64encode(buffer.getvalue()).decode("ascii")
        alt = _text(f"{drawn.name} {drawn.run}".strip())
        found[title] = found.get(title, "") + f'<img alt="{alt}" src="data:image/png;base64,{image}">\n'
    return {title: f'<div class="pair">{images}</div>' for title, images in found.items()}


def _classes(found: Mapping[str, Evaluation]) -> str:
    """Per-class accuracy of all runs side by side; runs with other classes or counts get a table of their own."""
    tables: list[dict[str, longtail.LongTail]] = []
    for name, evaluation in found.items():
        if evaluation.counts is None:
            continue
        tail = longtail.measure(evaluation)
        same = [table for table in tables if _same_classes(next(iter(table.values())), tail)]
        (same[0] if same else tables.append({}) or tables[-1])[name] = tail  # type: ignore[func-returns-value]
    if not tables:
        return '<p class="missing">No per-class table: no run has an evaluation that records its training counts.</p>'
    details = measure_classes(next(iter(found.values()))) if len(found) == 1 else None
    return "\n".join(_class_table(table, details) for table in tables)


def _same_classes(one: longtail.LongTail, other: longtail.LongTail) -> bool:
    return one.class_names == other.class_names and np.array_equal(one.counts, other.counts)


def _class_table(tails: Mapping[str, longtail.LongTail], details: Classes | None) -> str:
    first = next(iter(tails.values()))
    accuracies: list[npt.NDArray[np.float64]] = [tail.accuracy for tail in tails.values()]
    head = ["class", "name", "training images", "group", "test images", *(f"{name}, percent" for name in tails)]
    names = dict(zip(first.classes.tolist(), first.class_names, strict=True))
    if details is not None:
        head[-1:] = ["accuracy", "precision", "F1", "most confused with"]
    lines = []
    for place, label in enumerate(first.classes):
        group = str(first.groups[place])
        numbers = "".join(f'<td class="n">{_cell(_number(accuracy[place]))}</td>' for accuracy in accuracies)
        if details is not None:
            more = (details.precision[label], details.f1[label])
            numbers += "".join(f'<td class="n">{_cell(_number(value))}</td>' for value in more)
            other = int(details.confused[label])
            taken = f"{_text(names[other])}, {details.share[label]:.0f}%" if other >= 0 else "&ndash;"
            numbers += f"<td>{taken}</td>"
        lines.append(
            f'<tr><td class="n">{label}</td><td>{_text(first.class_names[place])}</td>'
            f'<td class="n">{first.counts[place]:,}</td><td><span class="{group}">{group}</span></td>'
            f'<td class="n">{first.tested[place]:,}</td>{numbers}</tr>'
        )
    heads = "".join(f"<th>{_text(name)}</th>" for name in head)
    note = "" if details is None else "<p>Accuracy, precision and F1 in percent, of test images.</p>"
    search = '<input type="search" class="search" placeholder="search a class" hidden>'
    return f'{search}<div class="scroll"><table class="sortable"><tr>{heads}</tr>{"".join(lines)}</table></div>{note}'


def _sources(run: RunFolder) -> str:
    recipe, environment = run.recipe_text(), run.environment()
    versions = json.dumps(environment, indent=2, ensure_ascii=False) if environment else ""
    return (
        f"<h3>{_text(run.name)}</h3><p>{_text(run.path)}</p>"
        f"<details open><summary>recipe</summary>{_file(recipe, 'recipe.yaml')}</details>"
        f"<details><summary>versions and environment</summary>{_file(versions, 'environment.json')}</details>"
    )


def _file(content: str, name: str) -> str:
    return f"<pre>{_text(content)}</pre>" if content else f'<p class="missing">No {name} in this run.</p>'


def _group_style() -> str:
    return "".join(f".{name} {{ border-color: {style.GROUP_COLORS[name]}; }} " for name in metrics.GROUPS)


def _at(recipe: Mapping[str, Any], path: str) -> object:
    """The value at a dotted path; None where it leads nowhere."""
    value: Any = recipe
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _th(name: str) -> str:
    """Headings of numbers stand over them, at the right."""
    return f'<th class="n">{_text(name)}</th>' if name in (*_NUMBERS.values(), "images") else f"<th>{_text(name)}</th>"


def _td(value: str | float | None, best: bool = False) -> str:
    kind = "n best" if best else "n"
    if not isinstance(value, float):
        kind = "text" if value is not None and " " in value else ""
    return f'<td class="{kind}">{_cell(value)}</td>' if kind else f"<td>{_cell(value)}</td>"


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value > 100 else f"{value:.1f}"
    return "&ndash;" if value is None else _text(value)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
