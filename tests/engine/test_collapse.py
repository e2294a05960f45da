"""A contrastive branch that learns nothing is seen: chance level, the queue's cosines, the warning."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rescom_timm.config.loading import load
from rescom_timm.contrastive.mined import mined_supcon
from rescom_timm.contrastive.pairs import against_queue, in_batch
from rescom_timm.contrastive.queue import ClassBalancedQueue, FifoQueue
from rescom_timm.contrastive.supcon import chance_level, chance_of_pairs, supcon
from rescom_timm.engine import collapse
from rescom_timm.engine.run_folder import lines as lines_of
from rescom_timm.engine.trainer import train
from rescom_timm.methods import RescomConfig
from tests.raises import warns
from tests.recipes import UNDRAWN


@pytest.mark.parametrize(("qp", "qn"), [(1, 5), (None, None), (3, 4)])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("filled", [0, 7, 40])
def test_the_chance_level_is_the_loss_of_equal_embeddings(qp, qn, batch, filled):
    torch.manual_seed(0)
    queue, labels = ClassBalancedQueue(4, 3, 5), torch.tensor([0, 0, 1, 3])
    one = F.normalize(torch.ones(1, 5), dim=1)
    queue.enqueue(one.repeat(filled, 1), torch.randint(0, 3, (filled,)))  # class 3 has no key
    z, weights = one.repeat(4, 1), torch.tensor([0.5, 1.0, 2.0, 3.0])
    pairs = against_queue(z, labels, queue).hardest(qp, qn)
    if batch:
        pairs = in_batch(z, labels).join(pairs)
    expected = supcon(pairs, 0.2, weights[labels])
    found = chance_level(labels, queue, qp, qn, weights, labels if batch else None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chance_of_pairs(pairs), supcon(pairs, 0.2), rtol=1e-5, atol=1e-6)


def test_the_queues_cosines_are_means_over_pairs_of_keys():
    torch.manual_seed(0)
    queue = FifoQueue(30, 4)
    keys, labels = F.normalize(torch.randn(20, 4), dim=1), torch.randint(0, 3, (20,))
    queue.enqueue(keys, labels)
    cosine, same = keys @ keys.T, labels[:, None] == labels
    other = ~torch.eye(20, dtype=torch.bool)
    within, between = queue.cosines()
    assert float(within) == pytest.approx(float(cosine[same & other].mean()), abs=1e-6)
    assert float(between) == pytest.approx(float(cosine[~same].mean()), abs=1e-6)
    assert collapse.cosines([queue]).keys() == {"queue/cosine_within", "queue/cosine_between"}
    assert collapse.cosines([FifoQueue(3, 4)]) == {} == collapse.cosines([])


def lines(shares, start=1):
    return [
        {"epoch": epoch, "train/loss_contrast": share * 5.2, "train/loss_contrast_chance": 5.2}
        for epoch, share in enumerate(shares, start)
    ]


@pytest.mark.parametrize(
    ("shares", "warmup", "said_at"),
    [
        ([0.99] * 8, 0, [5]),  # once
        ([0.99] * 8, 2, [7]),
        ([0.99] * 4 + [0.9] + [0.98] * 6, 0, [10]),
        ([0.96] * 9, 0, []),
        ([0.99] * 5 + [0.9] + [0.99] * 5, 0, [5, 11]),
    ],
)
def test_the_warning_comes_after_five_epochs_at_chance(shares, warmup, said_at):
    log = lines(shares)
    said = [k for k in range(1, len(log) + 1) if collapse.warning(log[:k], warmup)]
    assert said == said_at
    if said:
        message = collapse.warning(log[: said[0]], warmup, RescomConfig.remedy)
        assert all(word in message for word in ("method.positives", "per_class", "contrast_weight", "view"))


def test_the_warning_of_a_queue_that_is_one_point():
    log = [{"epoch": epoch, "queue/cosine_between": 0.95} for epoch in (2, 4, 6, 8)]
    assert [k for k in range(1, 5) if collapse.warning(log[:k], 0)] == [3]
    assert collapse.warning([{"epoch": 1, "test/top1": 3.0}], 0) is None and collapse.warning([], 0) is None
    assert math.isnan(float(FifoQueue(3, 4).cosines()[0]))


def trained(qp):
    """A projector on made-up features of 8 classes, a tenth of which lie at another class: the queue's cosine between
    classes, and the loss over its chance level."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(8, 16), dim=1)
    projector = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    queue, weights = ClassBalancedQueue(8, 24, 8), torch.ones(8)
    optimizer = torch.optim.SGD(projector.parameters(), 0.1, momentum=0.9)
    for _ in range(80):
        labels = torch.randint(0, 8, (64,))
        seen = labels.where(torch.rand(64) > 0.1, torch.randint(0, 8, (64,)))
        z = F.normalize(projector(centres[seen] + 0.3 * torch.randn(64, 16)), dim=1)
        loss, chance = mined_supcon(z, labels, queue, qp, 96, 0.2), chance_level(labels, queue, qp, 96, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.enqueue(z.detach(), labels)
    return float(queue.cosines()[1]), float(loss.detach() / chance)


def test_the_hardest_positive_alone_collapses_and_sixteen_do_not():
    """Measured: .998 and 1.001 with Qp = 1, .43 and .92 with Qp = 16."""
    between, share = trained(1)
    assert between > 0.98 and share > 0.99
    between, share = trained(16)
    assert between < 0.6 and share < 0.96


def test_a_run_logs_chance_and_cosines_and_warns(alone, tmp_path):
    words = [
        "net.backbone=resnet8_cifar", "train.epochs=5", "train.batch_size=182", "schedule.warmup_epochs=0",
        "evaluation.every=1", f"output={tmp_path}", "optimizer.lr=1e-9", "method.mode=paper",
        UNDRAWN,
    ]  # fmt: skip
    with warns("contrastive loss", "%"):
        folder = train(load("digits_lt", words))
    log = lines_of(folder / "metrics.jsonl")
    shares = [share for line in log if (share := collapse.share_of_chance(line))]
    assert len(shares) == 5 and sum("queue/cosine_between" in line for line in log) == 5


def test_the_report_has_the_state_in_words():
    log = [{"epoch": 1, "train/loss_contrast": 5.1, "train/loss_contrast_chance": 5.2}]
    log += [{"epoch": 2, "queue/cosine_between": 0.3}, {"epoch": 3, "test/top1": 50.0}]
    state = collapse.last_state(log)
    assert collapse.dead(state) and all(part in collapse.sentence(state) for part in ("98%", "0.30", "nothing"))
    alive = {"share": 0.8, "between": 0.3}
    assert not collapse.dead(alive) and "nothing" not in collapse.sentence(alive)
    assert collapse.sentence({}) == "" and not collapse.dead({})
