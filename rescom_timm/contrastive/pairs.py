"""Which embeddings are compared with which: the pairs of a contrastive loss, and hard pair mining.

Shapes: N queries, M pairs of each query, D the width of an embedding, S slots of a queue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rescom_timm.contrastive.queue import Queue
from rescom_timm.errors import InputError


class Pairs(NamedTuple):
    """N queries against M keys each. A pair that is not valid counts nowhere.

    similarity: (N, M) dot products of unit vectors. positive: (N, M) bool, same class. valid: (N, M) bool.
    """

    similarity: Tensor
    positive: Tensor
    valid: Tensor

    def join(self, other: Pairs) -> Pairs:
        """The pairs of both, query by query: (N, M + M')."""
        return Pairs(*(torch.cat(both, dim=1) for both in zip(self, other, strict=True)))

    def hardest(self, positives: int | None, negatives: int | None) -> Pairs:
        """Hard pair mining (paper eq. 5).

        Of each query's valid pairs, keeps the `positives` least similar positive ones and the `negatives` most similar
        negative ones: (N, positives + negatives). None keeps every pair of that kind, so that (None, None) returns the
        pairs as they are (eq. 3). If a query has fewer such pairs, the rest of its row is not valid. Raises InputError
        for a number below 0 or above M.
        """
        if positives is None and negatives is None:
            return self
        return self._mine(True, positives).join(self._mine(False, negatives))

    def _mine(self, positive: bool, number: int | None) -> Pairs:
        kind = self.positive if positive else ~self.positive
        eligible = kind & self.valid
        if number is None:
            return Pairs(self.similarity, self.positive, eligible)
        if not 0 <= number <= self.similarity.shape[1]:
            raise InputError("queue.mined", f"cannot mine {number} of {self.similarity.shape[1]} pairs: mine fewer")
        # A pair that may not be chosen is given the rank of the easiest, so that it is chosen last.
        easiest = float("inf") if positive else float("-inf")
        rank = self.similarity.detach().masked_fill(~eligible, easiest)
        chosen = rank.topk(number, dim=1, largest=not positive, sorted=False).indices
        return Pairs(self.similarity.gather(1, chosen), torch.full_like(chosen, positive, dtype=torch.bool),
                     eligible.gather(1, chosen))  # fmt: skip


def in_batch(
    queries: Tensor, labels: Tensor, keys: Tensor | None = None, key_labels: Tensor | None = None, first: int = 0
) -> Pairs:
    """Pair every view of the batch with every other one; a view is never a pair of itself.

    queries: (N, D) unit vectors. labels: (N,). keys: (M, D), the queries themselves by default; key_labels: (M,).
    first: where the queries stand among the keys (query i is key `first + i`), for keys gathered from all processes.
    Gradients flow through both sides.
    """
    keys = queries if keys is None else keys
    key_labels = labels if key_labels is None else key_labels
    own = torch.arange(first, first + len(queries), device=queries.device)
    valid = torch.arange(len(keys), device=queries.device) != own[:, None]
    return Pairs(queries @ keys.T, labels[:, None] == key_labels, valid)


def against_queue(queries: Tensor, labels: Tensor, queue: Queue) -> Pairs:
    """Pair every query with every slot of the queue; an empty slot is not a valid pair.

    queries: (N, D) unit vectors. labels: (N,). Returns (N, S) pairs. The keys are a copy, so the queue may be
    written before the backward pass.
    """
    keys = queue.keys.to(queries.dtype, copy=True)
    return Pairs(queries @ keys.T, labels[:, None] == queue.labels, queue.valid.expand(len(queries), -1))
