"""Supervised contrastive losses over any pairs of embeddings.

Shapes: N queries, M pairs of each, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.contrastive.pairs import Pairs
from rescom_timm.contrastive.queue import Queue
from rescom_timm.losses.weights import at_least_float32


def supcon(pairs: Pairs, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Class-balanced supervised contrastive loss (paper eqs. 3 and 5) over any pairs.

    L_i = -(w_i / |P_i|) * sum over positives p of log( exp(s_ip / tau) / sum over valid pairs m of exp(s_im / tau) )

    weights: (N,) the weight of each query's class, ones by default. P_i are the valid positives of query i; a query
    that has none adds 0 and gets no gradient. Returns a scalar, the mean over all N queries.
    """
    logits = at_least_float32(pairs.similarity) / temperature
    # The lowest finite number, not -inf: a row without any valid pair must give zeros, not NaN.
    logits = logits.masked_fill(~pairs.valid, torch.finfo(logits.dtype).min)
    positive = pairs.positive & pairs.valid
    number = positive.sum(dim=1)
    mean_positive = logits.masked_fill(~positive, 0).sum(dim=1) / number.clamp(min=1)
    loss = (logits.logsumexp(dim=1) - mean_positive).where(number > 0, 0)
    return (loss if weights is None else loss * weights).mean()


def chance_level(
    labels: Tensor,
    queue: Queue,
    positives: int | None,
    negatives: int | None,
    weights: Tensor,
    key_labels: Tensor | None = None,
    own: int = 1,
) -> Tensor:
    """Contrastive loss (paper eq. 5) of embeddings that are all equal, the level that training should go below.

    The mean over queries of w_y log(number of valid pairs); a query without a positive pair adds 0, as in `supcon`.

    labels: (N,) of the queries. positives, negatives: Qp and Qn, None for all. weights: (K,) of the classes.
    key_labels: (M,) of the batch's own keys, of which `own` are the query itself. Returns a scalar without a gradient.
    No host synchronisation.
    """
    held = torch.zeros_like(weights).index_add_(0, queue.labels, queue.valid.to(weights.dtype))
    mine, other = held[labels], held.sum() - held[labels]
    same = mine if positives is None else mine.clamp(max=positives)
    pairs = same + (other if negatives is None else other.clamp(max=negatives))
    if key_labels is not None:
        same = same + (labels[:, None] == key_labels).sum(dim=1) - own
        pairs = pairs + len(key_labels) - own
    return (weights[labels] * pairs.clamp(min=1).log()).where(same > 0, 0).mean()


def chance_of_pairs(pairs: Pairs) -> Tensor:
    """`chance_level` of given pairs (N, M) with weights of one, for losses that are `supcon` of them."""
    number = pairs.valid.sum(dim=1).clamp(min=1).to(pairs.similarity.dtype)
    return number.log().where((pairs.positive & pairs.valid).any(dim=1), 0).mean()


def paco(
    centres: Tensor, labels: Tensor, pairs: Pairs, temperature: float, alpha: float, smoothing: float = 0.0
) -> Tensor:
    """Parametric contrastive loss (PaCo, Cui et al. 2021, arXiv 2107.12028, with its rebalanced centres).

    One softmax over the K class centres and all valid pairs:

    L_i = - sum_t w_t log p_it / sum_t w_t, w = 1 for the own centre, alpha for every positive pair

    centres: (N, K) logits of the centres, with log pi_k added. labels: (N,). pairs: (N, M). smoothing: of the centres'
    targets (GPaCo, arXiv 2209.12400). The division is in the authors' code. Returns a scalar, the mean over N.
    """
    centres = at_least_float32(centres)
    logits = (at_least_float32(pairs.similarity) / temperature).to(centres.dtype)
    logits = logits.masked_fill(~pairs.valid, torch.finfo(logits.dtype).min)
    log_p = torch.cat((centres, logits), dim=1).log_softmax(dim=1)
    own = F.one_hot(labels, centres.shape[1]).to(log_p.dtype)
    own = own * (1 - smoothing) + (1 - own) * smoothing / (centres.shape[1] - 1)
    positive = alpha * (pairs.positive & pairs.valid).to(log_p.dtype)
    target = torch.cat((own, positive), dim=1)
    return -((target * log_p.masked_fill(target == 0, 0)).sum(dim=1) / target.sum(dim=1)).mean()
