"""Grids of runs: every combination of some keys, with several seeds, as a table and a plot. The verb sweep, without its
words."""

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

from rescom_timm.analysis import style
from rescom_timm.api import train_recipe
from rescom_timm.config.loading import differences, load
from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.engine.errors import FAILURES, message
from rescom_timm.engine.run_folder import lines, run_recipe
from rescom_timm.engine.state import Progress
from rescom_timm.inference.export import DETAILS
from rescom_timm.io import atomic_path, errors_named, file_lock, read_json, write_json, write_text
from rescom_timm.metrics import span
from rescom_timm.text.pages import markdown as escaped

_NUMBERS = ("top1", "many", "medium", "few", "mean_class")
FIGURES = (
    *(f"validation_{name}" for name in _NUMBERS),
    *_NUMBERS,
    *("ece", "trained_thousands", "minutes", "memory_gib"),
)
"""Columns of the table: those to choose settings by come first, where a run has them."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. settings: the words of the command line that vary, (key, value) each."""

    recipe: str
    presets: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    seed: int

    @property
    def row(self) -> tuple[str, ...]:
        """What its line of the table is called: recipe and settings."""
        return (
            "_".join((Path(self.recipe).stem, *self.presets)),
            *(f"{_short(key)}={value}" for key, value in self.settings),
        )

    @property
    def name(self) -> str:
        return "-".join((*self.row, f"seed={self.seed}")).replace("/", "_")

    def load(self, output: Path) -> Recipe:
        words = [word.replace("{seed}", str(self.seed)) for word in self.words]
        presets = [f"+{name}" for name in self.presets]
        return load(
            self.recipe, [*presets, *words, f"seed={self.seed}", f"output={output}", f"name={json.dumps(self.name)}"]
        )


def cells(
    recipes: list[str], grid: dict[str, list[str]], seeds: list[int], presets: list[list[str]] | None = None
) -> list[Cell]:
    """Every combination, seed by seed, so that a sweep cut short has few seeds of everything. presets: of each list one
    is put over the recipe."""
    pairs = list(itertools.product(recipes, itertools.product(*presets or [])))
    varied = [key for key, values in grid.items() if len(values) > 1]
    found = []
    for seed, (recipe, over), values in itertools.product(seeds, pairs, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        words = tuple(f"{key}={value}" for key, value in chosen.items())
        found.append(Cell(recipe, over, tuple((key, chosen[key]) for key in varied), words, seed))
    return found


def split(text: str) -> list[str]:
    """'a,b' at its commas, but for those within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def finished(recipe: Recipe) -> bool:
    """Whether this run was trained, evaluated and exported. Raises RecipeError where another recipe's is there."""
    folder = recipe.folder
    if not (folder / "recipe.yaml").is_file():
        return False
    if differ := differences(run_recipe(folder).to_dict(), recipe.to_dict()):
        raise RecipeError(f"{folder} was made with another {', '.join(differ)}: name another folder with --output")
    progress, select = Progress(), f"validation/{recipe.evaluation.select}"
    for line in lines(folder / "metrics.jsonl"):
        progress.epoch = line.get("epoch", progress.epoch)
        if select in line:
            progress.scored(line[select])
    hidden, held = recipe.evaluation.hide_test or recipe.data.test == "none", recipe.data.validation != "none"
    splits = [name for name, there in (("test", not hidden), ("validation", held)) if there]
    there = (*(folder / "evaluation" / f"{name}-last.json" for name in splits), folder / "model" / DETAILS)
    return progress.ended(recipe) and all(path.is_file() for path in there)


def run(todo: list[Cell], output: Path, lean: bool = False) -> list[str]:
    """Train what is not finished; returns what went wrong, a sentence each. lean: drop checkpoints of what is."""
    main, wrong = PartialState().is_main_process, []
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
            wrong.append(f"{cell.name}: {message(error)}")
            if main:
                print(f"left out: {wrong[-1]}", file=sys.stderr, flush=True)
    return wrong


def remember(found: list[Cell], output: Path) -> list[tuple[tuple[str, ...], str]]:
    """The cells of every command so far, (row, name) each, kept in sweep.json, which several commands may add to."""
    path = output / "sweep.json"
    output.mkdir(parents=True, exist_ok=True)
    with file_lock(output / ".sweep.lock"):
        before = read_json(path, list) if path.is_file() else []
        if not all(isinstance(one, list) and len(one) == 2 for one in before):
            raise ValueError(f"{path} holds no cells of a sweep: remove it, and give the sweep's command again")
        known = {name: tuple(row) for row, name in before} | {cell.name: cell.row for cell in found}
        if found:
            write_json(path, [[row, name] for name, row in known.items()], indent=0)
    return [(row, name) for name, row in known.items()]


def measure(known: list[tuple[tuple[str, ...], str]], output: Path) -> dict[tuple[str, ...], list[dict[str, float]]]:
    """The test figures of each row's finished runs, in percent, those of its validation rows, if any, how many weights
    trained, minutes of training and, on a GPU, the most memory held."""
    rows: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for row, name in known:
        path = output / name / "evaluation" / "test-last.json"
        held = path.with_name("validation-last.json")
        if path.is_file() or held.is_file():
            numbers = _numbers(read_json(path)) if path.is_file() else {}
            if held.is_file():
                numbers |= {f"validation_{figure}": value for figure, value in _numbers(read_json(held)).items()}
            about = output / name / "environment.json"
            weights = read_json(about).get("weights", {}) if about.is_file() else {}
            told = {key: value for line in lines(output / name / "metrics.jsonl") for key, value in line.items()}
            for key, unit, value in (
                ("minutes", 60, told.get("seconds")),
                ("memory_gib", 1, told.get("memory_gib")),
                ("trained_thousands", 1e3, weights.get("trained")),
            ):
                if value is not None:
                    numbers[key] = value / unit
            rows.setdefault(row, []).append(numbers)
    return rows


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The figures of an evaluation, and of those that have them the interval (_low, _high) and the images (_n)."""
    numbers = dict(record["numbers"])
    for figure, (low, high) in record.get("intervals", {}).items():
        size = record["sizes"][figure]["images"]
        numbers |= {f"{figure}_low": low, f"{figure}_high": high, f"{figure}_n": size}
    return numbers


def summary(rows: dict[tuple[str, ...], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A line for each row: its name, seeds, and of each figure the mean, the deviation (None for a single seed), the
    mean ends of its intervals and the number of images."""
    table = []
    for row, runs in rows.items():
        line: dict[str, Any] = {"run": " ".join(row), "seeds": len(runs)}
        for figure in FIGURES:
            values = [numbers[figure] for numbers in runs if figure in numbers]
            line[figure] = statistics.fmean(values) if values else None
            line[f"{figure}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
            for part in ("low", "high", "n"):
                ends = [numbers[f"{figure}_{part}"] for numbers in runs if f"{figure}_{part}" in numbers]
                line[f"{figure}_{part}"] = statistics.fmean(ends) if ends else None
        table.append(line)
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    shown = [figure for figure in FIGURES if any(line[figure] is not None for line in table)]
    heads = []
    for figure in shown:
        sizes = {line[f"{figure}_n"] for line in table if line[figure] is not None}
        size = sizes.pop() if len(sizes) == 1 else None
        heads.append(f"{figure} (n {size:,.0f})" if size else figure)
    text = [f"| run | seeds | {' | '.join(heads)} |", f"|---|---|{'---|' * len(shown)}"]
    for line in table:
        told = (_told(line, figure) for figure in shown)
        text.append(f"| {escaped(line['run'])} | {line['seeds']} | {' | '.join(told)} |")
    return "\n".join(text) + "\n"


def draw(table: list[dict[str, Any]], title: str) -> Any:
    """Top-1 of every line with its deviation and, thin, its 95% interval, in the order of the table: on the validation
    rows, where any line has them (a line without has no point), otherwise on the test rows."""
    split = "validation" if any(line["validation_top1"] is not None for line in table) else "test"
    name = "validation_top1" if split == "validation" else "top1"
    figure = style.new_figure(7.0, 1.0 + 0.28 * len(table))
    axes = figure.subplots()
    places = range(len(table))
    values = [math.nan if line[name] is None else line[name] for line in table]
    deviations = [line[f"{name}_deviation"] or 0.0 for line in table]
    for place, line in enumerate(table):
        if line[f"{name}_low"] is not None:
            axes.hlines(place, line[f"{name}_low"], line[f"{name}_high"], color=style.GREY, linewidth=0.8, alpha=0.6)
    axes.errorbar(values, places, xerr=deviations, fmt="o", color=style.color(0), capsize=3)
    axes.set_yticks(places, [style.plain(line["run"], 60) for line in table])
    axes.invert_yaxis()
    style.tidy(axes, title, f"{split} top-1, last epoch (%)", "", "x")
    return figure


def write(table: list[dict[str, Any]], output: Path) -> None:
    text = markdown(table)
    write_text(output / "sweep.md", text)
    rows = io.StringIO()
    writer = csv.DictWriter(rows, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(output / "sweep.csv", rows.getvalue())
    seeds = sorted({line["seeds"] for line in table})
    figure = draw(table, f"mean and deviation of {' or '.join(map(str, seeds))} seeds")
    for ending in (".png", ".svg"):
        name = output / f"sweep{ending}"
        with errors_named(name), atomic_path(name) as path:
            figure.savefig(path, format=ending[1:])
    print(f"\n{text}\n{output}/sweep.md, .csv, .png and .svg")


def _told(line: dict[str, Any], figure: str) -> str:
    """52.0 ± 2.8 (48-56): mean and deviation of the seeds, 95% interval over images and classes."""
    mean, deviation, low, high = (line[figure + part] for part in ("", "_deviation", "_low", "_high"))
    if mean is None:
        return "-"
    text = f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
    return text if low is None else f"{text} ({span((low, high))})"


def _short(key: str) -> str:
    return key.removeprefix("method.")
