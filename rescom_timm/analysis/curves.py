"""Learning curves of one or several runs, one panel per number of the training log."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import Missing, RunFolder

_AXES = ("epoch", "step")
_FIRST = ("loss", "top1", "many", "medium", "few", "loss_contrast", "ece", "mean_class", "top5")
"""The order of the panels."""
CHANCE = "_chance"
"""Ends the name of a loss's chance level, which is a dotted line in the panel of the loss."""
_NO_CURVE = ("lr", "learning_rate", "time", "seconds", "images_per_second", "memory_gib")


@dataclass(frozen=True)
class Curve:
    """One number of one run: x (T,) in `axis` ("epoch" or "step"), y (T,)."""

    run: str
    name: str
    axis: str
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]


def last_part(name: str) -> str:
    """Last part of a name: "loss" of "train/loss" or "train.loss"."""
    return re.split(r"[/.]", name)[-1]


def measure(runs: Sequence[RunFolder], names: Sequence[str] = (), most: int = 5) -> list[Curve]:
    """The curves of these names, or of the up to `most` most important metrics, each on every split that has it.

    Runs without a log are left out. After a resume the same step may be logged twice: the later line counts. Raises
    Missing if nothing is left.
    """
    logs: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        try:
            logs[run.name] = run.rows()
        except Missing:
            continue
    if not logs:
        raise Missing("plot.log", f"no training log (metrics.jsonl) in {', '.join(run.name for run in runs)}")
    known = {name for rows in logs.values() for row in rows for name, value in row.items() if _is_number(value)}
    curves = sorted(filter(_has_curve, known), key=_importance)
    shown = list(dict.fromkeys(map(last_part, curves)))[:most]
    chosen = list(names) or [name for name in curves if last_part(name) in shown]
    chosen += [name + CHANCE for name in chosen if name + CHANCE in known]
    series = {(run, name): _series(rows, name) for run, rows in logs.items() for name in chosen}
    if not any(len(x) for x, _, _ in series.values()):
        raise Missing("plot.log", f"the training log has no {', '.join(chosen) or 'curve'}, only {sorted(known)}")
    # All runs of a panel share its axis: the epoch, unless some run logs several lines an epoch.
    fine = {name for (_, name), (_, epoch, _) in series.items() if len(np.unique(epoch)) < len(epoch)}
    return [
        Curve(run, name, "step" if name in fine else "epoch", step if name in fine else epoch, y)
        for (run, name), (step, epoch, y) in series.items()
        if len(y)
    ]


def table(curves: Sequence[Curve]) -> style.Table:
    """One row per point."""
    points = [(c.run, c.name, c.axis, x, y) for c in curves for x, y in zip(c.x, c.y, strict=True)]
    return dict(zip(("run", "name", "axis", "x", "value"), zip(*points, strict=True), strict=True))


def draw(curves: Sequence[Curve]) -> Figure:
    """One panel per name, one line per run; the same run has the same colour everywhere."""
    names = [name for name in dict.fromkeys(curve.name for curve in curves) if not name.endswith(CHANCE)]
    runs = list(dict.fromkeys(curve.run for curve in curves))
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = style.new_figure(4.0 * columns, 3.0 * rows + (0.3 if len(runs) > 1 else 0))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        _panel(panel, [curve for curve in curves if curve.name == name], runs)
        for curve in (curve for curve in curves if curve.name == name + CHANCE):
            panel.plot(curve.x, curve.y, ":", color=style.color(runs.index(curve.run)), linewidth=1.0)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    percents = [panel for panel, name in zip(panels, names, strict=False) if _is_percent(name)]
    if percents:  # on one scale, so that their heights can be compared
        low = min(panel.get_ylim()[0] for panel in percents)
        for panel in percents:
            panel.set_ylim(low, max(other.get_ylim()[1] for other in percents))
    run_legend(figure, runs)
    return figure


def run_legend(figure: Figure, runs: Sequence[str]) -> None:
    """The runs' names under the figure, in columns; a single run's name as the title."""
    if len(runs) == 1:
        figure.suptitle(style.plain(runs[0], 60), fontsize=10, x=0.01, ha="left")
        return
    lines = [Line2D([], [], color=style.color(i), linestyle=style.line(i)) for i in range(len(runs))]
    labels = [style.plain(run, 48) for run in runs]
    figure.legend(lines, labels, loc="outside lower left", ncols=min(3, len(runs)), frameon=False, fontsize=8)


def _panel(panel: Axes, curves: Sequence[Curve], runs: Sequence[str]) -> None:
    for curve in curves:
        index = runs.index(curve.run)
        marker = "o" if len(curve.x) <= 20 else ""
        panel.plot(curve.x, curve.y, style.line(index), color=style.color(index), linewidth=1.3, marker=marker, ms=3)
    name = curves[0].name
    unit = "" if "loss" in name or last_part(name) in _NO_CURVE else " (percent)" if _is_percent(name) else ""
    style.tidy(panel, style.plain(name, 40), curves[0].axis, f"{style.plain(last_part(name))}{unit}", "y")
    if unit == " (percent)":
        panel.set_ylim(top=min(panel.get_ylim()[1], 101))
    if max(len(curve.x) for curve in curves) <= 10 and all((curve.x == curve.x.round()).all() for curve in curves):
        panel.set_xticks(sorted({int(x) for curve in curves for x in curve.x}))


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """(step, epoch, value), each (T,), in order of step; a later line replaces an earlier one of the same place."""
    found: dict[tuple[float, float], float] = {}
    for number, row in enumerate(rows):
        if _is_number(row.get(name)):
            epoch = float(row.get("epoch", number))
            found[float(row.get("step", epoch)), epoch] = float(row[name])
    places = np.array(sorted(found), dtype=float).reshape(-1, 2)
    return places[:, 0], places[:, 1], np.array([found[place] for place in sorted(found)])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_curve(name: str) -> bool:
    return name not in _AXES and not name.endswith(CHANCE) and last_part(name) not in _NO_CURVE


def _is_percent(name: str) -> bool:
    return bool(re.fullmatch(r"top\d+|(many|medium|few)(_mean_class)?|mean_class|ece|invalid", last_part(name)))


def _importance(name: str) -> tuple[int, str]:
    end = last_part(name)
    return (_FIRST.index(end) if end in _FIRST else len(_FIRST) + (end != "loss" and "loss" not in end), name)
