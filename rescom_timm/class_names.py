"""Class names of two things that meet: compared by name, after Unicode normalisation (NFC), never by number alone.

Splits, lists, tables, runs, checkpoints, teachers and files of class features all ask `numbers_in`. Numbers in the
place of names ("0", "1", ... in order) count as no names, unless they are the same set as the other side's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from unicodedata import normalize

from rescom_timm.errors import InputError

log = logging.getLogger(__name__)


def nfc(text: str) -> str:
    """The composed form, in which two spellings of one text are equal."""
    return text if text.isascii() else normalize("NFC", text)


def numbers_in(
    names: Sequence[str] | None,
    theirs: Sequence[str] | None,
    here: str,
    there: str,
    lacking: bool = False,
    ordered: bool = False,
) -> list[int] | None:
    """For each class of `theirs` its number in `names`, reported in one line; None where both are numbered alike, or
    where one side has no names.

    here, there: what has `names` and `theirs`, for messages. lacking: theirs may lack some of `names`. ordered: another
    order is an error too. Raises ValueError, naming the first few of each side, where the names are others.
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
            f"{known}: give both the same class names",
        )
    if unknown or missing:
        only = [f"it lacks {first_names(missing)}"] if missing else []
        only += [f"only it has {first_names(unknown)}"] if unknown else []
        raise InputError(
            "data.classes",
            f"{there} has other classes than {here}: {'; '.join(only)}; {here} has {first_names(names)}: give both the "
            "same class names",
        )
    if len(place) < len(own) or len(found) < len(other):
        twice = next(name for name in (*own, *other) if own.count(name) > 1 or other.count(name) > 1)
        raise InputError(
            "data.classes",
            f"{there} and {here} order their classes differently, and one of them has a name twice: rename {twice!r}",
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
    """For each class of `names` its row in what has the classes `theirs`; None and errors as of `numbers_in`."""
    numbers = numbers_in(names, theirs, here, there)
    return None if numbers is None else sorted(range(len(numbers)), key=numbers.__getitem__)


def distinct(names: Iterable[str]) -> list[str]:
    """The names in their order, without those equal to an earlier one after normalisation."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(nfc(name), name)
    return list(first.values())


def refuse_two_forms(names: Sequence[str], where: str) -> None:
    """Raises ValueError where two classes have one name in two Unicode forms."""
    if len({nfc(name) for name in names}) < len(set(names)):
        forms: dict[str, set[str]] = {}
        for name in names:
            forms.setdefault(nfc(name), set()).add(name)
        both = next(sorted(found) for found in forms.values() if len(found) > 1)
        raise InputError(
            "data.classes",
            f"{where} has two classes of one name, {both[0]!r}, in two Unicode forms ({', '.join(map(ascii, both))}): "
            "merge them, or rename one",
        )


def as_spelled(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """The names, those that `own` has in its spelling."""
    spelled = {nfc(name): name for name in own}
    return [spelled.get(nfc(name), name) for name in names]


def first_names(names: Sequence[str], n: int = 3) -> str:
    """The first few, quoted."""
    return ", ".join(map(repr, names[:n])) + (f" and {len(names) - n} more" if len(names) > n else "")


def other_numbers(names: Sequence[str] | None) -> bool:
    """Whether all names are whole numbers, but not "0", "1", ... in order: labels that are numbers may then be meant as
    names."""
    return bool(names) and all(name.isdecimal() for name in names or ()) and not _numbers(names or ())


def _numbers(names: Sequence[str]) -> bool:
    return all(name == str(k) for k, name in enumerate(names))
