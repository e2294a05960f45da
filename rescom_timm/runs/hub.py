"""The Hub from a run's side: what is pushed when, in the background; what is fetched; what went wrong, in words.

A push never touches what is still written to: `stage` lays an immutable copy (checkpoints by hard link) into
RUN/hub/, and a process of its own (runs/push.py) uploads it. So a push can be killed, fail or hang without harm to the
training, draws no random number in it, and whatever is left in RUN/hub/ is completed by  tools/push.py RUN.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    if code == 401 and not _exists_without_token(error):
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
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is not error and getattr(cause, "response", None) is not None:
        return explain(cause, repo, doing)  # type: ignore[arg-type]
    return HubError(f"{where}: the connection was lost or not made ({_line(cause)})", lasting=False)


def _exists_without_token(error: Exception) -> bool:
    return False


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."


def sha256(path: Path) -> str:
    return checkpoint._sha256(path)
