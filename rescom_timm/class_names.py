"""Class names of two data sets, runs or checkpoints, matched by name after Unicode normalisation (NFC).

Splits, lists, tables, runs, checkpoints, teachers and files of class features all ask `numbers_in`. Names that are only
the numbers 0, 1, ... in order count as no names, unless the other side has the same set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from unicodedata import normalize

from rescom_timm.errors import InputError

log = logging.getLogger(__name__)


def nfc(text: str) -> str:
    """The composed Unicode form, in which two spellings of one text are equal."""
    return text if text.isascii() else normalize("NFC", text)


def numbers_in(
    names: Sequence[str] | None,
    theirs: Sequence[str] | None,
    here: str,
    there: str,
    lacking: bool = False,
    ordered: bool = False,
) -> list[int] | None:
    """The number in `names` of each class of `theirs`; None if both are numbered alike or one side has no names.

    A different order is logged as a warning. here, there: what has `names` and `theirs`, for messages. lacking:
    `theirs` may be a part of `names`. ordered: a different order is an error. Raises InputError (data.classes), naming
    the first few of each side, if the names differ.
    """
    if not names or not theirs:
        return None
    own, other = [nfc(name) for name in names], [nfc(name) for name in theirs]
    if other == (own[: len(other)] if lacking else own):
        return None
    place, found = {name: k for k, name in enumerate(own)}, set(other)
    unknown = [name for name in theirs if nfc(name) not in place]
    missing = [] if lacking else [name for name in names if nfc(name) not in found]
    if found.isdisjoint(place) and (_numbers(own) or _numbers(other)):
        return None
    if lacking and unknown:
        known = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise InputError(
            "data.classes",
            f"{there} has classes that {here} lacks: {', '.join(unknown[:5])}{' ...' * (len(unknown) > 5)}; {here} has "
            f"{known}: use the same class names in both",
        )
    if unknown or missing:
        only = [f"it lacks {first_names(missing)}"] if missing else []
        only += [f"only it has {first_names(unknown)}"] if unknown else []
        raise InputError(
            "data.classes",
            f"{there} has other classes than {here}: {'; '.join(only)}; {here} has {first_names(names)}: use the "
            "same names",
        )
    if len(place) < len(own) or len(found) < len(other):
        twice = next(name for name in (*own, *other) if own.count(name) > 1 or other.count(name) > 1)
        raise InputError(
            "data.classes",
            f"{there} and {here} order their classes differently, and {twice!r} is the name of two: rename one",
        )
    if ordered:
        k = next(k for k, (one, two) in enumerate(zip(own, other, strict=False)) if one != two)
        raise InputError(
            "data.classes",
            f"{there} was trained on the classes of {here}, but on these in another order: its class {theirs[k]!r} is "
            f"{names[k]!r} here",
        )
    log.warning("%s has the classes of %s in another order: they are matched by class name", there, here)
    return [place[name] for name in other]


def rows_of(names: Sequence[str] | None, theirs: Sequence[str] | None, here: str, there: str) -> list[int] | None:
    """The position in `theirs` of each class of `names`; None and errors as in `numbers_in`."""
    numbers = numbers_in(names, theirs, here, there)
    return None if numbers is None else sorted(range(len(numbers)), key=numbers.__getitem__)


def numbers_of(names: Iterable[str], class_names: Sequence[str], code: str) -> list[int]:
    """The class of each name. Raises InputError (`code`) for unknown names, with near ones, or double ones."""
    known = {nfc(name): k for k, name in enumerate(class_names)}
    stripped = {name.strip(): k for name, k in known.items()}
    found: dict[int, str] = {}
    for name in names:
        k = known.get(nfc(name), stripped.get(nfc(name).strip()))
        if k is None:
            near = get_close_matches(name, class_names, n=3)
            hint = f"did you mean {first_names(near)}?" if near else f"there are {first_names(class_names)}"
            raise InputError(code, f"there is no class {name!r}; {hint}")
        if k in found:
            raise InputError(code, f"class {class_names[k]!r} is given twice")
        found[k] = name
    return list(found)


def distinct(names: Iterable[str]) -> list[str]:
    """The names in their order, without those equal to an earlier one after normalisation."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(nfc(name), name)
    return list(first.values())


def refuse_two_forms(names: Sequence[str], where: str) -> None:
    """Raise InputError (data.classes) if two classes have one name in two Unicode forms."""
    if len({nfc(name) for name in names}) < len(set(names)):
        forms: dict[str, set[str]] = {}
        for name in names:
            forms.setdefault(nfc(name), set()).add(name)
        both = next(sorted(found) for found in forms.values() if len(found) > 1)
        raise InputError(
            "data.classes",
            f"{where} has class {both[0]!r} in two Unicode forms ({', '.join(map(ascii, both))}): merge or rename them",
        )


def as_spelled(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """The names, spelled as in `own` if they are there in another Unicode form."""
    spelled = {nfc(name): name for name in own}
    return [spelled.get(nfc(name), name) for name in names]


def first_names(names: Sequence[str], n: int = 3) -> str:
    """The first n names, quoted, and how many more there are."""
    return ", ".join(map(repr, names[:n])) + (f" and {len(names) - n} more" if len(names) > n else "")


def other_numbers(names: Sequence[str] | None) -> bool:
    """Whether all names are whole numbers other than 0, 1, ... in order.

    Labels that are numbers may then mean names.
    """
    return bool(names) and all(name.isdecimal() for name in names or ()) and not _numbers(names or ())


def _numbers(names: Sequence[str]) -> bool:
    return all(name == str(k) for k, name in enumerate(names))
