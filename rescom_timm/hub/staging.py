"""When a run is pushed to the Hub, and a copy of what is pushed.

`stage` makes an immutable copy (checkpoints by hard link) in RUN/hub/, and a separate process (push.py) uploads it. A
push that is killed, fails or hangs does not affect the training and draws no random numbers in it; `rescom-timm push
RUN` uploads what is left in RUN/hub/.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from rescom_timm.config.recipe import HubConfig
from rescom_timm.engine.build import Weights
from rescom_timm.engine.run_folder import FOLDERS
from rescom_timm.io import refuse_links, write_json

TEXTS = ("recipe.yaml", "environment.json", "metrics.jsonl", "classes.json")
WAITING = 5
"""Staged pushes that may wait for the network; of more, the oldest are removed."""


class Rule(TypedDict, total=False):
    """A decision rule for an export to keep, as export_run takes it."""

    recall: Mapping[str, float]
    costs: Sequence[Sequence[float]]


NO_RULE = Rule()


class Request(Rule, total=False):
    """A push, as push.json in its staged folder: keys of HubConfig, what is exported (export_run) and kept."""

    repo: str
    private: bool
    license: str | None
    benchmark: str | None
    export: str
    checkpoints: bool
    keep: bool
    weights: Weights | None


class Pusher:
    """The pushes of one run, from its main process: one at a time, in the background.

    Errors of the Hub, the network or a full disk are printed, not raised, and the push is retried with the next
    checkpoint and at the end.
    """

    def __init__(self, config: HubConfig, run: Path) -> None:
        self.config, self.run = config, run
        self.process: subprocess.Popen[bytes] | None = None

    def saved(self, newest: str, best: str | None) -> None:
        """After each save. newest, best: names of checkpoints (best: None if none was selected yet)."""
        strategy = self.config.strategy
        if strategy != "end" and (strategy != "best" or best == newest):
            self._push(newest, best, end=False)

    def finished(self, newest: str, best: str | None) -> None:
        """After the last evaluation: push the trained model. `wait` waits for it."""
        self._push(newest, best, end=True)

    def wait(self) -> None:
        """Wait for the running push, retry a failed one once, and print the status."""
        if self.config.repo is None:
            return
        print(f"waiting for the push to {self.config.repo} (log: {self.run / 'hub' / 'push.log'})")
        try:
            if self.process is not None:
                self.process.wait(60 * self.config.timeout_minutes)
            if staged(self.run):
                self._start().wait(60 * self.config.timeout_minutes)
        except subprocess.TimeoutExpired:
            print(f"the push takes longer than hub.timeout_minutes; it continues as process {self.process.pid}")  # type: ignore[union-attr]
        except KeyboardInterrupt:
            print("no longer waiting; the push continues in the background")
        self._print_status()

    def _push(self, newest: str, best: str | None, end: bool) -> None:
        if self.config.repo is None:
            return
        running = self.process is not None and self.process.poll() is None
        if self.process is not None and not running:
            self._print_status()
            self.process = None
        try:
            stage(self.run, self.config, newest, best, end)
            if not running:
                waiting = WAITING if self.config.strategy == "all_checkpoints" else 1
                for overtaken in staged(self.run)[:-waiting]:
                    shutil.rmtree(overtaken, ignore_errors=True)
                self._start()
        except OSError as error:
            warnings.warn(f"nothing was pushed to the Hub: {error}; training continues", RuntimeWarning, stacklevel=3)

    def _start(self) -> subprocess.Popen[bytes]:
        (self.run / "hub" / "status.json").unlink(missing_ok=True)
        # Its own session: a Ctrl-C that stops the training does not interrupt an upload. No GPU, one thread.
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with (self.run / "hub" / "push.log").open("ab") as log:
            command = [sys.executable, "-m", "rescom_timm.hub.push", str(self.run.resolve())]
            self.process = subprocess.Popen(
                command, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return self.process

    def _print_status(self) -> None:
        last = status(self.run)
        if "error" in last:
            print(
                f"{last['error']}\n(training is unaffected; the staged files stay and are retried with the next push; "
                f"to push them at any time:  rescom-timm push {self.run})",
                file=sys.stderr,
            )
        elif "url" in last:
            print(f"pushed {last['what']}: {last['url']}")
        else:
            print(f"the push to {self.config.repo} ended without a status; see {self.run / 'hub' / 'push.log'}")


def stage(run: Path, config: HubConfig, newest: str, best: str | None, end: bool, rule: Rule = NO_RULE) -> Path:
    """An immutable copy of what a push needs, in RUN/hub/: a run folder with one or two checkpoints.

    rule: recall or costs that the export keeps, as of export_run. Raises InputError (file.link) if something in the
    run's folder is a symlink to outside of it.
    """
    refuse_links(run, FOLDERS)
    final = run / "hub" / (newest + ("-end" if end else ""))
    if final.exists():
        return final
    partial = final.with_name(f".{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for name in dict.fromkeys([newest] if best is None else [best, newest]):
        source, target = run / "checkpoints" / name, partial / "checkpoints" / name
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link)
        if not source.is_dir() and (name == newest or target.is_dir()):  # pruned meanwhile, by a run that trains
            raise FileNotFoundError(errno.ENOENT, "the checkpoint was removed while it was copied", str(source))
    for path in (
        *(run / name for name in TEXTS), *run.glob("evaluation/*.json"), *run.glob("figures/*.png"),
        *run.glob("evaluation/logits/validation-*.safetensors"),
    ):  # fmt: skip
        if path.is_file():
            target = partial / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    whole = config.strategy in ("checkpoint", "all_checkpoints")
    which = "best" if end or config.strategy == "best" else "last"
    request = {
        "repo": config.repo, "private": config.private, "license": config.license, "benchmark": config.benchmark,
        "export": which, "checkpoints": whole, "keep": config.strategy == "all_checkpoints", **rule,
    }  # fmt: skip
    write_json(partial / "push.json", request)
    partial.rename(final)
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
    """The status of a run's last push: {"what", "url"} or {"error"}; empty if there was none."""
    try:
        return json.loads((run / "hub" / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
