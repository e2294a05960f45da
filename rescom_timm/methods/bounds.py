"""Bounds of settings."""

from __future__ import annotations

from collections.abc import Callable

from rescom_timm.errors import InputError

Bound = tuple[Callable[[float], bool], str]

POSITIVE: Bound = (lambda value: value > 0, "above 0")
NOT_NEGATIVE: Bound = (lambda value: value >= 0, "at least 0")
AT_LEAST_ONE: Bound = (lambda value: value >= 1, "at least 1")
FOCUS: Bound = (lambda value: value == 0 or value >= 1, "0 or at least 1")  # else infinite gradients at p_y = 1
A_FEW: Bound = (lambda value: 1 <= value <= 1000, "from 1 to 1,000")  # parts of a net: more would fill the memory
SEVERAL: Bound = (lambda value: 2 <= value <= 1000, "from 2 to 1,000")
PART: Bound = (lambda value: 0 <= value <= 1, "in [0, 1]")
SHARE: Bound = (lambda value: 0 < value <= 1, "in (0, 1]")
BELOW_ONE: Bound = (lambda value: 0 <= value < 1, "in [0, 1)")


def check(config: object, code: str = "method.value", **bounds: Bound) -> None:
    """Raises InputError with this code for a setting out of its bounds. None is within all bounds."""
    for name, (holds, text) in bounds.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise InputError(code, f"{name} must be {text}, not {value:g}")
