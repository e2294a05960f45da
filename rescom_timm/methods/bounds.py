"""Bounds of a method's settings, told by name and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Bound = tuple[Callable[[float], bool], str]

POSITIVE: Bound = (lambda value: value > 0, "above 0")
NOT_NEGATIVE: Bound = (lambda value: value >= 0, "at least 0")
AT_LEAST_ONE: Bound = (lambda value: value >= 1, "at least 1")
A_FEW: Bound = (lambda value: 1 <= value <= 1000, "from 1 to 1,000")  # parts of a net: more would fill the memory
PART: Bound = (lambda value: 0 <= value <= 1, "in [0, 1]")
BELOW_ONE: Bound = (lambda value: 0 <= value < 1, "in [0, 1)")


def check(config: Any, **bounds: Bound) -> None:
    """Raises ValueError for a setting out of its bounds. None, where a setting may be that, is within all."""
    for name, (holds, words) in bounds.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {words}, not {value:g}")
