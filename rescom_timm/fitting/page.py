"""What a fit found, for a terminal and as an HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rescom_timm.engine.evaluate import table
from rescom_timm.fitting.record import FOLDER, Record
from rescom_timm.io import read_json, write_text
from rescom_timm.metrics import span
from rescom_timm.text.pages import render

PAGE = "report.html"
"""In RUN/fit."""


def _evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The records of the run's own evaluations by split, test first."""
    files = {split: run / "evaluation" / f"{split}-last.json" for split in ("test", "validation")}
    return {split: read_json(path) for split, path in files.items() if path.is_file()}


def text(run: Path, record: Record) -> str:
    """The table, what was chosen and why, the test figures, and what more time would do."""
    values = record.values
    width = max(len(one["name"]) for one in values["table"])
    lines = [f"{'candidate':<{width}}  mean over classes, %   by"]
    for one in values["table"]:
        figures = (
            "   -" if one["mean_class"] is None else f"{one['mean_class']:5.1f} ({one['low']:.1f} to {one['high']:.1f})"
        )
        lines.append(f"{one['name']:<{width}}  {figures}  {one['by']}")
    lines.append(f"chosen: {values['chosen']} ({values['why']})")
    if found := _evaluations(run):
        lines.append(table({split: one["numbers"] for split, one in found.items()}))
    used = f"{values['seconds'] / 60:.1f} of {values['command']['minutes']:g} minutes used; {run / FOLDER / PAGE}"
    return "\n".join([*lines, *_more(values), used, f"run folder: {run}"])


def _more(record: Mapping[str, Any]) -> list[str]:
    minutes = record["command"]["minutes"]
    return [f"--minutes {10 * minutes:g} would hold {record['more']}"] if record.get("more") else []


def write(run: Path, record: Record, data: str) -> None:
    """RUN/fit/report.html. data: of the images, for people."""
    found = {
        split: [
            (name, value, span(one["intervals"][name]) if name in one["intervals"] else "", one["sizes"].get(name))
            for name, value in one["numbers"].items()
        ]
        for split, one in _evaluations(run).items()
    }
    page = render(
        "fit.html", title=f"fit: {run.name}", data=data, record=record.values, found=found, more=_more(record.values)
    )
    write_text(run / FOLDER / PAGE, page)
