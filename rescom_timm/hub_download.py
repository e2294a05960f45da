"""The Hub from a run's side: what is fetched, and what went wrong, in words."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from rescom_timm.engine.run_folder import RunElsewhere, lines
from rescom_timm.hub_client import Unreachable, hub_id, online
from rescom_timm.io import MAX_JSON, MAX_RECIPE, read_json, read_text, sha256, write_text

_NETWORK: tuple[Any, ...] = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)
"""What the Hub's client raises; the base of its HTTP errors comes from another package from version to version."""


class HubError(RunError):
    """The Hub refused or could not be reached; the message says why and what to do. `lasting`: trying again as it is
    will not help."""

    def __init__(self, code: str, message: str | None = None, lasting: bool = True) -> None:
        super().__init__(code, message)
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
            "name, and log in again with  hf auth login  or set HF_TOKEN"
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
    if isinstance(error, Unreachable):
        return HubError(f"{where}: {_line(error)}")
    if isinstance(error, _NETWORK):
        return HubError(f"{where}: the connection was lost or not made ({_line(error)})", lasting=False)
    if isinstance(error.__cause__, Exception):  # the client wraps what happens in its threads
        return explain(error.__cause__, repo, doing)
    return HubError(f"{where}: {type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."


def at_revision(source: str | Path, revision: str) -> str:
    """The address of a Hub id at a branch, tag or commit. Raises ValueError for what is no Hub id, or names another."""
    name, _, own = (hub_id(source) or "").partition("@")
    if not name:
        raise ValueError(f"revision is of a Hub id such as me/rescom-r50, not of the folder {source}: leave it out")
    address = f"hf://{name}@{revision}"
    try:
        hub_id(address)
    except ValueError:
        raise ValueError(f"revision must be a branch, a tag or a commit, not {revision!r}") from None
    if own not in ("", revision):
        raise ValueError(f"{source} names a revision already, and revision is {revision}: give one of them")
    return address


def download(repo: str, names: Sequence[str], needed: str, force: bool = False) -> Path:
    """Those of the named files that a repository holds, in the Hub's cache on this machine; returns their folder.

    Raises FileNotFoundError where the repository is not there or cannot be reached, ValueError where it does not hold
    `needed` or is larger than what is read or the disk has room for.
    """
    name, _, revision = repo.partition("@")
    about: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(names), "force_download": force}
    with asked(repo, "reading"):
        try:
            check_sizes(repo, snapshot_download(name, **about, dry_run=True))
        except DryRunError:  # it cannot be reached: perhaps it is in the cache
            pass
        folder = Path(snapshot_download(name, **about))
    if not (folder / needed).is_file():
        raise ValueError(
            f"{name} was not made by rescom_timm (it holds no {needed}); a plain timm model is read by "
            f'timm.create_model("hf-hub:{name}", pretrained=True)'
        )
    return folder


@contextmanager
def asked(repo: str, doing: str) -> Iterator[None]:
    """The block asks the Hub for something. Raises FileNotFoundError where it is not there or cannot be reached, and
    where the answer is none of the Hub's: a page of a proxy, say."""
    try:
        with online():
            yield
    except _NETWORK as error:
        raise FileNotFoundError(str(explain(error, repo, doing))) from error
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError, RecursionError, AssertionError) as error:
        raise FileNotFoundError(
            f"{doing} {repo} failed: the answer is not one of the Hub ({type(error).__name__}: {_line(error)}); is "
            "there a proxy between, or another HF_ENDPOINT?"
        ) from error


def check_sizes(repo: str, files: Sequence[DryRunFileInfo]) -> None:
    """Raises ValueError where files to download are larger than what is read of their kind, or than the free disk."""
    sizes = {file.filename: file.file_size or 0 for file in files if file.will_download}
    for name, size in sizes.items():
        most = MAX_RECIPE if name.endswith(".yaml") else MAX_JSON
        if not name.endswith(".safetensors") and size > most:
            raise ValueError(
                f"{name} of {repo} is not read: it has {size / 2**20:,.0f} MiB; at most {most / 2**20:,.0f} are read"
            )
    there = next(
        path for path in (Path(constants.HF_HUB_CACHE), *Path(constants.HF_HUB_CACHE).parents) if path.exists()
    )
    free = shutil.disk_usage(there).free
    if sum(sizes.values()) > free:
        raise ValueError(
            f"{repo} is not read: it has {sum(sizes.values()) / 2**30:,.1f} GiB, and {there} has room for "
            f"{free / 2**30:,.1f}"
        )


def _parts(address: str) -> tuple[str, str | None]:
    """(owner/name, revision) of hf://owner/name@revision. Raises HubError."""
    try:
        repo = hub_id(address)
    except ValueError:
        repo = None
    if repo is None:
        raise HubError(f"{address!r} is no address of a run on the Hub: write a recipe, or hf://owner/name")
    name, _, revision = repo.partition("@")
    return name, revision or None


class PushedRun(RunElsewhere):
    """A run that was pushed to the Hub. address: hf://owner/name, perhaps @revision. Raises HubError."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.name, self.revision = _parts(address)

    def __str__(self) -> str:
        return self.address

    def recipe(self) -> Path:
        """The recipe that it was pushed with, in the Hub's cache; one that is not what was pushed is fetched a second
        time, then told in a warning. Raises HubError."""
        for force in (False, True):
            path = self._file("recipe.yaml", "reading the recipe of", force)
            try:
                if read_json(self._file("hashes.json", "reading the recipe of", force)).get(path.name) == sha256(path):
                    return path
            except (HubError, ValueError, OSError) as error:
                told = str(error)
            else:
                told = "it was changed since, or arrived damaged"
        warnings.warn(f"recipe.yaml of {self} may not be what was pushed ({told}); read as it is", stacklevel=2)
        return path

    def log(self) -> Path | None:
        """Its metrics.jsonl in the Hub's cache; None where it has none. Raises HubError."""
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
                try:
                    check_sizes(self.name, [hf_hub_download(self.name, name, **about, dry_run=True)])
                except DryRunError:
                    pass
                return Path(hf_hub_download(self.name, name, **about))
        except (FileNotFoundError, ValueError) as error:
            raise HubError(str(error)) from error

    def lines(self) -> list[dict[str, Any]]:
        log = self.log()
        return lines(log) if log is not None else []

    def fetch(self, folder: Path) -> None:
        """Bring the newest checkpoint (and the best one) into a run's folder, with the log up to it.

        A folder that is as far or further is left as it is. Raises HubError where the repository cannot be read, holds
        no checkpoint, or its files are damaged.
        """
        repo = f"{self.name}@{self.revision}" if self.revision else self.name
        try:
            with asked(repo, "reading"):
                files = HfApi().list_repo_files(self.name, revision=self.revision)
        except FileNotFoundError as error:
            raise HubError(str(error)) from error
        there = sorted({found[1] for file in files if (found := re.match(r"checkpoints/(step-\d+)/", file))})
        if not there:
            raise HubError(
                f"{repo} holds no checkpoint to resume from: it was pushed without hub.strategy: checkpoint or "
                "all_checkpoints; start from its weights with rescom_timm.from_pretrained"
            )
        here = [path.name for path in checkpoint.listed(folder / "checkpoints")]
        if here and here[-1] >= there[-1]:
            print(f"{folder} is as far as {repo} ({here[-1]}): the folder is used")
            return
        if (log := self.log()) is not None:  # first, for by its log the run is known again
            write_text(folder / "metrics.jsonl", read_text(log, errors="replace"))
        state = _fetch_checkpoint(repo, there[-1], folder)
        best = state.get("progress", {}).get("best_checkpoint")
        if best in there and best not in (*here, there[-1]):
            _fetch_checkpoint(repo, best, folder)


def _fetch_checkpoint(repo: str, name: str, run: Path) -> dict[str, Any]:
    """Download a checkpoint, check its hashes, move it into the run's folder; returns its state."""
    aside = run / "checkpoints" / f".partial-{name}"
    files = [f"checkpoints/{name}/{file}" for file in (*checkpoint.FILES, "hashes.json")]
    for force in (False, True):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            snapshot = download(repo, files, files[-1], force)
            aside.mkdir(parents=True)
            for file in files:
                if (snapshot / file).is_file():
                    shutil.copyfile(snapshot / file, aside / Path(file).name)
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
