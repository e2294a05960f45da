"""What `sweep` does: every combination of some keys, with several seeds, as a table and a plot."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from matplotlib.figure import Figure

from rescom_timm.analysis import style
from rescom_timm.api import train_recipe
from rescom_timm.config.loading import differences, load
from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.engine.errors import FAILURES, message
from rescom_timm.engine.run_folder import lines, run_recipe
from rescom_timm.engine.state import Progress
from rescom_timm.errors import InputError, code_of
from rescom_timm.inference.export import DETAILS
from rescom_timm.io import atomic_path, errors_named, file_lock, read_json, write_json, write_text
from rescom_timm.metrics import span
from rescom_timm.text.pages import markdown as escaped

NUMBERS = ("top1", "many", "medium", "few", "mean_class")
METRICS = (
    *(f"validation_{name}" for name in NUMBERS),
    *NUMBERS,
    *("ece", "trained_thousands", "minutes", "memory_gib"),
)
"""Columns of the table; those of validation rows, by which settings are chosen, come first."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    recipe: str
    presets: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    """(key, value) of the keys that vary."""
    overrides: tuple[str, ...]
    """key=value of every key."""
    seed: int

    @property
    def row(self) -> tuple[str, ...]:
        """Recipe and settings: the name of its row of the table."""
        return (
            "_".join((Path(self.recipe).stem, *self.presets)),
            *(f"{key.removeprefix('method.')}={value}" for key, value in self.settings),
        )

    @property
    def name(self) -> str:
        """The name of its run."""
        return "-".join((*self.row, f"seed={self.seed}")).replace("/", "_")

    def load(self, output: Path) -> Recipe:
        """Its resolved recipe. Raises RecipeError."""
        overrides = [override.replace("{seed}", str(self.seed)) for override in self.overrides]
        presets = [f"+{name}" for name in self.presets]
        own = [f"seed={self.seed}", f"output={output}", f"name={json.dumps(self.name)}"]
        return load(self.recipe, [*presets, *overrides, *own])


def cells(
    recipes: list[str], grid: dict[str, list[str]], seeds: list[int], presets: list[list[str]] | None = None
) -> list[Cell]:
    """Every combination, seed by seed, so that a stopped sweep has few seeds of everything.

    presets: lists of alternatives; one of each list is put over the recipe.
    """
    pairs = list(itertools.product(recipes, itertools.product(*presets or [])))
    varied = [key for key, values in grid.items() if len(values) > 1]
    found = []
    for seed, (recipe, over), values in itertools.product(seeds, pairs, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        overrides = tuple(f"{key}={value}" for key, value in chosen.items())
        found.append(Cell(recipe, over, tuple((key, chosen[key]) for key in varied), overrides, seed))
    return found


def split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def finished(recipe: Recipe) -> bool:
    """Whether this run was trained, evaluated and exported. Raises RecipeError (run.output) for another recipe's."""
    folder = recipe.folder
    if not (folder / "recipe.yaml").is_file():
        return False
    if differ := differences(run_recipe(folder).to_dict(), recipe.to_dict()):
        raise RecipeError(
            "run.output", f"{folder} was made with another {', '.join(differ)}: give another folder with --output"
        )
    progress, select = Progress(), f"validation/{recipe.evaluation.select}"
    for line in lines(folder / "metrics.jsonl"):
        progress.epoch = int(line.get("epoch", progress.epoch))
        if select in line:
            progress.scored(line[select])
    hidden, has_validation = recipe.evaluation.hide_test or recipe.data.test == "none", recipe.data.validation != "none"
    splits = [name for name, used in (("test", not hidden), ("validation", has_validation)) if used]
    written = (*(folder / "evaluation" / f"{name}-last.json" for name in splits), folder / "model" / DETAILS)
    return progress.ended(recipe) and all(path.is_file() for path in written)


def run(todo: list[Cell], output: Path, lean: bool = False) -> list[str]:
    """Train the cells that are not finished; returns the errors. lean: drop the checkpoints of finished cells."""
    main, errors = PartialState().is_main_process, []
    for number, cell in enumerate(todo, start=1):
        try:
            recipe = cell.load(output)
            done = finished(recipe)
            if main:
                print(f"[{number}/{len(todo)}] {cell.name}{': finished' if done else ''}", flush=True)
            if not done:
                train_recipe(recipe, resume=True)
            if lean and main:
                shutil.rmtree(output / cell.name / "checkpoints", ignore_errors=True)
        except FAILURES as error:
            errors.append(left_out(cell, error))
            if main:
                print(errors[-1], file=sys.stderr, flush=True)
    return errors


def left_out(cell: Cell, error: Exception) -> str:
    """The error line of a cell that failed."""
    return f"error[{code_of(error)}]: {cell.name} is left out: {message(error)}"


def remember(found: list[Cell], output: Path) -> list[tuple[tuple[str, ...], str]]:
    """Add cells to sweep.json, which several commands may write to; returns all its cells, (row, name) each."""
    path = output / "sweep.json"
    output.mkdir(parents=True, exist_ok=True)
    with file_lock(output / ".sweep.lock"):
        before = read_json(path, list) if path.is_file() else []
        if not all(isinstance(one, list) and len(one) == 2 for one in before):
            raise InputError("file.format", f"{path} is not a list of cells: remove it and run the sweep again")
        known = {name: tuple(row) for row, name in before} | {cell.name: cell.row for cell in found}
        if found:
            write_json(path, [[row, name] for name, row in known.items()], indent=0)
    return [(row, name) for name, row in known.items()]


def measure(known: list[tuple[tuple[str, ...], str]], output: Path) -> dict[tuple[str, ...], list[dict[str, float]]]:
    """The metrics of each row's finished runs: test and validation in percent, weights, minutes and GPU memory."""
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for row, name in known:
        path = output / name / "evaluation" / "test-last.json"
        validation = path.with_name("validation-last.json")
        if path.is_file() or validation.is_file():
            numbers = _numbers(read_json(path)) if path.is_file() else {}
            if validation.is_file():
                numbers |= {f"validation_{metric}": value for metric, value in _numbers(read_json(validation)).items()}
            about = output / name / "environment.json"
            weights = read_json(about).get("weights", {}) if about.is_file() else {}
            last = {key: value for line in lines(output / name / "metrics.jsonl") for key, value in line.items()}
            for key, unit, value in (
                ("minutes", 60, last.get("seconds")),
                ("memory_gib", 1, last.get("memory_gib")),
                ("trained_thousands", 1e3, weights.get("trained")),
            ):
                if value is not None:
                    numbers[key] = value / unit
            rows.setdefault(row, []).append(numbers)
    return rows


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation, and the interval (_low, _high) and number of images (_n) of those that have one."""
    numbers = dict(record["numbers"])
    for metric, (low, high) in record.get("intervals", {}).items():
        size = record["sizes"][metric]["images"]
        numbers |= {f"{metric}_low": low, f"{metric}_high": high, f"{metric}_n": size}
    return numbers


@dataclass(frozen=True)
class Row:
    """A row of the table.

    numbers: what is known of each metric of METRICS: the mean over the seeds, of several their sample _deviation, and
    of the intervals the mean ends, _low and _high, and number of images, _n.
    """

    run: str
    seeds: int
    numbers: dict[str, float]


def summary(rows: dict[tuple[str, ...], list[dict[str, float]]]) -> list[Row]:
    """The rows of the table, of the metrics of each row's runs."""
    table = []
    for row, runs in rows.items():
        numbers = {}
        for name in (f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high", "_n")):
            values = [one[name] for one in runs if name in one]
            if values:
                numbers[name] = statistics.fmean(values)
            if name in METRICS and len(values) > 1:
                numbers[f"{name}_deviation"] = statistics.stdev(values)
        table.append(Row(" ".join(row), len(runs), numbers))
    return table


def ranked(table: list[Row], by: str) -> list[Row]:
    """The rows by their validation metric `by`, best first; rows without one last, in their order."""
    return sorted(table, key=lambda row: row.numbers.get(f"validation_{by}", -math.inf), reverse=True)


def proposed(table: list[Row], by: str) -> str:
    """A row by the one-standard-error rule (Breiman et al. 1984, 3.4.3); "" without validation.

    Of the rows whose validation mean is within one standard error of the best, the one that trains the fewest weights,
    then the fastest. The standard error is the deviation of the seeds over the root of their number, or, of a single
    seed, that of its interval over images and classes.
    """
    name = f"validation_{by}"
    rows = [row for row in ranked(table, by) if name in row.numbers]
    if not rows:
        return ""
    best, error = rows[0], 0.0
    if f"{name}_deviation" in best.numbers:
        error = best.numbers[f"{name}_deviation"] / math.sqrt(best.seeds)
    elif f"{name}_low" in best.numbers:
        error = (best.numbers[f"{name}_high"] - best.numbers[f"{name}_low"]) / (2 * 1.96)
    near = [row for row in rows if row.numbers[name] >= best.numbers[name] - error]
    cost = ("trained_thousands", "minutes")
    chosen = min(near, key=lambda row: [row.numbers.get(key, math.inf) for key in cost])
    text = f"proposed: {chosen.run} ({name} {chosen.numbers[name]:.1f}"
    if chosen is not best:
        text += f", within one standard error, {error:.1f}, of the best, {best.run} {best.numbers[name]:.1f}"
        text += ", and cheaper"
    return text + ")"


def markdown(table: list[Row]) -> str:
    """The table, with the metrics that any row has."""
    shown = [metric for metric in METRICS if any(metric in row.numbers for row in table)]
    heads = []
    for metric in shown:
        sizes = {row.numbers.get(f"{metric}_n") for row in table if metric in row.numbers}
        size = sizes.pop() if len(sizes) == 1 else None
        heads.append(f"{metric} (n {size:,.0f})" if size else metric)
    rows = [[escaped(row.run), str(row.seeds), *(_cell(row.numbers, metric) for metric in shown)] for row in table]
    text = ["| " + " | ".join(row) + " |" for row in (["run", "seeds", *heads], *rows)]
    return "\n".join([text[0], "|---" * (2 + len(shown)) + "|", *text[1:]]) + "\n"


def draw(table: list[Row], title: str) -> Figure:
    """Top-1 of every row with its deviation and, thin, its 95% interval, in the order of the table.

    On the validation rows if any run has them (others have no point), else on the test rows.
    """
    split = "validation" if any("validation_top1" in row.numbers for row in table) else "test"
    name = "validation_top1" if split == "validation" else "top1"
    figure = style.new_figure(7.0, 1.0 + 0.28 * len(table))
    axes = figure.subplots()
    heights = range(len(table))
    values = [row.numbers.get(name, math.nan) for row in table]
    deviations = [row.numbers.get(f"{name}_deviation", 0.0) for row in table]
    for height, row in enumerate(table):
        if f"{name}_low" in row.numbers:
            ends = row.numbers[f"{name}_low"], row.numbers[f"{name}_high"]
            axes.hlines(height, *ends, color=style.GREY, linewidth=0.8, alpha=0.6)
    axes.errorbar(values, heights, xerr=deviations, fmt="o", color=style.color(0), capsize=3)
    axes.set_yticks(heights, [style.plain(row.run, 60) for row in table])
    axes.invert_yaxis()
    style.tidy(axes, title, f"{split} top-1, last epoch (%)", "", "x")
    return figure


def write(table: list[Row], output: Path, by: str = "top1") -> None:
    """Write sweep.md, .csv, .png and .svg, ranked by the validation metric `by`, and print the table and a proposal."""
    table = ranked(table, by)
    proposal = escaped(proposed(table, by))
    text = markdown(table) + (f"\n{proposal}\n" if proposal else "")
    write_text(output / "sweep.md", text)
    names = [f"{metric}{part}" for metric in METRICS for part in ("", "_deviation", "_low", "_high", "_n")]
    rows = io.StringIO()
    writer = csv.DictWriter(rows, ["run", "seeds", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": row.run, "seeds": row.seeds, **row.numbers} for row in table)
    write_text(output / "sweep.csv", rows.getvalue())
    seeds = sorted({row.seeds for row in table})
    figure = draw(table, f"mean and deviation of {' or '.join(map(str, seeds))} seeds")
    for ending in (".png", ".svg"):
        name = output / f"sweep{ending}"
        with errors_named(name), atomic_path(name) as path:
            figure.savefig(path, format=ending[1:])
    print(f"\n{text}\n{output}/sweep.md, .csv, .png and .svg")


def _cell(numbers: dict[str, float], metric: str) -> str:
    """52.0 ± 2.8 (48-56): mean and deviation of the seeds, 95% interval over images and classes."""
    if metric not in numbers:
        return "-"
    text = f"{numbers[metric]:.1f}"
    if f"{metric}_deviation" in numbers:
        text += f" ± {numbers[f'{metric}_deviation']:.1f}"
    return text + (
        f" ({span((numbers[f'{metric}_low'], numbers[f'{metric}_high']))})" if f"{metric}_low" in numbers else ""
    )
