"""Tokens, passwords and home folders, which no shared file may hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token

NAMES = ("TOKEN", "API_KEY", "SECRET", "SECRET_KEY", "ACCESS_KEY", "PASSWORD")
"""How variables of the environment end whose values are secrets."""
SHORTEST = 8
"""Characters of a value that is taken for one."""
PATTERNS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{20,}",
    "a password in an address": r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
}
HIDDEN = "***"


def _values() -> Iterator[tuple[str, str]]:
    """(what it is, the secret) of each secret that this process knows."""
    for name, value in os.environ.items():
        if name.upper().endswith(NAMES):
            yield f"the value of {name}", value.strip()
    yield "your token of the Hub", get_token() or ""


def secret_in(text: str) -> str | None:
    """What kind of secret a text holds; None where it holds none."""
    for kind, value in _values():
        if len(value) >= SHORTEST and value in text:
            return kind
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, text)), None)


def without_secrets(text: str) -> str:
    """The text with *** for every secret."""
    for _, value in _values():
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern in PATTERNS.values():
        text = re.sub(pattern, HIDDEN, text)
    return text


def without_home(text: str) -> str:
    """The text with paths below the home folder as ~/..., which can be read back and names no user."""
    return re.sub(rf"(?<![\w./-]){re.escape(str(Path.home()))}/", "~/", text)
