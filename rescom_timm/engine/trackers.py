"""Trackers of Accelerate (wandb, mlflow, trackio ...), which log a run and never stop it.

A tracker that is not installed, has no network or fails in the middle of a run is one warning, and left out from there
on. Which tracked run is this one's stands in trackers.json in the run's folder, so that a resumed run continues it.
"""

from __future__ import annotations

import functools
import queue
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL.Image import Image

from rescom_timm.config.loading import flat
from rescom_timm.config.recipe import Recipe, TrackConfig
from rescom_timm.engine.errors import one_line
from rescom_timm.io import read_json, write_json

IDS = "trackers.json"


def _options(kind: str, config: TrackConfig, folder: Path, id: str | None) -> dict[str, Any]:
    """What the tracker's class takes besides the project. id: of the tracked run to continue, None for a new one."""
    name, tags = config.name or folder.name, list(config.tags)
    again = {"id": id, "resume": "allow"} if id else {}
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": name, "tags": tags, "dir": str(folder), **again},
        "trackio": {"name": id or name, "resume": "allow" if id else "never"},  # which knows a run by its name
        "mlflow": {"run_name": name, "tags": dict.fromkeys(tags, "true") or None, "run_id": id},
        "comet_ml": {"experiment_key": id} if id else {},
        "aim": {"experiment": config.project, "run_hash": id},
        "clearml": {
            "task_name": name, "tags": tags, "auto_connect_frameworks": False, "continue_last_task": id or False,
            "reuse_last_task_id": False,
        },
        "dvclive": {"dir": str(folder / "dvclive"), "resume": id is not None, "save_dvc_exp": False},
        "swanlab": {"experiment_name": name, "tags": tags, "logdir": str(folder / "swanlog"), **again},
    }  # fmt: skip
    return options[kind]


STARTS: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "trackio": lambda run: run.name,
    "mlflow": lambda run: run.info.run_id,
    "comet_ml": lambda run: run.id,
    "aim": lambda run: run.hash,
    "clearml": lambda run: run.id,
    "dvclive": lambda run: "dvclive",
    "swanlab": lambda run: run.id,
}
"""The trackers, and the id of a tracker's run."""


def _as_artifacts(tracker: Any, pictures: dict[str, Image], step: int) -> None:
    with TemporaryDirectory() as folder:
        for name, picture in pictures.items():
            path = Path(folder, f"{name}.png")
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        tracker.log_artifacts(folder)


def _by_trackio(tracker: Any, pictures: dict[str, Image], step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(picture) for name, picture in pictures.items()}, step=step)


PICTURES: dict[str, Callable[[Any, dict[str, Image], int], None]] = {
    "wandb": lambda tracker, pictures, step: tracker.log_images({k: [v] for k, v in pictures.items()}, step=step),
    "trackio": _by_trackio,
    "mlflow": _as_artifacts,
    "aim": lambda tracker, pictures, step: tracker.log_images(pictures, step=step),
    "clearml": lambda tracker, pictures, step: tracker.log_images(pictures, step=step),
    "swanlab": lambda tracker, pictures, step: tracker.log_images({k: [v] for k, v in pictures.items()}, step=step),
}
"""How Accelerate's tracker takes pictures; comet_ml's and dvclive's take none."""


PATIENCE = 10.0
"""Seconds that a tracker has for a call; without a network some of them try for minutes."""
LAST = 60.0
"""Seconds for its last call, which may upload what it has kept."""


class _InTime:
    """Calls of a tracker, in one thread of their own (some keep their run in it), each awaited for PATIENCE seconds."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, call: Callable[[], Any], seconds: float | None = None) -> Any:
        """What the call returns. Raises what it raises, and TimeoutError."""
        seconds = PATIENCE if seconds is None else seconds
        done: Future[Any] = Future()
        self.calls.put((call, done))
        if not wait([done], seconds).done:
            raise TimeoutError(f"no answer in {seconds:g} seconds")
        return done.result()

    def _work(self) -> None:
        while True:
            call, done = self.calls.get()
            try:
                done.set_result(call())
            except BaseException as error:  # of the tracker, for who waits
                done.set_exception(error)


class Trackers:
    """Those of a recipe that can be started; TensorBoard's files are log.py's."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.path = folder / IDS
        self.running: dict[str, Any] = {}
        self.in_time: dict[str, _InTime] = {}
        ids: dict[str, str] = {}
        config, settings = recipe.track, {key: _plain(value) for key, value in flat(recipe.to_dict()).items()}
        for name in config.log_with:
            if name not in STARTS:
                continue
            if name not in map(str, get_available_trackers()):
                left_out(name, f"it is not installed (pip install {name})")
                continue
            try:
                ids = _read(self.path)
                self.in_time[name] = in_time = _InTime()
                start = functools.partial(self._start, name, config, folder, ids.get(name))
                self.running[name] = tracker = in_time(start)
                id = str(STARTS[name](tracker.tracker))
                write_json(self.path, {**ids, name: id})
                if ids.get(name) is None:
                    in_time(functools.partial(tracker.store_init_configuration, settings))
            except Exception as error:  # whatever a tracker raises
                self._drop(name, error)

    @staticmethod
    def _start(name: str, config: TrackConfig, folder: Path, id: str | None) -> Any:
        kind, options = LOGGER_TYPE_TO_CLASS[name], _options(name, config, folder, id)
        place = [str(folder)] if kind.requires_logging_directory else []
        # aim names the run after what the others call the project
        first = (config.name or folder.name) if name == "aim" else config.project
        tracker = kind(first, *place, **options)
        tracker.start()
        if name == "comet_ml":
            tracker.tracker.set_name(config.name or folder.name)
            tracker.tracker.add_tags(list(config.tags))
        return tracker

    def log(self, figures: dict[str, float], step: int) -> None:
        """step: optimizer steps done."""
        self._each(lambda tracker, _: tracker.log(figures, step=step))

    def table(self, rows: dict[str, dict[str, float]], step: int) -> None:
        """The last table of a run, where the tracker takes tables. rows: metrics by what was evaluated."""
        names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
        data = [[row, *(figures.get(name) for name in names)] for row, figures in rows.items()]
        self._each(
            lambda tracker, _: (
                tracker.log_table("final", ["evaluation", *names], data, step=step)
                if hasattr(tracker, "log_table")
                else None
            )
        )

    def take_pictures(self) -> bool:
        """Whether there is one that does."""
        return not PICTURES.keys().isdisjoint(self.running)

    def pictures(self, pictures: dict[str, Image], step: int) -> None:
        """To the trackers that take pictures. pictures: by name, such as figures/curves."""
        self._each(lambda tracker, name: PICTURES[name](tracker, pictures, step) if name in PICTURES else None)

    def close(self) -> None:
        """Finish every tracker."""
        self._each(lambda tracker, _: tracker.finish(), LAST)
        self.running.clear()

    def _each(self, call: Callable[[Any, str], Any], seconds: float | None = None) -> None:
        """call: takes a tracker and its name. seconds: that it may take, PATIENCE by default."""
        for name, tracker in list(self.running.items()):
            try:
                self.in_time[name](functools.partial(call, tracker, name), seconds)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self.running.pop(name, None)
        left_out(name, " ".join(one_line(error).split()))


def left_out(name: str, why: str) -> None:
    """Tells that a tracker is left out, which stops no training."""
    warnings.warn(f"track.log_with: {name} is left out, training continues: {why}", stacklevel=4)


def _read(path: Path) -> dict[str, str]:
    return dict(read_json(path)) if path.exists() else {}


def _plain(value: Any) -> Any:
    """What every tracker takes as a setting."""
    return value if isinstance(value, bool | int | float | str) else str(value)
