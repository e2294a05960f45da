"""What a run pushes to the Hub and when, in the background.

A push never touches what is still written to: `stage` lays an immutable copy (checkpoints by hard link) into
RUN/hub/, and a process of its own (push.py) uploads it. So a push can be killed, fail or hang without harm to the
training, draws no random number in it, and whatever is left in RUN/hub/ is completed by  rescom-timm push RUN.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from rescom_timm.config.recipe import HubConfig
from rescom_timm.engine.run_folder import FOLDERS
from rescom_timm.io import refuse_links, write_json

TEXTS = ("recipe.yaml", "environment.json", "metrics.jsonl", "classes.json")
WAITING = 5
"""Staged pushes that may wait for the network; with more, the oldest are given up."""


class Pusher:
    """The pushes of one run, from its main process: one at a time, in the background. Nothing here raises for what the
    Hub, the network or a full disk does: it is told, and tried again with the next checkpoint and at the end."""

    def __init__(self, config: HubConfig, run: Path) -> None:
        self.config, self.run = config, run
        self.process: subprocess.Popen[bytes] | None = None

    def saved(self, newest: str, best: str | None) -> None:
        """After each save. newest, best: names of checkpoints (best: None where none was selected yet)."""
        strategy = self.config.strategy
        if strategy != "end" and (strategy != "best" or best == newest):
            self._push(newest, best, end=False)

    def finished(self, newest: str, best: str | None) -> None:
        """After the last evaluation: push the trained model. `wait` brings it to an end."""
        self._push(newest, best, end=True)

    def wait(self) -> None:
        """Wait for what is under way, try once more what failed, and tell how it ended."""
        if self.config.repo is None:
            return
        print(f"waiting for the push to {self.config.repo} (log: {self.run / 'hub' / 'push.log'})")
        try:
            if self.process is not None:
                self.process.wait(60 * self.config.timeout_minutes)
            if staged(self.run):
                self._start().wait(60 * self.config.timeout_minutes)
        except subprocess.TimeoutExpired:
            print(f"the push takes longer than hub.timeout_minutes; it goes on as process {self.process.pid}")  # type: ignore[union-attr]
        except KeyboardInterrupt:
            print("not waited for; the push goes on in the background")
        self._tell()

    def _push(self, newest: str, best: str | None, end: bool) -> None:
        if self.config.repo is None:
            return
        running = self.process is not None and self.process.poll() is None
        if self.process is not None and not running:
            self._tell()
            self.process = None
        try:
            stage(self.run, self.config, newest, best, end)
            if not running:
                waiting = WAITING if self.config.strategy == "all_checkpoints" else 1
                for overtaken in staged(self.run)[:-waiting]:
                    shutil.rmtree(overtaken, ignore_errors=True)
                self._start()
        except OSError as error:
            warnings.warn(f"nothing was pushed to the Hub: {error}; training goes on", RuntimeWarning, stacklevel=3)

    def _start(self) -> subprocess.Popen[bytes]:
        (self.run / "hub" / "status.json").unlink(missing_ok=True)
        # Its own session: a Ctrl-C that stops the training does not cut an upload. No GPU, and no core for itself.
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with (self.run / "hub" / "push.log").open("ab") as log:
            words = [sys.executable, "-m", "rescom_timm.hub.push", str(self.run.resolve())]
            self.process = subprocess.Popen(
                words, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return self.process

    def _tell(self) -> None:
        told = status(self.run)
        if "error" in told:
            print(
                f"{told['error']}\n(training is not touched by this; what was to be pushed is kept, tried again with "
                f"the next push, and completed at any time by:  rescom-timm push {self.run})",
                file=sys.stderr,
            )
        elif "url" in told:
            print(f"pushed {told['what']}: {told['url']}")
        else:
            print(f"the push to {self.config.repo} ended without a message; see {self.run / 'hub' / 'push.log'}")


def stage(run: Path, config: HubConfig, newest: str, best: str | None, end: bool) -> Path:
    """An immutable copy of what a push needs, in RUN/hub/: a run's folder of its own, with one or two checkpoints.
    Raises ValueError where something in the run's folder is a link out of it, and so another's file."""
    refuse_links(run, FOLDERS)
    final = run / "hub" / (newest + ("-end" if end else ""))
    if final.exists():
        return final
    aside = final.with_name(f".{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    for name in dict.fromkeys([newest] if best is None else [best, newest]):
        source, target = run / "checkpoints" / name, aside / "checkpoints" / name
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link)
        if not source.is_dir() and (name == newest or target.is_dir()):  # pruned meanwhile, by a run that trains
            raise FileNotFoundError(errno.ENOENT, "the checkpoint was removed while it was copied", str(source))
    for path in (
        *(run / name for name in TEXTS), *run.glob("evaluation/*.json"), *run.glob("figures/*.png"),
    ):  # fmt: skip
        if path.is_file():
            target = aside / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    whole = config.strategy in ("checkpoint", "all_checkpoints")
    which = "best" if end or config.strategy == "best" else "last"
    request = {
        "repo": config.repo, "private": config.private, "license": config.license, "benchmark": config.benchmark,
        "export": which, "checkpoints": whole, "keep": config.strategy == "all_checkpoints",
    }  # fmt: skip
    write_json(aside / "push.json", request)
    aside.rename(final)
    return final


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # a checkpoint's files are never written to again
    except OSError:
        shutil.copy2(source, target)


def staged(run: Path) -> list[Path]:
    """What waits to be pushed, oldest first."""
    return sorted((run / "hub").glob("step-*"))


def status(run: Path) -> dict[str, str]:
    """How the last push of a run ended: {"what", "url"} or {"error"}; empty where none did."""
    try:
        return json.loads((run / "hub" / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
