"""The Hub from below: which names are its ids and which are paths, and how long it is waited for.

`hub_id` decides for every source that may be either. `online` surrounds everything that asks the Hub, by whatever
library (huggingface_hub, datasets, timm, transformers): without a network it takes at most PATIENCE seconds.
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

from rescom_timm.errors import MissingFileError

PREFIXES = ("hf://datasets/", "hf://", "hf-hub:", "hf_hub:")
"""What forces the Hub, where a folder of that name is here too."""
PATIENCE = 5.0
"""Seconds until the Hub has answered or counts as unreachable."""
REMEMBERED = 60.0
"""Seconds for which that is not asked again."""
RETRIES = {"max_retries": 1, "max_wait_time": 2.0, "retry_on_status_codes": (500, 502, 503, 504)}
"""Of huggingface_hub, instead of 5 retries that wait 23 seconds in all, and of as long as a 429 asks for."""


class Unreachable(ConnectionError):
    """The Hub did not answer, and this machine's cache does not hold what was asked for."""


def hub_id(source: object, alone: bool = False, plain: bool = True) -> str | None:
    """owner/name (perhaps @revision) where a source is an id of the Hub; None where it is a path.

    hf://owner/name (also hf://datasets/owner/name and hf-hub:owner/name) is always of the Hub. Plain owner/name is,
    unless that path exists here, or the folder `owner` does: then it is a path, perhaps of something that is missing.
    Everything else (a Path, an absolute path, one that begins with . or ~, one of Windows) is a path. alone: a name
    without an owner is an id too, as of old data sets ("mnist"). plain: false where owner/name without a prefix is
    always a path, such as runs/first. Raises ValueError for hf:// before something else.
    """
    if not isinstance(source, str):
        return None
    prefix = next((prefix for prefix in PREFIXES if source.startswith(prefix)), "")
    name = source.removeprefix(prefix)
    form = r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?" if alone else r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?"
    if not re.fullmatch(form, name) or re.search(r"--|\.\.", name.partition("@")[0]):  # which the Hub refuses
        if prefix:
            raise ValueError(f"{source!r} is no id of the Hub: write {prefix}owner/name, perhaps with @revision")
        return None
    if prefix or not plain:
        return name if prefix else None
    owner = name.partition("/")[0]
    return None if os.path.lexists(source) or ("/" in name and os.path.isdir(owner)) else name


def target(name: str) -> str:
    """owner/name of a repository to write to, which may be called hf://owner/name; anything else as it is."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def missing(source: str, what: str = "folder", hint: str = "") -> FileNotFoundError:
    """The error for a path that is not there, with what to write where the Hub was meant, or `hint`. what: should be
    there."""
    if hint:
        return MissingFileError("data.missing", f"{source} does not exist{hint}")
    if os.path.exists(source):
        return FileNotFoundError(f"{source} is a file, and a {what} is wanted")
    meant = ", and it is no id of the Hub, such as owner/name"
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        meant = f"; for the Hub write hf://{source}"
    return FileNotFoundError(f"no {what} {source} here (relative paths are relative to the working directory){meant}")


_state: dict[str, Any] = {"asked": -REMEMBERED, "trouble": "", "depth": 0}


@contextmanager
def online() -> Iterator[None]:
    """The block may ask the Hub. Where the Hub does not answer within PATIENCE seconds, the libraries in the block see
    HF_HUB_OFFLINE, and so read their caches at once. Raises Unreachable, in one line, where that is not enough."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE or _state["depth"]:
        yield
        return
    trouble, timeout = _trouble(), socket.getdefaulttimeout()
    settings = [constants, *filter(None, [sys.modules.get("datasets.config")])]  # which has a copy of its own
    before = [place.HF_HUB_OFFLINE for place in settings]
    for place in settings if trouble else ():
        place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    socket.setdefaulttimeout(timeout or 2 * PATIENCE)  # of torch.hub, which has none
    _state["depth"] += 1
    try:
        with _few_retries():
            yield
    except (OSError, HfHubHTTPError) as error:
        if not trouble or (isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError)):
            raise
        raise Unreachable(
            f"{constants.ENDPOINT} cannot be reached ({trouble}), and the cache of this machine does not hold it"
        ) from error
    finally:
        _state["depth"] -= 1
        socket.setdefaulttimeout(timeout)
        for place, value in zip(settings, before, strict=True):
            place.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


@contextmanager
def _few_retries() -> Iterator[None]:
    """huggingface_hub has no setting for it. datasets and timm ask through the same functions."""
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
    """Why the Hub cannot be reached; empty where it answers, whatever it says."""
    if time.monotonic() - _state["asked"] < REMEMBERED:
        return str(_state["trouble"])
    told = [f"no answer in {PATIENCE:g} seconds"]

    def ask() -> None:
        from huggingface_hub import constants, get_session

        try:
            get_session().head(f"{constants.ENDPOINT}/robots.txt", timeout=PATIENCE)
            told[0] = ""
        except Exception as error:  # of whatever client and proxy
            told[0] = " ".join(str(error).split()) or type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)  # a name server may be silent for longer than any timeout
    thread.start()
    thread.join(PATIENCE + 0.5)
    _state.update(asked=time.monotonic(), trouble=told[0])
    return told[0]
