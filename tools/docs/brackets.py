"""An extension of Griffe for docstrings that show a usage, such as [--seed N] [--quiet].

Markdown would read the second bracket as the target of a link.
"""

import re
from typing import Any

import griffe


class Brackets(griffe.Extension):
    """Escapes a bracket that follows another one, outside of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            usage = re.compile(r"(`.*?`)|\](\s?)\[")
            obj.docstring.value = usage.sub(lambda found: found[1] or f"]{found[2]}\\[", obj.docstring.value)
