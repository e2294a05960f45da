"""Which rows of a split are kept: long-tailed profiles and hold-outs."""

import difflib
import re
from collections.abc import Callable, Iterable

import numpy as np

from rescom_timm.errors import InputError
from rescom_timm.text import counted


def exponential(
    labels: np.ndarray, num_classes: int, imbalance: float, seed: int = 0, by_count: bool = False
) -> np.ndarray:
    """The literature's long-tailed draw (Cui et al. 2019, Cao et al. 2019): class k keeps n_max * IF^(-k / (K-1)) rows.

    labels: (N,) of the whole split. imbalance: IF, largest over smallest class. n_max: size of the largest class; a
    class with fewer rows than its profile keeps all. by_count: k is the class's rank by count, largest first, instead
    of its number; ties keep their order. Returns the kept rows, ascending, (M,) int64. One random stream,
    RandomState(seed), shuffles the classes one after another, so draws of different IF are nested, and those of CIFAR
    with seed 0 are the literature's. Raises InputError: data.rule for fewer than 2 classes or IF < 1, data.empty_class
    for a class without a row.
    """
    counts = _counts(labels, num_classes, imbalance)
    places = np.argsort(np.argsort(-counts, kind="stable")).tolist() if by_count else range(num_classes)
    sizes = [int(counts.max() * (1 / imbalance) ** (k / (num_classes - 1))) for k in places]
    return _draw(labels, sizes, imbalance, seed)


def step(labels: np.ndarray, num_classes: int, imbalance: float, seed: int = 0) -> np.ndarray:
    """The step profile (Cao et al. 2019): the first half of the classes keep n_max rows, the others n_max / IF.

    Arguments, result and errors as in `exponential`.
    """
    counts = _counts(labels, num_classes, imbalance)
    head = num_classes // 2
    sizes = [int(counts.max() * (1.0 if k < head else 1 / imbalance)) for k in range(num_classes)]
    return _draw(labels, sizes, imbalance, seed)


RULES = {"exponential": exponential, "step": step}


def draw(rule: str, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows that a rule such as "exponential(100)", "step(50)" or "exponential(100, seed=1)" keeps."""
    name, factor, seed = parse_rule(rule)
    return RULES[name](labels, num_classes, factor, seed)


def parse_rule(rule: str) -> tuple[str, float, int]:
    """Name, imbalance and seed of a rule. Raises InputError (data.rule)."""
    name, argument = parse_call(rule, RULES) or ("", "")
    match = re.fullmatch(r"([\d.eE+]+)(?:,\s*(?:seed\s*=\s*)?(\d+))?", argument.strip())
    try:
        factor, seed = float(match[1]), int(match[2] or 0)  # type: ignore[index]
    except (TypeError, ValueError):
        raise InputError("data.rule", f"{rule!r} is no long-tail rule: write exponential(100) or step(100)") from None
    if not 1 <= factor < float("inf"):
        raise InputError("data.rule", f"{rule!r}: the imbalance (largest over smallest class) must be at least 1")
    return name, factor, seed


def parse_call(text: str, names: Iterable[str]) -> tuple[str, str] | None:
    """("holdout", "0.1") of "holdout(0.1)"; None if the text has no such form.

    Raises InputError (data.rule), with the nearest name, if the name is not one of `names`.
    """
    match = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", text)
    if not match:
        return None
    names = list(names)
    if match[1] not in names:
        near = difflib.get_close_matches(match[1], names, 1)
        hint = f"did you mean {near[0]}({match[2]})?" if near else f"there are {', '.join(n + '(...)' for n in names)}"
        raise InputError("data.rule", f"there is no rule {text!r}: {hint}")
    return match[1], match[2].strip()


def _counts(labels: np.ndarray, num_classes: int, imbalance: float) -> np.ndarray:
    if num_classes < 2:
        raise InputError("data.rule", "a long-tail profile needs at least two classes")
    if not imbalance >= 1:
        raise InputError(
            "data.rule", f"the imbalance (largest over smallest class) must be at least 1, not {imbalance}"
        )
    return np.bincount(labels, minlength=num_classes)


def _draw(labels: np.ndarray, sizes: list[int], imbalance: float, seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    kept = []
    for k, size in enumerate(sizes):
        rows = np.flatnonzero(labels == k).astype(np.int64)
        if size < 1 or not rows.size:
            reason = "it has none to draw from" if not rows.size else f"{max(sizes)} rows at most, over {imbalance:g}"
            raise InputError(
                "data.empty_class", f"an imbalance of {imbalance:g} leaves class {k} without a row ({reason})"
            )
        random.shuffle(rows)
        kept.append(rows[:size])
    return np.sort(np.concatenate(kept))


def holdout(
    labels: np.ndarray, fraction: float, seed: int = 0, groups: np.ndarray | None = None, least: int = 0
) -> np.ndarray:
    """Positions to hold out, ascending: of each class its fraction, rounded, but never its last row.

    labels: (N,) of the training rows; 0 < fraction < 1. Drawn with RandomState(seed), classes in ascending order.
    least: rows of every class that has five or more.
    groups: (N,) int64; whole groups are held out, as near to the fraction of each class as they allow, never all that
    have a class. Raises InputError (data.empty_class) if nothing would be held out.
    """
    if groups is not None:
        return _hold_groups(labels, fraction, seed, groups)

    def size(n: int) -> int:
        return min(max(int(fraction * n + 0.5), least if n >= 5 else 0), n - 1)

    return _per_class(labels, size, seed, f"holdout({fraction:g})")


def _hold_groups(labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray) -> np.ndarray:
    """Groups in random order, each held out if the classes' numbers get nearer to their fractions.

    Every class keeps a row.
    """
    classes = int(labels.max()) + 1
    kinds, code = np.unique(groups, return_inverse=True)
    table = np.zeros((len(kinds), classes), dtype=np.int64)
    np.add.at(table, (code, labels), 1)
    wanted, left = fraction * table.sum(axis=0), table.sum(axis=0)
    held, chosen = np.zeros(classes), []
    for group in np.random.RandomState(seed).permutation(len(kinds)):
        row = table[group]
        nearer = np.abs(held + row - wanted).sum() < np.abs(held - wanted).sum()
        if nearer and (left - row)[row > 0].min() > 0:
            held, left = held + row, left - row
            chosen.append(group)
    if not chosen:
        raise InputError(
            "data.empty_class",
            f"holdout({fraction:g}) by group takes no row: each group has too much of a class; use a larger fraction",
        )
    return np.flatnonzero(np.isin(code, chosen)).astype(np.int64)


def at_most(labels: np.ndarray, number: int, seed: int = 0) -> np.ndarray:
    """Positions of at most `number` rows of each class, ascending. Drawn as in `holdout`."""
    return _per_class(labels, lambda n: min(number, n), seed, f"{counted(number, 'row')} a class")


def _per_class(labels: np.ndarray, size: Callable[[int], int], seed: int, rule: str) -> np.ndarray:
    random = np.random.RandomState(seed)
    order = np.argsort(labels, kind="stable")
    by_class = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    chosen = np.sort(np.concatenate([random.permutation(rows)[: size(len(rows))] for rows in by_class]))
    if not chosen.size:
        raise InputError("data.empty_class", f"{rule} takes no row: the classes are too small; use a larger fraction")
    return chosen.astype(np.int64)
