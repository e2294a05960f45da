"""Bounds on the nets that a recipe or an export describes, checked while the net is built, before it takes memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules import module as hooks

from rescom_timm.errors import InputError

MAX_OPTION = 65_536
"""Of a number among a backbone's options: widths, depths, sides."""
MAX_VALUES = 1000
"""Numbers and texts in all options together, and characters of a text."""
MAX_MODULES = 5000
"""Of one backbone."""
MAX_NUMBERS = 2**35
"""Weights and buffers of a net whose files are not known; the largest of timm has 2**33."""
SLACK = 2**26
"""Numbers of buffers that files do not hold, such as relative positions and attention masks."""


def check_values(options: Mapping[str, object], where: str) -> None:
    """Raises InputError, naming them, for options with numbers, texts or lists that no net has. where: their source."""
    waiting, count = [(str(name), value) for name, value in options.items()], 0
    while waiting:
        name, value = waiting.pop()
        count += 1
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, inner) for inner in value]
        elif (isinstance(value, int | float) and not abs(value) <= MAX_OPTION) or len(str(value)) > MAX_VALUES:
            raise InputError("net.options", f"{where}: {name}={str(value)[:50]} must be at most {MAX_OPTION:,}")
        if count + len(waiting) > MAX_VALUES:
            raise InputError("net.options", f"{where}: {name} must have at most {MAX_VALUES:,} values")


@dataclass
class _Budget:
    numbers: int
    modules: int
    meta: bool


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def budget(numbers: int = MAX_NUMBERS, modules: int = 10 * MAX_MODULES, meta: bool = False) -> Iterator[None]:
    """Limit the weights and buffers, and modules, that are built within the block.

    Raises InputError at the first one too many, before it takes memory. meta: build on the meta device, without memory;
    a large tensor on another device raises InputError.
    """
    token = _budget.set(_Budget(numbers, modules, meta))
    handles = [
        hooks.register_module_module_registration_hook(_module),
        hooks.register_module_parameter_registration_hook(_tensor),
        hooks.register_module_buffer_registration_hook(_tensor),
    ]
    try:
        if meta:
            with torch.device("meta"):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()
        _budget.reset(token)


def spend(numbers: int = 0, modules: int = 0) -> None:
    """Count what is built without being registered, such as copies. Raises InputError beyond the budget, if any."""
    if (left := _budget.get()) is None:
        return
    left.numbers -= numbers
    left.modules -= modules
    if left.modules < 0:
        raise InputError("net.size", "it describes a net of too many modules")
    if left.numbers < 0:
        raise InputError("net.size", "it describes a net of more weights than its files can hold")


def spend_copy(module: nn.Module) -> None:
    """`spend` for a copy of a module. Raises InputError beyond the budget, if any."""
    spend(sum(weight.numel() for weight in module.parameters()), sum(1 for _ in module.modules()))


def _module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    spend(modules=1)


def _tensor(parent: nn.Module, name: str, value: torch.Tensor | None) -> None:
    left = _budget.get()
    if value is None or left is None:
        return
    if left.meta and value.device.type != "meta" and value.numel() > 2**16:
        raise InputError("net.options", "the options build the net on another device than meta")
    spend(value.numel())
