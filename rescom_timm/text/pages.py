"""HTML and Markdown from the templates beside this file.

What a template is given is text and is escaped for its kind; what is markup already comes as Markup.
"""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rescom_timm.text import counted, escape_controls

_PUNCTUATION = re.compile(r"([\\`*\[\]#!|~$@:^]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.)")
"""What has a meaning in Markdown, GitHub's and the Hub's, somewhere within a line: _ only at the end of a word."""


def render(template: str, **values: object) -> str:
    """The text of a template, by its file's name."""
    return _environment.get_template(template).render(values)


def markdown(text: object) -> Markup:
    """Text for a line of Markdown, also in a table or a heading: shown as it is, on one line."""
    line = " ".join(str(text).split())
    return Markup(_PUNCTUATION.sub(r"\\\1", str(escape(escape_controls(line)))))


def code(text: object) -> Markup:
    """Text as a code span of a line of Markdown, also in a table."""
    line = _unmarked(escape_controls(" ".join(str(text).split()))).replace("|", "¦")
    ticks = _ticks(line, 1)
    space = " " if "`" in line else ""
    return Markup(f"{ticks}{space}{line}{space}{ticks}")


def code_block(text: object, language: str = "") -> Markup:
    """Lines of text as a block of code in Markdown."""
    lines = _unmarked(escape_controls(str(text).rstrip("\n"), lines=True))
    ticks = _ticks(lines, 3)
    return Markup(f"{ticks}{language}\n{lines}\n{ticks}")


def number(value: float | None) -> str:
    """A number with commas; a dash for None."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _ticks(text: str, least: int) -> str:
    """More of them than stand together anywhere in the text."""
    return "`" * max([least, *(1 + len(run) for run in re.findall("`+", text))])


def _unmarked(text: str) -> str:
    """Without a comment of HTML, by which sections of a card are found."""
    return text.replace("<!--", "<!\\--")


def _shown(value: object) -> object:
    """Every value that a template shows."""
    return value if isinstance(value, Markup) else escape_controls(value, lines=True)


_environment = Environment(
    loader=PackageLoader("rescom_timm.text", "."),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters |= {"md": markdown, "code": code, "code_block": code_block, "number": number, "counted": counted}
