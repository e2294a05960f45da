"""Hub ids and timeouts.

`hub_id` tells an id of the Hub from a path. `online` wraps every request to the Hub, by any library (huggingface_hub,
datasets, timm, transformers): without a network the request fails within PATIENCE seconds.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rescom_timm.errors import InputError, MissingFileError, UnreachableError

PREFIXES = ("hf://datasets/", "hf://", "hf-hub:", "hf_hub:")
"""Prefixes that always mean the Hub, even if a local folder has that name."""
PATIENCE = 5.0
"""Seconds until the Hub has answered or counts as unreachable."""
REMEMBERED = 60.0
"""Seconds for which the answer is kept."""
RETRIES = {"max_retries": 1, "max_wait_time": 2.0, "retry_on_status_codes": (500, 502, 503, 504)}
"""For huggingface_hub, instead of 5 retries that wait 23 seconds in all, or as long as a 429 asks for."""


def hub_id(source: object, alone: bool = False, plain: bool = True) -> str | None:
    """owner/name (perhaps @revision) if `source` is an id of the Hub, None if it is a path.

    hf://owner/name (also hf://datasets/owner/name and hf-hub:owner/name) is always an id. Plain owner/name is an id
    unless that path or the folder `owner` exists. Everything else (a Path, an absolute path, one that begins with . or
    ~, a Windows path) is a path. alone: a name without an owner, such as the old data set "mnist", is an id too. plain:
    if false, owner/name without a prefix, such as runs/first, is always a path. Raises InputError (hub.id) for an
    invalid name after a prefix.
    """
    if not isinstance(source, str):
        return None
    prefix = next((prefix for prefix in PREFIXES if source.startswith(prefix)), "")
    name = source.removeprefix(prefix)
    form = r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?" if alone else r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?"
    if not re.fullmatch(form, name) or re.search(r"--|\.\.", name.partition("@")[0]):  # which the Hub refuses
        if prefix:
            raise InputError(
                "hub.id", f"{source!r} is not a Hub id: write {prefix}owner/name, optionally with @revision"
            )
        return None
    if prefix or not plain:
        return name if prefix else None
    owner = name.partition("/")[0]
    return None if os.path.lexists(source) or ("/" in name and os.path.isdir(owner)) else name


def target(name: str) -> str:
    """The name of a repository without a prefix such as hf://."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def missing(source: str, what: str = "folder", hint: str = "") -> MissingFileError:
    """The error for a path that does not exist, with the form for the Hub or `hint`. what: kind of folder expected."""
    if hint:
        return MissingFileError("data.missing", f"{source} does not exist{hint}")
    if os.path.exists(source):
        return MissingFileError("file.kind", f"{source} is a file: name a {what}")
    meant = ", and it is not a Hub id such as owner/name"
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        meant = f"; for the Hub write hf://{source}"
    message = f"no {what} {source} here (relative paths are relative to the working directory){meant}"
    return MissingFileError("file.missing", message)


_state: dict[str, Any] = {"asked": -REMEMBERED, "trouble": "", "depth": 0}


@contextmanager
def online() -> Iterator[None]:
    """Requests to the Hub in this block are bounded in time.

    If the Hub does not answer within PATIENCE seconds, the libraries in the block see HF_HUB_OFFLINE and read their
    caches at once. Raises UnreachableError (hub.unreachable) if they lack it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE or _state["depth"]:
        yield
        return
    trouble, timeout = _trouble(), socket.getdefaulttimeout()
    settings = [constants, *filter(None, [sys.modules.get("datasets.config")])]  # datasets has its own copy
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings if trouble else ():
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    socket.setdefaulttimeout(timeout or 2 * PATIENCE)  # for torch.hub, which sets none
    _state["depth"] += 1
    try:
        with _few_retries():
            yield
    except (OSError, HfHubHTTPError) as error:
        if not trouble or (isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError)):
            raise
        raise UnreachableError(
            "hub.unreachable",
            f"{constants.ENDPOINT} cannot be reached ({trouble}), and the file is not in the local cache",
        ) from error
    finally:
        _state["depth"] -= 1
        socket.setdefaulttimeout(timeout)
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


@contextmanager
def _few_retries() -> Iterator[None]:
    """Set RETRIES: huggingface_hub has no setting for it, and datasets and timm use its functions."""
    from huggingface_hub.utils import _http

    defaults = [ask.__kwdefaults__ or {} for ask in (_http.http_backoff, _http.http_stream_backoff)]
    before = [dict(one) for one in defaults]
    try:
        for one in defaults:
            one.update(RETRIES)
        yield
    finally:
        for one, values in zip(defaults, before, strict=True):
            one.update(values)


def _trouble() -> str:
    """Why the Hub cannot be reached; empty if it gives any answer."""
    if time.monotonic() - _state["asked"] < REMEMBERED:
        return str(_state["trouble"])
    trouble = [f"no answer in {PATIENCE:g} seconds"]

    def ask() -> None:
        from huggingface_hub import constants, get_session

        try:
            get_session().head(f"{constants.ENDPOINT}/robots.txt", timeout=PATIENCE)
            trouble[0] = ""
        except Exception as error:  # depends on client and proxy
            trouble[0] = " ".join(str(error).split()) or type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)  # a name server may be silent for longer than any timeout
    thread.start()
    thread.join(PATIENCE + 0.5)
    _state.update(asked=time.monotonic(), trouble=trouble[0])
    return trouble[0]
