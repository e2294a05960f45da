"""Whether the contrastive branch of a run learns anything: its loss against the level of chance, and its queue."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from rescom_timm.contrastive.queue import Queue
from rescom_timm.engine.run_folder import Line
from rescom_timm.methods.base import BaseConfig

EPOCHS = 5
"""After warm-up, for so many epochs in a row."""
NEAR_CHANCE, ONE_POINT = 0.97, 0.9
LOSS, CHANCE = "train/loss_contrast", "train/loss_contrast_chance"
WITHIN, BETWEEN = "queue/cosine_within", "queue/cosine_between"


def cosines(queues: Sequence[Queue]) -> dict[str, float]:
    """How alike the keys of a method's queue are, for the log; empty where it has none, or keys of one class alone."""
    if len(queues) != 1:
        return {}
    named = zip((WITHIN, BETWEEN), map(float, queues[0].cosines()), strict=True)
    return {name: value for name, value in named if math.isfinite(value)}


def share_of_chance(line: Line) -> float | None:
    """The contrastive loss of an epoch over its chance level; None where the line of the log has none."""
    if not line.get(CHANCE) or LOSS not in line:
        return None
    return line[LOSS] / line[CHANCE]


def last_state(lines: Sequence[Line]) -> dict[str, float]:
    """The last that a log says of the contrastive branch: share (loss over chance) and between (cosine of classes)."""
    found: dict[str, float] = {}
    for line in lines:
        if (share := share_of_chance(line)) is not None:
            found["share"] = share
        if BETWEEN in line:
            found["between"] = line[BETWEEN]
    return found


def dead(state: dict[str, float]) -> bool:
    """Whether a last_state is that of a branch that learns nothing."""
    return state.get("share", 0) > NEAR_CHANCE or state.get("between", 0) > ONE_POINT


def sentence(state: dict[str, float]) -> str:
    """A last_state in words; "" where a log says nothing of a contrastive branch."""
    parts = []
    if "share" in state:
        parts.append(f"contrastive loss {100 * state['share']:.0f}% of chance")
    if "between" in state:
        parts.append(f"cosine between classes in the queue {state['between']:.2f}")
    return ", ".join(parts) + (": the contrastive branch learned nothing" if dead(state) else "")


def warning(lines: Sequence[Line], warmup: int, remedy: str = BaseConfig.remedy) -> str | None:
    """Return a warning about the last of these lines of metrics.jsonl, or None.

    It comes once, at the first epoch that ends such a row. warmup: epochs of it. remedy: what to change, of the
    method's config.
    """
    last = lines[-1] if lines else {}
    if share_of_chance(last) is not None:
        shares = {line["epoch"]: share for line in lines if (share := share_of_chance(line)) is not None}
        if epoch := _row({epoch: share > NEAR_CHANCE for epoch, share in shares.items()}, warmup):
            return (
                f"the contrastive loss is {100 * shares[epoch]:.0f}% of its chance level, and was above "
                f"{100 * NEAR_CHANCE:.0f}% for {EPOCHS} epochs: the contrastive branch learns nothing; {remedy}"
            )
    if BETWEEN in last:
        cosines = {line["epoch"]: line[BETWEEN] for line in lines if BETWEEN in line}
        if epoch := _row({epoch: cosine > ONE_POINT for epoch, cosine in cosines.items()}, warmup):
            return (
                f"the queue's keys of different classes have a mean cosine of {cosines[epoch]:.2f}: the embeddings "
                f"have collapsed to one point; {remedy}"
            )
    return None


def warn(lines: Sequence[Line], warmup: int, remedy: str = BaseConfig.remedy) -> None:
    """Give the warning, if there is one."""
    if message := warning(lines, warmup, remedy):
        warnings.warn(message, stacklevel=3)


def _row(bad: dict[float, bool], warmup: int) -> float | None:
    """The last epoch, if it is the first that ends EPOCHS epochs after warm-up with all that was measured bad."""
    measured = [epoch for epoch in sorted(bad) if epoch > warmup]
    start = next((epoch for epoch in reversed(measured) if not bad[epoch]), None)
    row = [epoch for epoch in measured if start is None or epoch > start]
    if not row:
        return None
    long = [epoch for epoch in row if epoch - row[0] >= EPOCHS - 1]
    return row[-1] if long and long[0] == row[-1] else None
