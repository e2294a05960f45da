"""Hard pair mining and its loss in one step.

The fast form of supcon(in_batch(...).join(against_queue(...).hardest(positives, negatives)), temperature, weights),
which `composed` computes as written. The forward pass finds the loss and its gradient (paper eq. 4, in closed form),
and the backward pass only multiplies by d(loss)/d(output): the queue is not copied and may be written at once, and no
(N, S) tensor outlives the call.

Shapes: N queries, M keys of the batch, K classes, Q slots of each class, S = KQ slots, D the width of an embedding, n
queries of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rescom_timm.contrastive.pairs import against_queue, in_batch
from rescom_timm.contrastive.queue import ClassBalancedQueue, Queue
from rescom_timm.contrastive.supcon import supcon
from rescom_timm.errors import InputError

NEVER = -1e30  # logit of a pair that is not valid: finite, so that it gives zeros where infinity gives NaN
SIMILARITIES_AT_ONCE = 2**28
"""Similarities in memory at a time, 1 GiB in float32: 512 queries against 524,288 keys."""


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

    queries: (N, D) unit vectors. labels: (N,). positives, negatives: pairs of the queue mined for each query, Qp at
    most Q and Qn at most (K-1)Q; None keeps all of that kind. weights: (N,) of each query's class.

    keys, key_labels: (M, D) and (M,) embeddings of the batch, never mined; query i is key `first + i`. Give the queries
    themselves for the local batch, gathered ones for all processes, none for the queue alone; key_labels are the
    queries' by default.

    chunk: queries compared at a time, which limits memory to about chunk x S x 4 bytes. None: as many as
    SIMILARITIES_AT_ONCE allows.

    Returns the scalar mean over the N queries, in float32 or float64; gradients flow into queries and keys (once
    differentiable). No host synchronisation. FIFO and reversed queues use `composed`. Raises InputError if more pairs
    are mined than the queue can hold, or for a chunk below 1.
    """
    if not isinstance(queue, ClassBalancedQueue):
        return composed(queries, labels, queue, positives, negatives, temperature, weights, keys, key_labels, first)
    classes = len(queue.pointer)
    per_class = len(queue.keys) // classes
    qp = _checked(positives, per_class, "positive", "Q")
    qn = _checked(negatives, (classes - 1) * per_class, "negative", "(K-1)Q")
    # Autograd casts the gradient back. Autocast would round similarities to eight bits.
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    if keys is None:
        keys, key_labels = queries.new_empty(0, queries.shape[1]), labels[:0]
    key_labels = labels if key_labels is None else key_labels
    if chunk is not None and chunk < 1:
        raise InputError("method.value", f"chunk must be at least 1 or None, not {chunk}")
    chunk = chunk or max(1, min(len(queries), SIMILARITIES_AT_ONCE // len(queue.keys)))
    weights = queries.new_ones(len(queries)) if weights is None else weights.to(queries.dtype)
    with torch.autocast(queries.device.type, enabled=False):
        return _MinedSupcon.apply(
            queries, keys.to(queries.dtype), labels, key_labels, first, queue.keys.to(queries.dtype),
            queue.valid, classes, qp, qn, temperature, weights / len(queries), chunk,
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
    """Compute the same loss from Pairs, for any queue; `mined_supcon` must equal it. Arguments as there."""
    pairs = against_queue(queries, labels, queue).hardest(positives, negatives)
    if keys is not None:
        pairs = in_batch(queries, labels, keys, key_labels, first).join(pairs)
    return supcon(pairs, temperature, weights)


class _MinedSupcon(torch.autograd.Function):
    """Forward finds loss and gradient. Logits below are similarities / temperature."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, queries: Tensor, keys: Tensor, labels: Tensor, key_labels: Tensor, first: int, queue: Tensor,
        valid: Tensor, classes: int, qp: int, qn: int, temperature: float, scale: Tensor, chunk: int,
    ) -> Tensor:  # fmt: skip
        grad_queries, grad_keys = torch.empty_like(queries), torch.zeros_like(keys)
        loss = queries.new_zeros(())
        queries = queries / temperature
        bias = (~valid * NEVER).to(queries.dtype)  # addmm adds it, so that an empty slot is never a pair
        buffer = queries.new_empty(min(chunk, len(queries)), len(queue))
        dense = qn > 0 and len(queue) < 3 * (qp + qn)  # most keys are mined: keep all, each with its share
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            near, same = _of_batch(queries[rows], labels[rows], keys, key_labels, first + start)
            far = torch.addmm(bias, queries[rows], queue.T, out=buffer[: len(near)])
            own, own_slots = _own(far, labels[rows], classes, qp)
            positive = torch.cat([same, own > NEVER / 2], dim=1)
            if dense:
                logits, share = torch.cat([near, own, far], dim=1), share_of_largest(far, qn)
            else:
                values, slots = largest_(far, qn)
                logits, share = torch.cat([near, own, values], dim=1), None
            part, gradient = _loss_and_gradient(logits, positive, scale[rows], share)
            loss += part
            grad_near, grad_own, grad_far = gradient.split([len(keys), qp, logits.shape[1] - positive.shape[1]], dim=1)
            grad_queries[rows] = grad_near @ keys
            if dense:
                grad_queries[rows].addmm_(grad_far.scatter_(1, own_slots, grad_own), queue)
            elif qp + qn:
                weights, slots = torch.cat([grad_own, grad_far], dim=1), torch.cat([own_slots, slots], dim=1)
                grad_queries[rows] += F.embedding_bag(slots, queue, per_sample_weights=weights, mode="sum")
            grad_keys.addmm_(grad_near.T, queries[rows])
        ctx.save_for_backward(grad_queries.div_(temperature), grad_keys)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_queries, grad_keys = ctx.saved_tensors
        return grad * grad_queries, grad * grad_keys, *[None] * 11


def _of_batch(queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Logits (n, M) of the batch, NEVER for a view with itself, and a mask of the positive pairs, (n, M)."""
    logits, same = queries @ keys.T, labels[:, None] == key_labels
    if len(keys):
        logits.diagonal(first).fill_(NEVER)
        same.diagonal(first).fill_(False)
    return logits, same


def _own(logits: Tensor, labels: Tensor, classes: int, qp: int) -> tuple[Tensor, Tensor]:
    """Values and slots (n, qp) of the least similar keys of each query's class, set to NEVER in logits (n, S)."""
    per_class = logits.shape[1] // classes
    slots = labels[:, None] * per_class + torch.arange(per_class, device=labels.device)
    values = logits.gather(1, slots)
    logits.scatter_(1, slots, NEVER)
    if qp == per_class:
        return values, slots
    rank = values.masked_fill(values < NEVER / 2, -NEVER)
    chosen = rank.topk(qp, dim=1, largest=False, sorted=False).indices
    return values.gather(1, chosen), slots.gather(1, chosen)


def share_of_largest(values: Tensor, number: int) -> Tensor:
    """1 for the `number` largest of (n, m), 0 for the others; ties for the last places share them evenly."""
    m = values.shape[1]
    if values.device.type == "cpu":  # NumPy's partition is vectorised and needs no indices
        partitioned = values.clone()
        partitioned.numpy().partition(m - number, axis=1)
        bound = partitioned[:, m - number, None]
    else:
        bound = values.topk(number, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above = torch.gt(values, bound, out=torch.empty_like(values))
    tied = torch.eq(values, bound, out=torch.empty_like(values))
    places = number - above.sum(dim=1, keepdim=True)
    return above.addcmul_(tied, places / tied.sum(dim=1, keepdim=True))


def largest_(values: Tensor, number: int, group: int = 4) -> tuple[Tensor, Tensor]:
    """torch.topk(values, number, sorted=False) of (n, m), exact, and faster if m is many times number.

    The `number` largest lie in the `number` groups with the largest maxima: it chooses groups first (recursively), then
    values within them. May overwrite values.
    """
    m = values.shape[1] // group
    if number == 0 or m < 3 * number:
        return _topk_(values, number)
    # Group j is j, j + m, j + 2m ...: maxima of whole rows, which run at the speed of memory.
    groups = values[:, : group * m].unflatten(1, (group, m))
    chosen = largest_(groups.amax(1), number, group)[1]
    index = (chosen[:, None] + torch.arange(0, group * m, m, device=values.device)[:, None]).flatten(1)
    if group * m < values.shape[1]:  # the remainder, which fills no group
        rest = torch.arange(group * m, values.shape[1], device=values.device)
        index = torch.cat([index, rest.expand(len(values), -1)], dim=1)
    found, place = _topk_(values.gather(1, index), number)
    return found, index.gather(1, place)


def _topk_(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """torch.topk of the numbers' bits in the numbers' order; overwrites values.

    Integers need no test for NaN, which takes a third of the time on a CPU.
    """
    found, index = _ordered_bits_(values).topk(number, dim=1, sorted=False)
    return _ordered_bits_(found).view(values.dtype), index


def _ordered_bits_(values: Tensor) -> Tensor:
    """Floats, in place, as integers of the same order. Its own inverse: bits of floats from such integers."""
    integer = {4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(integer)
    sign = bits >> (8 * values.element_size() - 1)
    return bits.bitwise_xor_(sign.bitwise_and_(torch.iinfo(integer).max))


def _loss_and_gradient(logits: Tensor, positive: Tensor, scale: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eq. 5, summed over queries times scale (n,), and eq. 4, its gradient; overwrites logits (n, m).

    logits: NEVER where a pair is not valid. positive: (n, p) of the first p pairs, all valid. share: (n, m - p), weight
    of each other pair, 0 to 1, the largest of them more than 0; all 1 by default.
    """
    if logits.shape[1] == 0:
        return logits.sum(), logits
    number = positive.sum(dim=1, keepdim=True, dtype=scale.dtype)
    scale = scale[:, None] * (number > 0)
    target = positive * (scale / number.clamp(min=1))
    kept = positive.shape[1]
    of_positives = (logits[:, :kept] * target).sum()
    top = logits.amax(dim=1, keepdim=True)
    exp = logits.sub_(top).exp_()
    if share is not None:
        exp[:, kept:] *= share
    total = exp.sum(dim=1, keepdim=True)
    loss = (scale * (top + total.log())).sum() - of_positives
    gradient = exp.mul_(scale / total)
    gradient[:, :kept] -= target
    return loss, gradient


def _checked(number: int | None, most: int, kind: str, symbol: str) -> int:
    if number is None:
        return most
    if not 0 <= number <= most:
        raise InputError(
            "queue.mined",
            f"cannot mine {number} {kind} pairs of each query from {symbol} = {most}: mine fewer or enlarge the queue",
        )
    return number
