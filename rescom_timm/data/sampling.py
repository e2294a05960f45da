"""Which images an epoch draws, and in which order."""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from rescom_timm.errors import InputError

Item = tuple[int, int]
SamplerName = Literal["uniform", "class_balanced", "square_root", "progressive", "reversed"]

CHUNK = 2**14
"""Items that are made at a time."""


class InOrder(Sampler[Item]):
    """Every position once, ascending; its seed is the position."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Item]:
        return ((position, position) for position in range(self.number))


class Order(Sampler[Item | tuple[Item, Item]]):
    """The items (position, seed) of an epoch, a pure function of (seed, epoch).

    With a `second` sampler: pairs of an item and one that the second sampler draws. progress: called at the start of
    each epoch with the progress of the run, from 0 in the first epoch to 1 in the last.
    """

    def __init__(
        self,
        labels: np.ndarray,
        sampler: SamplerName,
        seed: int = 0,
        epochs: int | None = None,
        second: SamplerName | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        if "progressive" in (sampler, second) and epochs is None:
            raise InputError("recipe.value", "the progressive sampler needs the number of epochs")
        if not 0 <= seed < 2**63:
            raise InputError("recipe.value", f"seed must be from 0 to 2**63 - 1, not {seed}")
        self.labels = np.asarray(labels)
        self.sampler: SamplerName = sampler
        self.second = second
        self.seed = seed
        self.epochs = epochs
        self.progress = progress
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Item | tuple[Item, Item]]:
        if self.progress is not None:
            self.progress(run_progress(self.epoch, self.epochs))
        if self.second is None:
            yield from self._items(self.sampler, stream=0)
        else:
            yield from zip(self._items(self.sampler, stream=0), self._items(self.second, stream=2), strict=True)

    def positions(self) -> np.ndarray:
        """The positions (N,) int64 of this epoch, in order."""
        return self._positions(self.sampler, stream=0)

    def _items(self, sampler: SamplerName, stream: int) -> Iterator[Item]:
        seeds = _random_bits(len(self), self.seed, self.epoch, stream + 1) >> np.uint64(1)  # torch takes 63 bits
        positions = self._positions(sampler, stream)
        for start in range(0, len(self), CHUNK):  # Python's numbers take eight times the memory, for the whole epoch
            part = slice(start, start + CHUNK)
            yield from zip(positions[part].tolist(), seeds[part].tolist(), strict=True)

    def _positions(self, sampler: SamplerName, stream: int) -> np.ndarray:
        bits = _random_bits(len(self), self.seed, self.epoch, stream)
        if sampler == "uniform":
            return np.argsort(bits, kind="stable")
        counts = np.bincount(self.labels)
        share = class_probabilities(counts, sampler, self.epoch, self.epochs) / np.maximum(counts, 1)
        ends = np.cumsum(share[self.labels])
        uniform = (bits >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(ends, uniform * ends[-1], side="right")


def run_progress(epoch: int, epochs: int | None) -> float:
    """Progress t / T of an epoch, from 0 in the first to 1 in the last."""
    return min(epoch / max((epochs or 1) - 1, 1), 1.0)


def class_probabilities(
    counts: np.ndarray, sampler: SamplerName, epoch: int = 0, epochs: int | None = None
) -> np.ndarray:
    """Probability (K,) that a draw comes from each class: p_k ~ N_k^q (Kang et al. 2020, arXiv 1910.09217, eq. 1).

    uniform: q = 1. square_root: q = 1/2. class_balanced: q = 0. progressive mixes q = 1 and q = 0 by 1 - t/T and t/T
    (eq. 2), t/T from 0 in the first epoch to 1 in the last. reversed: q = -1 (Zhou et al. 2020, arXiv 1912.02413, eq.
    4). Classes without images get 0.
    """
    if sampler == "progressive":
        t = run_progress(epoch, epochs)
        return (1 - t) * class_probabilities(counts, "uniform") + t * class_probabilities(counts, "class_balanced")
    power = {"uniform": 1.0, "square_root": 0.5, "class_balanced": 0.0, "reversed": -1.0}[sampler]
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** power, 0.0)
    return weights / weights.sum()


def _random_bits(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """uint64 (size,) from Philox, a counter-based generator whose raw stream NumPy promises never to change."""
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return philox.random_raw(size)
