"""Plots of runs as PNG, SVG and CSV files, and the report over them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image

from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.engine.evaluate import evaluated_otherwise
from rescom_timm.engine.run_folder import FOLDERS, run_recipe
from rescom_timm.io import refuse_links


def write_figures(
    runs: Sequence[RunFolder],
    names: Sequence[str] | None = None,
    folder: str | Path | None = None,
    evaluation: str = "",
    checkpoint: str = "last",
    overrides: Sequence[str] = (),
) -> Iterator[Path | str]:
    """Draw and write plots one by one: yields the paths written, or, as text, the plots that cannot be drawn and why.

    names: of plots.NAMES, and "report"; all by default, of several runs those that need no net. folder: RUN/figures by
    default, ./figures for several runs. evaluation, checkpoint, overrides: as plots.draw_all. Raises InputError for an
    unknown plot, and an error for a run's folder with a symlink out of it.
    """
    from rescom_timm.analysis import plots, report, style  # which import matplotlib

    default = plots.NAMES if len(runs) == 1 else plots.FROM_FILES
    names = [*default, "report"] if names is None else list(names)
    plots.check_names(names, (*plots.NAMES, "report"))
    pictures = [name for name in names if name != "report"] or list(default)
    for run in runs:
        refuse_links(run.path, FOLDERS)
        if "report" in names:
            run.recipe()  # raises before anything is drawn
    in_run = folder is None  # where names must not replace the run's own plots
    folder = Path(folder or ("figures" if len(runs) > 1 else runs[0].path / "figures"))
    drawn = []
    for one in plots.draw_all(runs, pictures, evaluation, checkpoint, overrides):
        drawn.append(one)
        if one.figure is None or one.table is None:
            yield f"no {one.name}: {one.missing}"
        elif names != ["report"]:
            stem = one.name + (f"-{one.run.replace('/', '-')}" if one.run and len(runs) > 1 else "")
            if in_run and overrides and one.name in plots.FROM_NET:
                own = next(run.path for run in runs if run.name == one.run)
                stem += evaluated_otherwise(run_recipe(own), run_recipe(own, overrides), "")[2]
            yield from map(Path, style.save(one.figure, one.table, folder / stem))
    if "report" in names:
        yield from report.write(runs, folder / "report.html", drawn, evaluation, overrides)


SENT = ("curves", "longtail", "confusion", "reliability")
"""Plots that training sends to its trackers: read from its files, within a second."""


def pictures(run: Path) -> dict[str, Image]:
    """Pictures figures/NAME of SENT; without those that the run lacks data for."""
    from rescom_timm.analysis import plots, style  # which import matplotlib

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names of classes in scripts that the font lacks
        drawn = plots.draw_all([RunFolder(run)], SENT)
        return {f"figures/{one.name}": style.picture(one.figure) for one in drawn if one.figure is not None}
