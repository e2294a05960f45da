"""Escaping untrusted text for the terminal, HTML and Markdown, and the page templates (`pages`).

A class name, a key or a file name may contain escape codes, which a terminal executes, and direction characters, which
reorder the text on screen. They are written as Python escapes: \\x1b, \\u202e.
Not here: which text a command or page shows (cli, analysis, hub, inference).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Characters that change the direction of the text after them, as a range of a regular expression."""
_CONTROL = re.compile(f"[\\x00-\\x1f\\x7f-\\x9f\u2028\u2029{DIRECTION}\ud800-\udfff]")
_CONTROL_IN_LINES = re.compile(_CONTROL.pattern.replace("\\x00-\\x1f", "\\x00-\\x08\\x0b-\\x1f"))
_BAR = re.compile(r"\r?([^\r]*)\r?")


def escape_controls(text: object, lines: bool = False) -> str:
    """The text with control characters, direction characters and lone surrogates escaped. lines: line breaks and tabs
    stay."""
    return (_CONTROL_IN_LINES if lines else _CONTROL).sub(lambda one: ascii(one[0])[1:-1], str(text))


def check_name(name: str, what: str) -> None:
    """Raises ValueError for a name of `what` that we do not write: one with control or direction characters."""
    if found := _CONTROL.search(name):
        raise ValueError(
            f"{what} must not contain control or direction characters, and '{escape_controls(name)}' contains "
            f"{found[0]!a}: rename it"
        )


class EscapedStream:
    """A text stream on which control characters are escaped, whoever writes. Those by which tqdm moves a bar stay."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        writer = str(sys._getframe(1).f_globals.get("__name__"))
        bar = _BAR.fullmatch(text) if writer.startswith("tqdm.") else None
        if bar:
            start, stop = bar.span(1)
            self.stream.write(text[:start] + _escaped(bar[1]) + text[stop:])
        else:
            self.stream.write(escape_controls(text, lines=True))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _escaped(text: str) -> str:
    moves = not text.replace("\x1b[A", "").strip("\n")  # tqdm, between the lines of several bars
    return text if moves else escape_controls(text, lines=True)


def escape_output() -> None:
    """From now on what is printed is escaped, on stdout and stderr, and a warning is one line without the code's."""
    sys.stdout, sys.stderr = (  # type: ignore[assignment]
        stream if stream is None or isinstance(stream, EscapedStream) else EscapedStream(stream)
        for stream in (sys.stdout, sys.stderr)
    )
    warnings.formatwarning = _warning  # type: ignore[assignment]


@contextmanager
def escaped_output() -> Iterator[None]:
    """As escape_output, for the block."""
    before = sys.stdout, sys.stderr, warnings.formatwarning
    escape_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr, warnings.formatwarning = before


def _warning(message: Warning | str, *about: Any, **more: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
