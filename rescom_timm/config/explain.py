"""What is wrong with a recipe, one line a key: pydantic's errors in a recipe's terms, and the keys that were meant."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Iterator, KeysView, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

import pydantic

from rescom_timm.config import synonyms
from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.errors import CodedError
from rescom_timm.methods import METHODS


def keys() -> KeysView[str]:
    """Every key of a recipe, dotted: train.epochs, method.queue.per_class, ..."""
    return _hints().keys()


@functools.cache
def _hints() -> dict[str, object]:
    """Every key with its type."""
    return dict(_within(Recipe, ""))


def _within(kind: object, prefix: str) -> Iterator[tuple[str, object]]:
    for name, hint in typing.get_type_hints(kind).items():
        if name.startswith("_") or get_origin(hint) is typing.ClassVar:
            continue
        yield prefix + name, hint
        for inner in _parts(hint):
            if dataclasses.is_dataclass(inner):
                yield from _within(inner, f"{prefix}{name}.")


def _parts(hint: object) -> tuple[object, ...]:
    return get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


@functools.cache
def lists() -> frozenset[str]:
    """The keys that hold a list of any length. A single value is a list of one: track.log_with=wandb."""
    return frozenset(key for key, hint in _hints().items() if get_origin(hint) is tuple and Ellipsis in get_args(hint))


WHOLE = {
    "data": "data.source",
    "net": "net.backbone",
    "hub": "hub.repo",
    "views": "views.train",
    "track": "track.log_with",
}
"""Which key is meant where a section is given as one value."""

_TYPES = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list, such as [a, b]",
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping, such as {key: value}",
}
"""pydantic's names of errors."""


def meant(name: str, value: object = None) -> str:
    """What to write instead of a key or an option of another library; "" where it is none that is known.

    value: as it was given, if it was.
    """
    plain = synonyms.plain(name)
    if plain in synonyms.ELSEWHERE:
        return synonyms.ELSEWHERE[plain]
    key = synonyms.KEYS.get(plain)
    return f"did you mean {suggestion(key, value)}?" if key else ""


def suggestion(key: str, value: object = None) -> str:
    """key=value where the key takes such a value; else the key, with the values that it takes where these are few."""
    if "=" in key or not isinstance(value, str | int | float) or len(str(value)) > 60:
        return key
    hint: Any = _hints().get("init_from" if key == "from" else key)
    if hint is None:  # of net.options
        return f"{key}={value}"
    try:
        tried = [value] if key in lists() else value
        pydantic.TypeAdapter(hint).validate_json(json.dumps(tried), strict=True)
    except (pydantic.ValidationError, ValueError):
        choices = [one for part in _parts(hint) if get_origin(part) is Literal for one in get_args(part)]
        return f"{key}={'|'.join(map(str, choices))}" if choices else key
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def explain(error: pydantic.ValidationError, source: str) -> RecipeError:
    """One RecipeError for pydantic's errors: a line a key; for a key of several types, what each of them must be.

    Its code is that of the first line; a coded error raised by a section keeps its code.
    """
    lines: dict[str, str] = {}
    code = ""
    for problem in error.errors():
        own, line = _line(problem)
        where, must, rest = line.partition(": must be ")
        key = where if must else line
        lines[key] = f"{lines[key].rpartition(', not ')[0]}, or {rest}" if must and key in lines else line
        code = code or own
    return RecipeError(code, f"{source}: " + "\n  ".join(lines.values()))


def _line(problem: Mapping[str, Any]) -> tuple[str, str]:
    """Code and line of one of pydantic's errors, by its location, type, message and input."""
    # A tagged union puts its tag into the location: method.rescom.beta. So does a union of types: speed.compile.bool.
    loc = [part for i, part in enumerate(problem["loc"]) if not (i == 1 and part in METHODS)]
    known = keys()
    while len(loc) > 1 and isinstance(loc[-1], str) and ".".join(map(str, loc[:-1])) in known - _sections():
        loc.pop()
    where, given = ".".join(map(str, loc)), problem["input"]
    if problem["type"] == "unexpected_keyword_argument":
        own = where.removeprefix("method.") if where in known else ""  # of other methods
        if able := [name for name, (config, _) in METHODS.items() if own in inspect.signature(config).parameters]:
            have = f"{', '.join(able)} ha{'ve' if len(able) > 1 else 's'} it"
            return "recipe.unknown_key", f"method {problem['loc'][1]} has no key {where}; {have}"
        return "recipe.unknown_key", f"unknown key {where}; {_instead(where, given, sorted(known))}"
    if problem["type"] == "union_tag_invalid":
        return "recipe.unknown_method", f"{where}.name: {_unknown_method(str(given.get('name')))}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return "recipe.value", f"{where.rpartition('.')[0]}: has too few values: {given!r}"
    if problem["type"].startswith("dataclass"):
        key = f"; did you mean {WHOLE[where]}={given}?" if isinstance(given, str) and where in WHOLE else ""
        return "recipe.value", f"{where}: a section of keys, not {_shown(given)}{key}"
    if problem["type"] == "missing":
        return "recipe.missing_key", f"{where} is missing: every recipe names it"
    message = _TYPES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").replace(
        "Input should be", "must be"
    )
    cause = problem.get("ctx", {}).get("error")
    code = cause.code if isinstance(cause, CodedError) else "recipe.value"
    shown = "" if isinstance(given, dict) else f", not {_shown(given)}"
    return code, f"{where}: {message}{shown}" if where else message


@functools.cache
def _sections() -> frozenset[str]:
    return frozenset(key.rpartition(".")[0] for key in keys()) | {"net.options"}


def _shown(value: object) -> str:
    return "null" if value is None else repr(value)


def _unknown_method(name: str) -> str:
    same = synonyms.METHODS.get(synonyms.plain(name))
    if near := [same] if same else get_close_matches(name, list(METHODS), n=1):
        return f"unknown method {name!r}; did you mean {near[0]}?"
    return f"unknown method {name!r}; there are: {', '.join(METHODS)}"


def _instead(where: str, given: object, known: list[str]) -> str:
    """What to write instead of an unknown key: a key of another library, a near one, or what there is."""
    named: dict[str, list[str]] = {}  # keys by their last part
    for key in known:
        named.setdefault(key.split(".")[-1], []).append(key)
    last, top = where.split(".")[-1], "." not in where
    if (top or last not in named) and (advice := meant(where, given)):
        return advice
    near = (
        named.get(last)
        or get_close_matches(where, known, n=1, cutoff=0.9)  # as good as certain
        or (list(given) if isinstance(given, dict) and len(given) == 1 and (named.get(*given)) else [])
        or get_close_matches(where, known, n=3, cutoff=0.8 if top else 0.75)
        or [key for close in get_close_matches(last, named, n=1, cutoff=0.8) for key in named[close]]
    )
    near = [key for one in near for key in (named[one] if one not in known else [one])]
    if near:
        return f"did you mean {suggestion(near[0], given) if len(near) == 1 else ', '.join(near[:3])}?"
    section = where.rpartition(".")[0]
    inside = [key for key in known if key.rpartition(".")[0] == section] or [key for key in known if "." not in key]
    listed = ", ".join("from" if key == "init_from" else key for key in inside)
    return f"there are: {listed} (all: rescom-timm train RECIPE --print)"
