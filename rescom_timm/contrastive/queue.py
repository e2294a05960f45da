"""Queues of past embeddings (keys), each slot with its class: class-balanced (paper eq. 3), FIFO and reversed (Fig. 3).

Shapes: S slots, R rings, K classes, Q slots of each class, D the width of an embedding, B keys that enter.
A queue is state, not weights: keep it outside the module that DistributedDataParallel wraps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """S slots cut into rings; a key enters the ring of its class, over that ring's oldest key.

    keys: (S, D). labels: (S,) class of each slot. valid: (S,) bool, False until the slot is first filled.
    holding: while True, keys wait and enter with the first that come after, for the passes of one optimizer step.
    """

    keys: Tensor
    labels: Tensor
    valid: Tensor
    pointer: Tensor
    ring_size: Tensor
    ring_start: Tensor

    def __init__(self, ring_size: Tensor, dim: int) -> None:
        """ring_size: (R,) slots of each ring, each at least 1. dim: D. Raises ValueError for sizes below 1."""
        super().__init__()
        if dim < 1 or ring_size.numel() == 0 or int(ring_size.min()) < 1:
            raise ValueError("a queue needs at least one slot in every ring and a width of at least 1")
        slots = int(ring_size.sum())
        self.register_buffer("keys", torch.zeros(slots, dim))
        self.register_buffer("labels", torch.zeros(slots, dtype=torch.long))
        self.register_buffer("valid", torch.zeros(slots, dtype=torch.bool))
        self.register_buffer("pointer", torch.zeros(len(ring_size), dtype=torch.long))
        self.register_buffer("ring_size", ring_size.long())
        self.register_buffer("ring_start", ring_size.cumsum(0).long() - ring_size.long(), persistent=False)
        self.holding = False
        self._held: list[tuple[Tensor, Tensor]] = []

    def ring(self, labels: Tensor) -> Tensor:
        """The ring of each class: (B,) -> (B,)."""
        return labels

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor) -> None:
        """Let keys enter, detached and in their order; where a batch brings more than a ring holds, the last stay.

        keys: (B, D). labels: (B,) int64. Takes place after the step's similarities are taken (METHOD: "the keys
        of a step are never its own pairs"). No host synchronisation. Raises ValueError for wrong shapes.
        """
        if keys.ndim != 2 or keys.shape[1] != self.keys.shape[1] or labels.shape != keys.shape[:1]:
            raise ValueError(
                f"keys {tuple(keys.shape)} and labels {tuple(labels.shape)} do not fit a queue of width "
                f"{self.keys.shape[1]}: give keys (B, {self.keys.shape[1]}) and labels (B,)"
            )
        if self.holding:
            self._held.append((keys.detach(), labels))
            return
        if self._held:
            keys, labels = (torch.cat(parts) for parts in zip(*self._held, (keys, labels), strict=True))
            self._held.clear()
        order = self.ring(labels).argsort(stable=True)
        ring = self.ring(labels)[order]
        start = torch.searchsorted(ring, ring)
        count = torch.searchsorted(ring, ring, right=True) - start
        size = self.ring_size[ring]
        turn = torch.arange(len(ring), device=ring.device) - start
        slot = self.ring_start[ring] + (self.pointer[ring] + turn) % size
        # Keys that meet in one slot all write the last of them, so that the result does not depend on the order of
        # writing and no key has to be dropped (which would need the host to know how many are left).
        winner = order[start + turn + (count - 1 - turn) // size * size]
        self.keys[slot] = keys[winner].to(self.keys.dtype)
        self.labels[slot] = labels[winner]
        self.valid.index_fill_(0, slot, True)  # by index, the host would send a True and wait for it
        self.pointer[ring] = (self.pointer[ring] + count) % size

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in (("keys", self.keys), ("pointer", self.pointer)):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape:
                raise ValueError(
                    f"the saved queue has {name} {tuple(saved.shape)}, this one {tuple(own.shape)}: "
                    "build it with the same classes, size and width, or start with an empty queue"
                )
        rings = state_dict.get(prefix + "ring_size")
        if rings is not None and not torch.equal(rings.to(self.ring_size.device), self.ring_size):
            raise ValueError(
                "the saved queue has rings of other sizes: it was built from other classes' counts; "
                "build it with the same counts, or start with an empty queue"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def cosines(self) -> tuple[Tensor, Tensor]:
        """Mean cosine of two different keys of one class, and of two keys of different classes: scalars, NaN without
        such keys. Keys that are one point have 1 and 1; where classes are apart, the second is lower."""
        keys, labels = self.keys[self.valid].double(), self.labels[self.valid]
        sums = keys.new_zeros(int(self.labels.max()) + 1, keys.shape[1]).index_add_(0, labels, keys)
        numbers = torch.bincount(labels, minlength=len(sums)).double()
        of_classes, squares = (sums**2).sum(), (numbers**2).sum()
        within = (of_classes - (keys**2).sum()) / (squares - numbers.sum())
        between = ((keys.sum(dim=0) ** 2).sum() - of_classes) / (numbers.sum() ** 2 - squares)
        return within, between


class ClassBalancedQueue(Queue):
    """One ring of Q keys for each class (paper eq. 3). Slots are class-major: `keys.view(K, Q, D)`."""

    def __init__(self, num_classes: int, per_class: int, dim: int) -> None:
        super().__init__(torch.full((num_classes,), per_class), dim)
        self.labels.copy_(torch.arange(num_classes).repeat_interleave(per_class))


class ReversedQueue(Queue):
    """About `size` slots, shared out so that the k-th most frequent class has the share of the k-th rarest (Fig. 3):
    more slots for rarer classes, at least one for each."""

    def __init__(self, counts: Tensor, size: int, dim: int) -> None:
        """counts: (K,) training images of each class."""
        if size < len(counts):
            raise ValueError(f"a reversed queue of {size} slots cannot hold {len(counts)} classes: raise its size")
        order = counts.argsort(stable=True)
        reversed_counts = torch.empty_like(counts)
        reversed_counts[order] = counts[order.flip(0)]
        share = reversed_counts.double() * size / reversed_counts.sum()
        ring_size = share.round().long().clamp(min=1)
        super().__init__(ring_size, dim)
        self.labels.copy_(torch.arange(len(counts)).repeat_interleave(ring_size))


class FifoQueue(Queue):
    """One ring of the most recent keys, whatever their class: long-tailed like the data (Fig. 3)."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__(torch.tensor([size]), dim)

    def ring(self, labels: Tensor) -> Tensor:
        return torch.zeros_like(labels)
