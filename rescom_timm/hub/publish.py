"""After a training: classes.json, the exported model in RUN/model, the push to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL.Image import Image

from rescom_timm.config.recipe import Recipe
from rescom_timm.data.sources import Data
from rescom_timm.engine.follower import Follower
from rescom_timm.hub.staging import Pusher
from rescom_timm.inference.export import describe, save_model


class Publisher(Follower):
    """Exports the model to RUN/model, and pushes to the Hub by the recipe's hub section."""

    folder: Path
    pusher: Pusher

    def __init__(self, draw: Callable[[Path], dict[str, Image]] = lambda run: {}) -> None:
        """draw: run folder -> plots by name."""
        self.draw = draw

    def opened(self, folder: Path, recipe: Recipe, data: Data) -> None:
        """Write classes.json."""
        self.folder, self.pusher = folder, Pusher(recipe.hub, folder)
        describe(folder, data, recipe)

    def saved(self, newest: str, best: str | None) -> None:
        """Push by hub.strategy."""
        self.pusher.saved(newest, best)

    def finished(self, newest: str, best: str | None) -> None:
        """Export the model and push it."""
        print(save_model(self.folder))
        self.pusher.finished(newest, best)

    def pictures(self) -> dict[str, Image]:
        """The plots of the run, for trackers."""
        return self.draw(self.folder)

    def closed(self) -> None:
        """Wait for the push."""
        self.pusher.wait()
