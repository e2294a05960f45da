r"""Escaping untrusted text for the terminal, HTML and Markdown, and the page templates (`pages`).

A class name, a key or a file name may contain escape codes, which a terminal executes, direction characters, which
reorder the text on screen, and zero-width characters, which nobody sees: "cat" with one looks like "cat". They are
written as Python escapes: \x1b, \u202e, \u200b. Joiners and variation selectors stay where they change what one
sees, as in Persian and in emoji.
Not here: which text a command or page shows (cli, analysis, hub, inference).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rescom_timm.errors import InputError

DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Characters that change the direction of the text after them, as a range of a regular expression."""
_HIDDEN = "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u200b\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff"
_JOINS = "\u0600-\u1cff\u2190-\u2bff\ufb50-\ufdff\ufe0f\ufe70-\ufefc\U00011000-\U00011fff\U0001f000-\U0001faff"
"""Arabic, Indic and Mongolian letters, symbols and emoji, between which joiners change what one sees."""
_CONTROL = re.compile(
    f"[\\x00-\\x1f\\x7f-\\x9f\u2028\u2029{DIRECTION}\ud800-\udfff{_HIDDEN}]"
    f"|(?<![{_JOINS}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINS}])"
    # Variation selectors:
    "|(?<![#*0-9\u00a9\u00ae\u0600-\u180a\u1810-\ufdff\ufe10-\U0010ffff])[\u180b-\u180f\ufe00-\ufe0f]"
)
_CONTROL_IN_LINES = re.compile(_CONTROL.pattern.replace("\\x00-\\x1f", "\\x00-\\x08\\x0b-\\x1f"))
_BAR = re.compile(r"\r?([^\r]*)\r?")


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 class, 2,000 classes, 1 image."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s")


def escape_controls(text: object, lines: bool = False) -> str:
    """The text with control, direction and zero-width characters and lone surrogates escaped.

    lines: line breaks and tabs stay.
    """
    return (_CONTROL_IN_LINES if lines else _CONTROL).sub(lambda one: ascii(one[0])[1:-1], str(text))


def check_name(name: str, what: str) -> None:
    """Raises InputError (text.name) for a name with a control, direction or zero-width character."""
    if found := _CONTROL.search(name):
        raise InputError(
            "text.name",
            f"{what} must not contain control, direction or zero-width characters, and '{escape_controls(name)}' "
            f"contains {found[0]!a}: rename it",
        )


class EscapedStream:
    """A text stream that escapes control characters, except those with which tqdm moves a bar."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the escaped text; returns the length of the text."""
        writer = str(sys._getframe(1).f_globals.get("__name__"))
        bar = _BAR.fullmatch(text) if writer.startswith("tqdm.") else None
        if bar:
            start, stop = bar.span(1)
            self.stream.write(text[:start] + _escaped(bar[1]) + text[stop:])
        else:
            self.stream.write(escape_controls(text, lines=True))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the escaped lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _escaped(text: str) -> str:
    moves = not text.replace("\x1b[A", "").strip("\n")  # tqdm, between several bars
    return text if moves else escape_controls(text, lines=True)


def escape_output() -> None:
    """From now on escape what is printed to stdout and stderr, and print a warning as one line without its source."""
    sys.stdout, sys.stderr = (  # type: ignore[assignment]
        stream if stream is None or isinstance(stream, EscapedStream) else EscapedStream(stream)
        for stream in (sys.stdout, sys.stderr)
    )
    warnings.formatwarning = _warning  # type: ignore[assignment]


@contextmanager
def escaped_output() -> Iterator[None]:
    """escape_output during the block."""
    before = sys.stdout, sys.stderr, warnings.formatwarning
    escape_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr, warnings.formatwarning = before


def _warning(message: Warning | str, *about: Any, **more: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
