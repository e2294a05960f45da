"""The random draws of views, read in bulk from torch's generator."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]


class Draws:
    """The draws of N views, read from left to right.

    `words` (N, k): words of torch's generator. `notes` (N, m): the numbers that timm drew.
    """

    def __init__(self, words: np.ndarray, notes: np.ndarray) -> None:
        self.words, self.notes = words, notes
        self._words, self._notes = iter(words.T), iter(notes.T)

    def below(self, n: int) -> np.ndarray:
        """(N,) int64: torch.randint(n, (1,))."""
        return (next(self._words) % np.uint64(n)).astype(np.int64)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(N,) float32: torch.empty(1).uniform_(low, high)."""
        return _between((next(self._words) & np.uint64(0xFFFFFF)) * 2.0**-24, low, high, _fused())

    def note(self) -> np.ndarray:
        """The next number that timm drew, (N,) float64."""
        return next(self._notes)


def _between(u: np.ndarray, low: float, high: float, fused: bool) -> np.ndarray:
    """The float32 low + u (high - low) of u (N,) float64 with 24 bits; fused: rounded once, not after the product."""
    product = u * float(np.float32(high) - np.float32(low))  # exact: 48 bits
    if fused:
        return (product + float(np.float32(low))).astype(np.float32)
    return product.astype(np.float32) + np.float32(low)


@functools.cache
def _fused() -> bool:
    """Whether torch multiplies and adds with one rounding, as it does on CPUs that have such an instruction."""
    generator = torch.Generator().manual_seed(0)
    drawn = [float(torch.empty(1).uniform_(0.6, 1.4, generator=generator)) for _ in range(100)]
    u = (first_words([0], 100)[0] & np.uint64(0xFFFFFF)) * 2.0**-24
    return _between(u, 0.6, 1.4, True).tolist() == drawn


def first_words(seeds: Sequence[int], count: int) -> np.ndarray:
    """The first `count` 32-bit words (len(seeds), count) uint64 of torch's CPU generator after each seed."""
    drawn = torch.empty(len(seeds), -(-count // 2), dtype=torch.int64)
    if count == 0:
        return _split(drawn)
    generator = torch.Generator()
    for row, seed in zip(drawn.unbind(0), seeds, strict=True):
        generator.manual_seed(seed)
        row.random_(-(2**63), None, generator=generator)  # all 64 bits: two words, the first one on top
    return _split(drawn)[:, :count]


def _split(drawn: Tensor) -> np.ndarray:
    pairs = drawn.numpy().view(np.uint64)
    return np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)], axis=-1).reshape(len(pairs), -1)


def next_words(count: int) -> np.ndarray:
    """The next `count` words (count,) uint64 of torch's global generator, which moves on by as many."""
    ahead = torch.Generator()
    ahead.set_state(torch.get_rng_state())
    for _ in range(count):
        torch.rand(1)
    return _split(torch.empty(1, -(-count // 2), dtype=torch.int64).random_(-(2**63), None, generator=ahead))[0, :count]


class BatchedStep:
    """One step over N views, which it may change in place."""

    of: type = object
    """The class of the step in transforms.py."""
    equal = True
    """Whether the pixels are Pillow's, bit for bit."""
    largest = 128 * 128
    """Pixels of an image up to which a CPU gains: with CIFAR's policy a batch of 64 takes a fifth of Pillow's time at
    32 x 32, a third at 64 x 64, four fifths at 128 x 128, the same at 224 x 224."""
    draws = 0
    """Words of torch's generator that a view draws, unless `words` says otherwise."""
    notes = 0
    """Numbers that `note` gives of each view."""

    def __init__(self, step: object) -> None:
        """step: one that `takes` is true of."""

    @classmethod
    def takes(cls, step: object) -> bool:
        """Whether this is the batched form of a step of transforms.py."""
        return type(step) is cls.of

    def size(self, size: Size) -> Size:
        """(H, W) after the step. Raises InputError (image.size) for images that are too small."""
        return size

    def words(self, size: Size) -> int:
        """How many words of torch's generator a view of this size draws."""
        return self.draws

    def note(self) -> list[float]:
        """What a view draws from the generators of NumPy and random."""
        return []

    def __call__(self, views: Tensor, draws: Draws) -> Tensor:
        """Views (N, 3, h, w) of views (N, 3, H, W)."""
        raise NotImplementedError
