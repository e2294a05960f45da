"""Learning curves of one or several runs, one panel per number of the training log with all splits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.analysis.run_files import Missing, RunFolder
from rescom_timm.engine.run_folder import Line

_AXES = ("epoch", "step")
_FIRST = ("loss", "top1", "many", "medium", "few", "loss_contrast", "ece", "mean_class", "top5")
"""The order of the panels."""
CHANCE = "_chance"
"""Ends the name of a loss's chance level, which is a dotted line in the panel of the loss."""
_TOGETHER = "many, medium, few"
"""The panel of a single run's groups."""
_MARKERS = "os^D"
"""Of splits."""
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


def measure(runs: Sequence[RunFolder], names: Sequence[str] = (), most: int = 8) -> list[Curve]:
    """The curves of these names, or of the up to `most` most important metrics, each on every split that has it.

    Runs without a log are left out. After a resume the same step may be logged twice: the later line counts. Raises
    Missing if nothing is left.
    """
    logs: dict[str, list[Line]] = {}
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
    # The runs and splits of a panel share its axis: the epoch, unless one logs several lines an epoch.
    fine = {_panel_of(name) for (_, name), (_, epoch, _) in series.items() if len(np.unique(epoch)) < len(epoch)}
    return [
        Curve(run, name, "step", step, y) if _panel_of(name) in fine else Curve(run, name, "epoch", epoch, y)
        for (run, name), (step, epoch, y) in series.items()
        if len(y)
    ]


def table(curves: Sequence[Curve]) -> style.Table:
    """One row per point."""
    points = [(c.run, c.name, c.axis, x, y) for c in curves for x, y in zip(c.x, c.y, strict=True)]
    return dict(zip(("run", "name", "axis", "x", "value"), zip(*points, strict=True), strict=True))


def draw(curves: Sequence[Curve]) -> Figure:
    """One panel per number with all its splits, and one panel for the groups of a single run.

    Colours are runs, or groups; line styles are splits. A run has the same colour everywhere.
    """
    runs = list(dict.fromkeys(curve.run for curve in curves))
    shown = [curve for curve in curves if not curve.name.endswith(CHANCE)]
    splits = list(dict.fromkeys(map(_split, shown)))
    panels: dict[str, list[Curve]] = {}
    for curve in shown:
        name = _panel_of(curve.name) if len(runs) == 1 else last_part(curve.name)
        panels.setdefault(name, []).append(curve)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = style.new_figure(4.2 * columns, 3.2 * rows + 0.3)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (name, inside) in zip(axes, panels.items(), strict=False):
        _panel(panel, name, inside, runs, splits)
        levels = {curve.name + CHANCE for curve in inside}
        for curve in (curve for curve in curves if curve.name in levels):
            panel.plot(curve.x, curve.y, ":", color=style.color(runs.index(curve.run)), linewidth=1.0)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    percents = [panel for panel, name in zip(axes, panels, strict=False) if _is_percent(name)]
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
    lines = [Line2D([], [], color=style.color(i)) for i in range(len(runs))]
    labels = [style.plain(run, 48) for run in runs]
    figure.legend(lines, labels, loc="outside lower left", ncols=min(3, len(runs)), frameon=False, fontsize=8)


def _panel_of(name: str) -> str:
    """The panel of a single run that shows a curve."""
    end = last_part(name.removesuffix(CHANCE))
    return _TOGETHER if end in metrics.GROUPS else end


def _split(curve: Curve) -> str:
    """The first part of a name: "test" of "test/top1", nothing of "loss"."""
    return curve.name[: -len(last_part(curve.name))].rstrip("/.")


def _panel(panel: Axes, name: str, curves: Sequence[Curve], runs: Sequence[str], splits: Sequence[str]) -> None:
    labels: dict[str, Line2D] = {}
    for curve in curves:
        split, end = _split(curve), last_part(curve.name)
        group = end if name == _TOGETHER else ""
        color = style.GROUP_COLORS[group] if group else style.color(runs.index(curve.run))
        label = f"{group} {split}".strip() if len({_split(one) for one in curves}) > 1 or group else ""
        place = splits.index(split)
        marker = _MARKERS[place % len(_MARKERS)] if len(curve.x) <= 20 else ""
        (line,) = panel.plot(curve.x, curve.y, style.line(place), color=color, linewidth=1.3, marker=marker, ms=4)
        labels.setdefault(label, line)
    unit = "" if "loss" in name or name in _NO_CURVE else " (percent)" if _is_percent(name) else ""
    only = {curve.name for curve in curves}
    title = only.pop() if len(only) == 1 else name
    style.tidy(panel, style.plain(title, 40), curves[0].axis, f"{style.plain(name)}{unit}", "y")
    if unit == " (percent)":
        panel.set_ylim(top=min(panel.get_ylim()[1], 101))
    if max(len(curve.x) for curve in curves) <= 10 and all((curve.x == curve.x.round()).all() for curve in curves):
        panel.set_xticks(sorted({int(x) for curve in curves for x in curve.x}))
    labels.pop("", None)
    if labels:
        panel.legend(list(labels.values()), [style.plain(label) for label in labels], frameon=False, fontsize=7)


def _series(rows: Sequence[Line], name: str) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """(step, epoch, value), each (T,), in order of step; a later line replaces an earlier one of the same place."""
    found: dict[tuple[float, float], float] = {}
    for number, row in enumerate(rows):
        value, epoch, step = (row.get(key) for key in (name, "epoch", "step"))
        if _is_number(value):
            x = float(epoch) if _is_number(epoch) else float(number)
            found[float(step) if _is_number(step) else x, x] = float(value)
    places = np.array(sorted(found), dtype=float).reshape(-1, 2)
    return places[:, 0], places[:, 1], np.array([found[place] for place in sorted(found)])


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_curve(name: str) -> bool:
    return name not in _AXES and not name.endswith(CHANCE) and last_part(name) not in _NO_CURVE


def _is_percent(name: str) -> bool:
    return bool(re.fullmatch(rf"top\d+|{_TOGETHER}|(many|medium|few)(_mean_class)?|mean_class|ece|invalid", name))


def _importance(name: str) -> tuple[int, str]:
    end = last_part(name)
    return (_FIRST.index(end) if end in _FIRST else len(_FIRST) + (end != "loss" and "loss" not in end), name)
