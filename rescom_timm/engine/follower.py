"""Callbacks of a run."""

from __future__ import annotations

from pathlib import Path

from PIL.Image import Image

from rescom_timm.config.recipe import Recipe
from rescom_timm.data.sources import Data


class Follower:
    """Callbacks of a run, in its main process.

    This one does nothing; hub/publish.py has the one that exports and pushes.
    """

    def opened(self, folder: Path, recipe: Recipe, data: Data) -> None:
        """The run has its folder."""

    def evaluated(self, epoch: int, figures: dict[str, dict[str, float]]) -> None:
        """An evaluation within the training is done. figures: of each split, percent by name."""

    def saved(self, newest: str, best: str | None) -> None:
        """A checkpoint was written. newest, best: names of checkpoints; best is None where none was selected yet."""

    def finished(self, newest: str, best: str | None) -> None:
        """The last evaluation is done. Exceptions become CheckpointError; `--resume` calls this again."""

    def pictures(self) -> dict[str, Image]:
        """Of the finished run, by name, for its trackers."""
        return {}

    def closed(self) -> None:
        """The run succeeded and its folder is unlocked."""
