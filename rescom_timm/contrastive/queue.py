"""Queues of past embeddings (keys) with their classes: class-balanced (paper eq. 3), FIFO and reversed (Fig. 3).

Shapes: S slots, R rings, K classes, Q slots of each class, D the width of an embedding, B keys that enter.
A queue is state, not weights: keep it outside the module that DistributedDataParallel wraps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rescom_timm.errors import InputError


class Queue(nn.Module):
    """S slots split into rings; a key replaces the oldest key in the ring of its class.

    keys: (S, D). labels: (S,) class of each slot. valid: (S,) bool, False until the slot is first filled.
    holding: while True, keys wait and enter with the next ones, for the several passes of one optimizer step.
    """

    keys: Tensor
    labels: Tensor
    valid: Tensor
    pointer: Tensor
    ring_size: Tensor
    ring_start: Tensor

    def __init__(self, ring_size: Tensor, dim: int) -> None:
        """ring_size: (R,) slots of each ring, each at least 1. dim: D. Raises InputError for sizes below 1."""
        super().__init__()
        if dim < 1 or ring_size.numel() == 0 or int(ring_size.min()) < 1:
            raise InputError("queue.size", f"a queue needs a slot in every ring and a width of at least 1: {dim}")
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
        """Insert keys, detached, in order; if a batch has more than a ring holds, the last stay.

        keys: (B, D). labels: (B,) int64. Call it after the similarities of the step are taken, so that the keys of a
        step are never its own pairs. No host synchronisation. Raises InputError for wrong shapes.
        """
        if keys.ndim != 2 or keys.shape[1] != self.keys.shape[1] or labels.shape != keys.shape[:1]:
            raise InputError(
                "queue.shape",
                f"queue: keys must be (B, {self.keys.shape[1]}) and labels (B,), not {tuple(keys.shape)} and "
                f"{tuple(labels.shape)}",
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
        for name, own in (("keys", self.keys), ("pointer", self.pointer), ("ring_size", self.ring_size)):
            saved = state_dict.get(prefix + name, own)
            if saved.shape != own.shape or (name == "ring_size" and not torch.equal(saved.to(own.device), own)):
                raise InputError(
                    "queue.saved",
                    f"the saved queue has other {name} ({tuple(saved.shape)}) than this one ({tuple(own.shape)}): "
                    "build it with the same class counts, size and width, or start with an empty queue",
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def cosines(self) -> tuple[Tensor, Tensor]:
        """Mean cosine of two different keys of one class, and of two keys of different classes.

        Scalars, NaN without such keys. Keys that have collapsed to one point have 1 and 1; where classes are separated,
        the second is lower.
        """
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
    """About `size` slots, of which the k-th most frequent class gets the share of the k-th rarest (Fig. 3).

    Every class has at least one.
    """

    def __init__(self, counts: Tensor, size: int, dim: int) -> None:
        """counts: (K,) training images of each class. Raises InputError for fewer slots than classes."""
        if size < len(counts):
            raise InputError(
                "queue.size", f"a reversed queue needs a slot for each of {len(counts)} classes, not {size}"
            )
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
        """One ring for all classes: (B,) zeros."""
        return torch.zeros_like(labels)
