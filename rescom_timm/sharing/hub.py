"""The Hub from a run's side: what is fetched, and what went wrong, in words."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from huggingface_hub.utils.sha import sha_fileobj

from rescom_timm.files import write_text
from rescom_timm.training import checkpoint
from rescom_timm.training.errors import RunError
from rescom_timm.training.run_folder import RunElsewhere, lines

_NETWORK: tuple[Any, ...] = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)
"""What the Hub's client raises; the base of its HTTP errors comes from another package from version to version."""


class HubError(RunError):
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


def _parts(address: str) -> tuple[str, str | None]:
    """(owner/name, revision) of hf://owner/name@revision. Raises HubError."""
    repo = as_repo(address)
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
        """The recipe that it was pushed with, in the Hub's cache. Raises HubError."""
        try:
            return Path(hf_hub_download(self.name, "recipe.yaml", revision=self.revision))
        except _NETWORK as error:
            raise explain(error, self.name, "reading the recipe of") from error

    def log(self) -> Path | None:
        """Its metrics.jsonl in the Hub's cache; None where it has none. Raises HubError."""
        try:
            return Path(hf_hub_download(self.name, "metrics.jsonl", revision=self.revision))
        except _NETWORK as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise explain(error, self.name, "reading the log of") from error

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
            files = HfApi().list_repo_files(self.name, revision=self.revision)
        except _NETWORK as error:
            raise explain(error, repo, "reading") from error
        there = sorted({file.split("/")[1] for file in files if file.startswith("checkpoints/step-")})
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
            write_text(folder / "metrics.jsonl", log.read_text(encoding="utf-8", errors="replace"))
        state = _fetch_checkpoint(repo, there[-1], folder)
        best = state["progress"].get("best_checkpoint")
        if best in there and best not in (*here, there[-1]):
            _fetch_checkpoint(repo, best, folder)


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
