"""The Hub from a run's side: what is pushed when, in the background; what is fetched; what went wrong, in words.

A push never touches what is still written to: `stage` lays an immutable copy (checkpoints by hard link) into
RUN/hub/, and a process of its own (runs/push.py) uploads it. So a push can be killed, fail or hang without harm to the
training, draws no random number in it, and whatever is left in RUN/hub/ is completed by  tools/push.py RUN.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import sha_fileobj

from rescom_timm.files import write_json, write_text
from rescom_timm.runs import checkpoint

Strategy = Literal["end", "best", "every_save", "checkpoint", "all_checkpoints"]
TEXTS = ("recipe.yaml", "environment.json", "metrics.jsonl", "classes.json")
WAITING = 5
"""Staged pushes that may wait for the network; with more, the oldest are given up."""


@dataclass(frozen=True)
class HubConfig:
    """Where a run is pushed to. The token comes from `hf auth login` or HF_TOKEN, never from a recipe."""

    repo: str | None = None
    """owner/name on the Hub; null: nothing is pushed."""
    strategy: Strategy = "end"
    """end: the trained model. best: also each new best one (by the validation split). every_save: also the newest, at
    each checkpoint. checkpoint: the same, with that checkpoint, so that training can go on elsewhere
    (--resume hf://owner/name). all_checkpoints: every checkpoint stays in the repository."""
    private: bool = True
    """Whether a repository that is made by the push is private; one that exists stays as it is."""
    license: str | None = None
    """Licence of the weights for the model card, such as apache-2.0; null: none is named."""
    benchmark: str | None = None
    """owner/dataset#task of a Benchmark data set of the Hub: the test accuracy is reported to its leaderboard too."""
    timeout_minutes: float = 60.0
    """How long the end of a run waits for its last push."""

    def __post_init__(self) -> None:
        if self.repo is not None:
            if self.repo.count("/") != 1:
                raise ValueError(f"repo must be owner/name, not {self.repo!r}")
            try:
                validate_repo_id(self.repo)
            except ValueError as error:
                raise ValueError(f"repo {self.repo!r} is no name of the Hub: {str(error).splitlines()[0]}") from None
        if self.benchmark is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+#[\w.-]+", self.benchmark):
            raise ValueError(f"benchmark must be owner/dataset#task, not {self.benchmark!r}")
        if self.timeout_minutes <= 0:
            raise ValueError("timeout_minutes must be above 0")


_NETWORK: tuple[Any, ...] = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)
"""What the Hub's client raises; the base of its HTTP errors comes from another package from version to version."""


class HubError(RuntimeError):
    """The Hub refused or could not be reached; the message says why and what to do. `lasting`: trying again as it is
    will not help."""

    def __init__(self, message: str, lasting: bool = True) -> None:
        super().__init__(message)
        self.lasting = lasting


def explain(error: Exception, repo: str, doing: str = "pushing to") -> HubError:
    """An error of the Hub's client as a sentence with advice. doing: such as "pushing to", before the repo's name."""
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    asked = getattr(getattr(response, "request", None), "method", "")
    where = f"{doing} {repo} failed"
    if isinstance(error, OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and code is None):
        return HubError(f"{where}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it")
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(f"{where}: no token was found; log in with  hf auth login  or set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{where}: the repository has no such revision (what stands behind the @)")
    if code == 401:
        return HubError(
            f"{where}: the Hub knows no such repository, or the token is missing, wrong or expired (401); check the "
            "name, and log in anew with  hf auth login  or set HF_TOKEN"
        )
    if code == 403:
        return HubError(
            f"{where}: the token may not do this (403); use one with the right to write to that owner's repositories, "
            "or name a repository of your own"
        )
    if isinstance(error, RepositoryNotFoundError) or (code == 404 and not isinstance(error, EntryNotFoundError)):
        return HubError(f"{where}: there is no such repository, or your token may not see it (404); check the name")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return HubError(f"{where}: the repository does not hold {_line(error)}")
    if code in (409, 412):
        return HubError(f"{where}: somebody else changed the repository at the same moment ({code})", lasting=False)
    if code == 429:
        return HubError(f"{where}: the Hub asks for fewer requests (429); try again later", lasting=False)
    if code is not None and code >= 500:
        return HubError(f"{where}: the Hub answers with an error of its own ({code}); try again later", lasting=False)
    if code is not None:
        return HubError(f"{where}: the Hub refuses ({asked} {code}): {_line(error)}")
    if isinstance(error, _NETWORK):
        return HubError(f"{where}: the connection was lost or not made ({_line(error)})", lasting=False)
    if isinstance(error.__cause__, Exception):  # the client wraps what happens in its threads
        return explain(error.__cause__, repo, doing)
    return HubError(f"{where}: {type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


# ------------------------------------------------------------------------------------------------------------- pushing


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
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rescom_timm.runs.push", str(self.run.resolve())], env={**os.environ, **quiet},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self.process

    def _tell(self) -> None:
        told = status(self.run)
        if "error" in told:
            print(
                f"{told['error']}\n(training is not touched by this; what was to be pushed is kept, tried again with "
                f"the next push, and completed at any time by:  python tools/push.py {self.run})",
                file=sys.stderr,
            )
        elif "url" in told:
            print(f"pushed {told['what']}: {told['url']}")
        else:
            print(f"the push to {self.config.repo} ended without a word; see {self.run / 'hub' / 'push.log'}")


def stage(run: Path, config: HubConfig, newest: str, best: str | None, end: bool) -> Path:
    """An immutable copy of what a push needs, in RUN/hub/: a run's folder of its own, with one or two checkpoints."""
    final = run / "hub" / (newest + ("-end" if end else ""))
    if final.exists():
        return final
    aside = final.with_name(f".{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    for name in dict.fromkeys([newest] if best is None else [best, newest]):
        if (run / "checkpoints" / name).is_dir():
            shutil.copytree(run / "checkpoints" / name, aside / "checkpoints" / name, copy_function=_link)
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


# ------------------------------------------------------------------------------------------------------------ fetching


def as_repo(source: str | Path) -> str | None:
    """owner/name (perhaps @revision) of hf://owner/name, hf-hub:owner/name or owner/name; None for anything else."""
    text = re.sub(r"^(hf://|hf-hub:|hf_hub:)", "", str(source)) if isinstance(source, str) else ""
    return text if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", text) else None


def download(repo: str, names: Sequence[str], needed: str, force: bool = False) -> Path:
    """Those of the named files that a repository holds, in the Hub's cache on this machine; returns their folder.

    Raises FileNotFoundError where the repository is not there or cannot be reached, ValueError where it does not hold
    `needed`.
    """
    name, _, revision = repo.partition("@")
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(names), force_download=force)
        )
    except _NETWORK as error:
        raise FileNotFoundError(str(explain(error, repo, "reading"))) from error
    if not (folder / needed).is_file():
        raise ValueError(
            f"{name} was not made by rescom_timm (it holds no {needed}); a plain timm model is read by "
            f'timm.create_model("hf-hub:{name}", pretrained=True)'
        )
    return folder


def fetch_recipe(address: str | None) -> Path:
    """The recipe of a repository that a run was pushed to. address: hf://owner/name. Raises HubError."""
    name, revision = _parts(address)
    try:
        return Path(hf_hub_download(name, "recipe.yaml", revision=revision))
    except _NETWORK as error:
        raise explain(error, name, "reading the recipe of") from error


def _parts(address: str | None) -> tuple[str, str | None]:
    """(owner/name, revision) of hf://owner/name@revision. Raises HubError."""
    repo = as_repo(address or "")
    if repo is None:
        raise HubError(f"{address!r} is no address of a run on the Hub: write a recipe, or hf://owner/name")
    name, _, revision = repo.partition("@")
    return name, revision or None


def fetch_log(address: str) -> Path | None:
    """metrics.jsonl of a run on the Hub, in the Hub's cache; None where it has none. Raises HubError."""
    name, revision = _parts(address)
    try:
        return Path(hf_hub_download(name, "metrics.jsonl", revision=revision))
    except _NETWORK as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise explain(error, name, "reading the log of") from error


def fetch_run(address: str, run: Path) -> None:
    """Bring the newest checkpoint of a run on the Hub (and its best one) into a run's folder, with the log up to it.

    A folder that is as far or further is left as it is. Raises HubError where the repository cannot be read, holds no
    checkpoint, or its files are damaged.
    """
    name, revision = _parts(address)
    repo = f"{name}@{revision}" if revision else name
    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except _NETWORK as error:
        raise explain(error, repo, "reading") from error
    there = sorted({file.split("/")[1] for file in files if file.startswith("checkpoints/step-")})
    if not there:
        raise HubError(
            f"{repo} holds no checkpoint to go on from: it was pushed without hub.strategy: checkpoint or "
            "all_checkpoints; start from its weights with rescom_timm.from_pretrained"
        )
    here = [path.name for path in checkpoint.listed(run / "checkpoints")]
    if here and here[-1] >= there[-1]:
        print(f"{run} is as far as {repo} ({here[-1]}): going on from the folder")
        return
    if (log := fetch_log(address)) is not None:  # first, for by its log the run is known again
        write_text(run / "metrics.jsonl", log.read_text(encoding="utf-8", errors="replace"))
    state = _fetch_checkpoint(repo, there[-1], run)
    best = state["progress"].get("best_checkpoint")
    if best in there and best not in (*here, there[-1]):
        _fetch_checkpoint(repo, best, run)


def _fetch_checkpoint(repo: str, name: str, run: Path) -> dict[str, Any]:
    """Download a checkpoint, check its hashes, move it into the run's folder; returns its state."""
    aside = run / "checkpoints" / f".partial-{name}"
    for force in (False, True):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            snapshot = download(repo, [f"checkpoints/{name}/*"], f"checkpoints/{name}/hashes.json", force)
            shutil.copytree(snapshot / "checkpoints" / name, aside)
            _, state = checkpoint.load(aside)
            aside.rename(run / "checkpoints" / name)
            return state
        except (FileNotFoundError, ValueError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise HubError(str(error)) from error
        except checkpoint.CheckpointError as error:
            damage = error
    shutil.rmtree(aside, ignore_errors=True)
    raise HubError(f"{name} of {repo} arrived damaged twice ({damage}); its copy on the Hub may be damaged")
