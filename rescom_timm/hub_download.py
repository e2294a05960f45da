"""Bounded downloads from the Hub, runs on the Hub, and errors of the Hub's client."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import DryRunFileInfo, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rescom_timm.engine import checkpoint
from rescom_timm.engine.errors import RunError
from rescom_timm.engine.run_folder import Line, RunElsewhere, lines
from rescom_timm.errors import InputError, MissingFileError, UnreachableError, code_of
from rescom_timm.hub_client import hub_id, online
from rescom_timm.io import MAX_JSON, MAX_RECIPE, read_json, read_text, sha256, write_text

_NETWORK: tuple[Any, ...] = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)
"""Errors of the Hub's client; the base of its HTTP errors is another class in each version."""


class HubError(RunError):
    """The Hub refused or could not be reached; the message says why and what to do. lasting: a retry will not help."""

    def __init__(self, code: str, message: str, lasting: bool = True) -> None:
        super().__init__(code, message)
        self.lasting = lasting


def explain(error: Exception, repo: str, doing: str = "pushing to") -> HubError:
    """An error of the Hub's client as one line with advice. doing: the start of the message, such as "pushing to"."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    asked = getattr(getattr(response, "request", None), "method", "")
    where = f"{doing} {repo} failed"
    if isinstance(error, OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and status is None):
        return HubError("hub.unreachable", f"{where}: HF_HUB_OFFLINE is set; unset it")
    if isinstance(error, LocalTokenNotFoundError):
        return no_token(where)
    if isinstance(error, RevisionNotFoundError):
        return HubError("hub.not_found", f"{where}: the repository has no such revision (the part after @)")
    if status == 401:
        return HubError(
            "hub.token",
            f"{where}: the Hub has no such repository, or the token is missing, wrong or expired (401); check the "
            "name, and log in again with  hf auth login  or set HF_TOKEN",
        )
    if status == 403:
        return HubError(
            "hub.token",
            f"{where}: the token lacks the right (403); use one that may write to that owner's repositories, or name "
            "a repository of your own",
        )
    if isinstance(error, RepositoryNotFoundError) or (status == 404 and not isinstance(error, EntryNotFoundError)):
        message = f"{where}: there is no such repository, or your token may not see it (404); check the name"
        return HubError("hub.not_found", message)
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return HubError("hub.not_found", f"{where}: the repository does not hold {_line(error)}")
    if status in (409, 412):
        message = f"{where}: another writer changed the repository at the same time ({status})"
        return HubError("hub.busy", message, lasting=False)
    if status == 429:
        return HubError("hub.busy", f"{where}: too many requests (429); try again later", lasting=False)
    if status is not None and status >= 500:
        return HubError(
            "hub.busy", f"{where}: the Hub has an internal error ({status}); try again later", lasting=False
        )
    if status is not None:
        return HubError("hub.refused", f"{where}: the Hub refuses ({asked} {status}): {_line(error)}")
    if isinstance(error, UnreachableError):
        return HubError("hub.unreachable", f"{where}: {_line(error)}")
    if isinstance(error, _NETWORK):
        return HubError("hub.unreachable", f"{where}: the connection failed ({_line(error)})", lasting=False)
    if isinstance(error.__cause__, Exception):  # the client wraps errors of its threads
        return explain(error.__cause__, repo, doing)
    return HubError("hub.refused", f"{where}: {type(error).__name__}: {_line(error)}")


def no_token(where: str) -> HubError:
    """The error of a push without a token. where: the start of the message."""
    return HubError("hub.token", f"{where}: no token was found; log in with  hf auth login  or set HF_TOKEN")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."


def at_revision(source: str | Path, revision: str) -> str:
    """The address of a Hub id at a branch, tag or commit.

    Raises InputError (hub.id) for a path, an invalid revision and an id that names another revision.
    """
    name, _, own = (hub_id(source) or "").partition("@")
    if not name:
        message = f"revision belongs to a Hub id such as me/rescom-r50, not to the folder {source}: leave it out"
        raise InputError("hub.id", message)
    address = f"hf://{name}@{revision}"
    try:
        hub_id(address)
    except ValueError:
        raise InputError("hub.id", f"revision must be a branch, a tag or a commit, not {revision!r}") from None
    if own not in ("", revision):
        raise InputError("hub.id", f"{source} already names a revision, and revision is {revision}: give one of them")
    return address


def download(repo: str, names: Sequence[str], needed: str, force: bool = False) -> Path:
    """Download those of the named files that a repository holds into the Hub's cache; returns their folder.

    Raises MissingFileError (hub.*) if the repository does not exist or cannot be reached, InputError if it does not
    hold `needed` (model.missing), or is larger than what is read or than the free disk (hub.size).
    """
    name, _, revision = repo.partition("@")
    about: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(names), "force_download": force}
    with asked(repo, "reading"):
        with suppress(DryRunError):  # the Hub cannot be reached: perhaps the files are in the cache
            check_sizes(repo, snapshot_download(name, **about, dry_run=True))
        folder = Path(snapshot_download(name, **about))
    if not (folder / needed).is_file():
        raise InputError(
            "model.missing",
            f"{name} was not made by rescom_timm (it holds no {needed}); a plain timm model is read by "
            f'timm.create_model("hf-hub:{name}", pretrained=True)',
        )
    return folder


@contextmanager
def asked(repo: str, doing: str) -> Iterator[None]:
    """A block of requests to the Hub.

    Raises MissingFileError with the code of `explain` if something is not there or cannot be reached, and hub.refused
    for a malformed answer, such as the page of a proxy.
    """
    try:
        with online():
            yield
    except _NETWORK as error:
        explained = explain(error, repo, doing)
        raise MissingFileError(explained.code, str(explained)) from error
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError, RecursionError, AssertionError) as error:
        raise MissingFileError(
            "hub.refused",
            f"{doing} {repo} failed: no answer of the Hub ({type(error).__name__}: {_line(error)}); check the "
            "proxy and HF_ENDPOINT",
        ) from error


def check_sizes(repo: str, files: Sequence[DryRunFileInfo]) -> None:
    """Refuse to download files that are too large.

    Raises InputError (hub.size) if one is larger than what is read of its kind, or all than the free disk.
    """
    sizes = {file.filename: file.file_size or 0 for file in files if file.will_download}
    for name, size in sizes.items():
        most = MAX_RECIPE if name.endswith(".yaml") else MAX_JSON
        if not name.endswith(".safetensors") and size > most:
            have, bound = size / 2**20, most / 2**20
            message = f"{name} of {repo} is not read: it has {have:,.0f} MiB; at most {bound:,.0f} are read"
            raise InputError("hub.size", message)
    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    needed, free = sum(sizes.values()), shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            "hub.size",
            f"{repo} needs {needed / 2**30:,.1f} GiB, and {there} has {free / 2**30:,.1f} free: free disk space or set "
            "HF_HOME to another disk",
        )


def _parts(address: str) -> tuple[str, str | None]:
    """(owner/name, revision) of hf://owner/name@revision. Raises HubError."""
    try:
        repo = hub_id(address)
    except ValueError:
        repo = None
    if repo is None:
        message = f"{address!r} is not the address of a run on the Hub: write a recipe, or hf://owner/name"
        raise HubError("hub.id", message)
    name, _, revision = repo.partition("@")
    return name, revision or None


class PushedRun(RunElsewhere):
    """A run that was pushed to the Hub. address: hf://owner/name, optionally with @revision. Methods raise HubError."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.name, self.revision = _parts(address)

    def __str__(self) -> str:
        return self.address

    def recipe(self) -> Path:
        """The recipe that was pushed with the run, in the Hub's cache.

        If its hash differs it is downloaded once more; if it still differs, this warns.
        """
        for force in (False, True):
            path = self._file("recipe.yaml", "reading the recipe of", force)
            try:
                if read_json(self._file("hashes.json", "reading the recipe of", force)).get(path.name) == sha256(path):
                    return path
            except (HubError, ValueError, OSError) as error:
                reason = str(error)
            else:
                reason = "its hash differs: it was changed or is damaged"
        warnings.warn(f"recipe.yaml of {self} may not be what was pushed ({reason}); it is used as it is", stacklevel=2)
        return path

    def log(self) -> Path | None:
        """The path of metrics.jsonl in the Hub's cache; None if the repository has none."""
        try:
            return self._file("metrics.jsonl", "reading the log of")
        except HubError as error:
            cause = error.__cause__ and error.__cause__.__cause__
            if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
                return None
            raise

    def _file(self, name: str, doing: str, force: bool = False) -> Path:
        about: dict[str, Any] = {"revision": self.revision, "force_download": force}
        try:
            with asked(self.name, doing):
                with suppress(DryRunError):
                    check_sizes(self.name, [hf_hub_download(self.name, name, **about, dry_run=True)])
                return Path(hf_hub_download(self.name, name, **about))
        except (FileNotFoundError, ValueError) as error:
            raise HubError(code_of(error), str(error)) from error

    def lines(self) -> list[Line]:
        """The records of metrics.jsonl; empty if there is none."""
        log = self.log()
        return lines(log) if log is not None else []

    def fetch(self, folder: Path) -> None:
        """Download the newest and the best checkpoint and the log into a run's folder.

        A folder with a checkpoint of the same or a later step stays as it is. Raises HubError if the repository cannot
        be read, holds no checkpoint, or its files are damaged.
        """
        repo = f"{self.name}@{self.revision}" if self.revision else self.name
        try:
            with asked(repo, "reading"):
                files = HfApi().list_repo_files(self.name, revision=self.revision)
        except FileNotFoundError as error:
            raise HubError(code_of(error), str(error)) from error
        there = sorted({found[1] for file in files if (found := re.match(r"checkpoints/(step-\d+)/", file))})
        if not there:
            raise HubError(
                "hub.not_found",
                f"{repo} holds no checkpoint to resume from: it was pushed without hub.strategy=checkpoint or "
                "all_checkpoints; start from its weights with rescom_timm.from_pretrained",
            )
        here = [path.name for path in checkpoint.listed(folder / "checkpoints")]
        if here and here[-1] >= there[-1]:
            print(f"{folder} has {here[-1]}, and {repo} no later checkpoint: continuing from the folder")
            return
        if (log := self.log()) is not None:  # first: the log identifies the run
            write_text(folder / "metrics.jsonl", read_text(log, errors="replace"))
        state = _fetch_checkpoint(repo, there[-1], folder)
        best = state.get("progress", {}).get("best_checkpoint")
        if best in there and best not in (*here, there[-1]):
            _fetch_checkpoint(repo, best, folder)


def _fetch_checkpoint(repo: str, name: str, run: Path) -> checkpoint.SavedState:
    """Download a checkpoint, check its hashes and move it into the run's folder; returns its state."""
    partial = run / "checkpoints" / f".partial-{name}"
    files = [f"checkpoints/{name}/{file}" for file in (*checkpoint.FILES, "hashes.json")]
    for force in (False, True):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            snapshot = download(repo, files, files[-1], force)
            partial.mkdir(parents=True)
            for file in files:
                if (snapshot / file).is_file():
                    shutil.copyfile(snapshot / file, partial / Path(file).name)
            _, state = checkpoint.load(partial)
            partial.rename(run / "checkpoints" / name)
            return state
        except (FileNotFoundError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise HubError(code_of(error), str(error)) from error
        except checkpoint.CheckpointError as error:
            damage = error
    shutil.rmtree(partial, ignore_errors=True)
    raise HubError("hub.damaged", f"{name} of {repo} is damaged after two downloads ({damage}): push it again")
