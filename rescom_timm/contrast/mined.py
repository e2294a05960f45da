"""Hard pair mining and its loss in one step: the fast form of

    supcon(in_batch(...).join(against_queue(...).hardest(positives, negatives)), temperature, weights)

which stays the definition (`composed`). The loss and its gradient (paper eq. 4, in closed form) are found together in
the forward pass, so that the backward pass needs only d(loss)/d(embedding): the queue is not copied and may be
written at once, and no (N, S) tensor outlives the call.

Shapes: N queries, M keys of the batch, K classes, Q slots of each class, S = KQ slots, D the width of an embedding,
n queries of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rescom_timm.contrast.losses import supcon
from rescom_timm.contrast.pairs import against_queue, in_batch
from rescom_timm.contrast.queue import ClassBalancedQueue, Queue

NEVER = -1e30  # logit of a pair that is not valid: finite, so that it gives zeros where infinity gives NaN


def mined_supcon(
    queries: Tensor,
    labels: Tensor,
    queue: Queue,
    positives: int | None,
    negatives: int | None,
    temperature: float,
    weights: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    first: int = 0,
    chunk: int | None = None,
) -> Tensor:
    """Class-balanced supervised contrastive loss over hard pairs of the queue and all pairs of the batch (eq. 5).

    queries: (N, D) unit vectors. labels: (N,). positives, negatives: how many pairs of the queue are mined for each
    query, Qp at most Q and Qn at most (K-1)Q; None keeps all of that kind. weights: (N,) of each query's class.
    keys, key_labels: (M, D) and (M,) embeddings of the batch, never mined; query i is key `first + i`. Give the
    queries themselves for the local batch, gathered ones for all processes, none for the queue alone; key_labels are
    the queries' by default.
    chunk: queries that are compared at a time: bounds memory to about chunk x S x 4 bytes, for more launches.
    Returns the scalar mean over the N queries, in float32 or float64; gradients flow into queries and keys (once
    differentiable). No host synchronisation. FIFO and reversed queues take the readable path.
    Raises ValueError where more is mined than the queue can hold, or for a chunk below 1.
    """
    if not isinstance(queue, ClassBalancedQueue):
        return composed(queries, labels, queue, positives, negatives, temperature, weights, keys, key_labels, first)
    classes = len(queue.pointer)
    per_class = len(queue.keys) // classes
    qp = _checked(positives, per_class, "positive", "Q")
    qn = _checked(negatives, (classes - 1) * per_class, "negative", "(K-1)Q")
    # What is raised here is lowered again by autograd. Autocast would round similarities to eight bits.
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    if keys is None:
        keys, key_labels = queries.new_empty(0, queries.shape[1]), labels[:0]
    key_labels = labels if key_labels is None else key_labels
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None for all queries at once, not {chunk}")
    weights = queries.new_ones(len(queries)) if weights is None else weights.to(queries.dtype)
    with torch.autocast(queries.device.type, enabled=False):
        return _MinedSupcon.apply(
            queries, keys.to(queries.dtype), labels, key_labels, first, queue.keys.to(queries.dtype),
            queue.valid, classes, qp, qn, temperature, weights / len(queries), chunk or max(1, len(queries)),
        )  # fmt: skip


def composed(
    queries: Tensor,
    labels: Tensor,
    queue: Queue,
    positives: int | None,
    negatives: int | None,
    temperature: float,
    weights: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """The same loss put together from pairs: what `mined_supcon` must equal, for any queue. Arguments as there."""
    pairs = against_queue(queries, labels, queue).hardest(positives, negatives)
    if keys is not None:
        pairs = in_batch(queries, labels, keys, key_labels, first).join(pairs)
    return supcon(pairs, temperature, weights)


class _MinedSupcon(torch.autograd.Function):
    """Forward finds loss and gradient; what follows works on logits, that is similarities / temperature."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, queries: Tensor, keys: Tensor, labels: Tensor, key_labels: Tensor, first: int, queue: Tensor,
        valid: Tensor, classes: int, qp: int, qn: int, temperature: float, scale: Tensor, chunk: int,
    ) -> Tensor:  # fmt: skip
        grad_queries, grad_keys = torch.empty_like(queries), torch.zeros_like(keys)
        loss = queries.new_zeros(())
        queries = queries / temperature
        # Added by the product itself, so that no slot not yet filled is ever a pair.
        bias = (~valid * NEVER).to(queries.dtype)
        room = queries.new_empty(min(chunk, len(queries)), len(queue))
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            near, same = _of_batch(queries[rows], labels[rows], keys, key_labels, first + start)
            far = torch.addmm(bias, queries[rows], queue.T, out=room[: len(near)])
            hard, slots = _mine(far, labels[rows], classes, qp, qn)
            logits = torch.cat([near, hard], dim=1)
            positive = torch.cat([same, hard[:, :qp] > NEVER / 2], dim=1)
            part, gradient = _loss_and_gradient(logits, positive, scale[rows])
            loss += part
            grad_near, grad_hard = gradient.split([len(keys), slots.shape[1]], dim=1)
            grad_queries[rows] = _weighted_sum(queue, slots, grad_hard, far).addmm_(grad_near, keys)
            grad_keys.addmm_(grad_near.T, queries[rows])
        ctx.save_for_backward(grad_queries.div_(temperature), grad_keys)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_queries, grad_keys = ctx.saved_tensors
        return grad * grad_queries, grad * grad_keys, *[None] * 11


def _of_batch(queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Logits (n, M) of the batch, NEVER for a view with itself, and which are positive, (n, M)."""
    logits, same = queries @ keys.T, labels[:, None] == key_labels
    if len(keys):
        logits.diagonal(first).fill_(NEVER)
        same.diagonal(first).fill_(False)
    return logits, same


def _mine(logits: Tensor, labels: Tensor, classes: int, qp: int, qn: int) -> tuple[Tensor, Tensor]:
    """The hardest of (n, S) similarities, which are overwritten: values and slots (n, qp + qn), positives first."""
    per_class = logits.shape[1] // classes
    own = labels[:, None] * per_class + torch.arange(per_class, device=labels.device)
    positives = logits.gather(1, own)
    logits.scatter_(1, own, NEVER)
    if qp < per_class:
        rank = positives.masked_fill(positives < NEVER / 2, -NEVER)
        chosen = rank.topk(qp, dim=1, largest=False, sorted=False).indices
        positives, own = positives.gather(1, chosen), own.gather(1, chosen)
    if qn == logits.shape[1] - per_class:  # all: the own class stays among them as pairs that are not valid
        negatives = logits
        slots = torch.arange(logits.shape[1], device=labels.device).expand(len(labels), -1)
    else:
        negatives, slots = largest_(logits, qn)
    return torch.cat([positives, negatives], dim=1), torch.cat([own, slots], dim=1)


def largest_(values: Tensor, number: int, group: int = 4) -> tuple[Tensor, Tensor]:
    """torch.topk(values, number, sorted=False) of (n, m), exact, and faster where m is many times number.

    The `number` largest lie in the `number` groups with the largest maxima: groups are chosen first (themselves by
    groups), then values within them. values may be overwritten.
    """
    m = values.shape[1] // group
    if number == 0 or m < 3 * number:
        return _topk_(values, number)
    # Group j is j, j + m, j + 2m ...: maxima of whole rows, which run at the speed of memory.
    groups = values[:, : group * m].unflatten(1, (group, m))
    chosen = largest_(groups.amax(1), number, group)[1]
    index = (chosen[:, None] + torch.arange(0, group * m, m, device=values.device)[:, None]).flatten(1)
    if group * m < values.shape[1]:  # what fills no group competes for itself
        rest = torch.arange(group * m, values.shape[1], device=values.device)
        index = torch.cat([index, rest.expand(len(values), -1)], dim=1)
    found, place = _topk_(values.gather(1, index), number)
    return found, index.gather(1, place)


def _topk_(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """torch.topk of the numbers' bits in the numbers' order: integers need no test for NaN, a third of the time on a
    CPU. values are overwritten."""
    found, index = _ordered_bits_(values).topk(number, dim=1, sorted=False)
    return _ordered_bits_(found).view(values.dtype), index


def _ordered_bits_(values: Tensor) -> Tensor:
    """Floats, in place, as integers of the same order. Its own inverse: bits of floats from such integers."""
    integer = {4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(integer)
    sign = bits >> (8 * values.element_size() - 1)
    return bits.bitwise_xor_(sign.bitwise_and_(torch.iinfo(integer).max))


def _weighted_sum(queue: Tensor, slots: Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """Sum over m of weights (n, m) times the keys in slots (n, m): (n, D). room: (n, S), overwritten."""
    picked = slots.shape[1]
    if picked == 0 or 3 * picked > len(queue):  # a dense product is faster than picking so many of the keys
        return room.zero_().scatter_add_(1, slots, weights) @ queue
    return F.embedding_bag(slots, queue, per_sample_weights=weights.contiguous(), mode="sum")


def _loss_and_gradient(logits: Tensor, positive: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5, summed over queries times scale (n,), and eq. 4, its gradient with respect to logits (n, m).

    logits: (n, m), NEVER where a pair is not valid. positive: (n, p) of the first p pairs, all valid.
    """
    number = positive.sum(dim=1, keepdim=True, dtype=scale.dtype)
    scale = scale[:, None] * (number > 0)
    share = positive * (scale / number.clamp(min=1))
    kept = slice(0, positive.shape[1])
    log_p = F.log_softmax(logits, dim=1)
    loss = -(log_p[:, kept] * share).sum()
    gradient = log_p.exp_().mul_(scale)
    gradient[:, kept] -= share
    return loss, gradient


def _checked(number: int | None, most: int, kind: str, symbol: str) -> int:
    if number is None:
        return most
    if not 0 <= number <= most:
        raise ValueError(
            f"cannot mine {number} {kind} pairs of each query: the queue holds {symbol} = {most}; "
            "lower the number mined or raise the size of the queue"
        )
    return number
