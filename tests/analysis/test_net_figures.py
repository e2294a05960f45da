"""Figures from a net and a queue: their numbers against autograd, formulas and hand-made cases."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rescom_timm.analysis import augmentations, gradients, pair_counts, queues, similarity, style, tsne
from tests.analysis.made_up import long_tail
from tests.raises import raises

COUNTS = long_tail(5, 200, 20)


def _saved(module: object, measured: object, folder: Path) -> None:
    style.save(module.draw(measured), module.table(measured), folder / "figure", dpi=40)  # type: ignore[attr-defined]
    assert len(list(folder.iterdir())) == 3


# Pair frequency


def test_expected_pairs_by_hand() -> None:
    # 2 of class 0, 1 of class 1, a batch of all three: E[n_0] = 2, E[n_1] = 1, nothing random.
    np.testing.assert_allclose(pair_counts.expected([2, 1], 3), [[2, 2], [2, 0]])
    # Two views: 4 views of class 0 against 3 others; 2 views of class 1 against one other; 4 x 2 across.
    np.testing.assert_allclose(pair_counts.expected([2, 1], 3, views=2), [[12, 8], [8, 2]])
    np.testing.assert_allclose(pair_counts.expected([2, 1], 3, slots=[4, 5]), [[8, 10], [4, 5]])


@pytest.mark.parametrize("n_views", [1, 2])
def test_simulated_pairs_follow_the_formula(n_views: int) -> None:
    found = pair_counts.measure(COUNTS, batch=32, views=n_views, steps=3000)
    np.testing.assert_allclose(found.simulated, found.expected, rtol=0.15, atol=0.05)
    assert found.simulated.sum() == pytest.approx(n_views * 32 * (n_views * 32 - 1))


def test_imbalance_is_squared_in_the_batch_and_plain_against_a_balanced_queue() -> None:
    counts = [2000, 1000, 400, 100]
    in_batch = pair_counts.measure(counts, batch=64, steps=4000)
    gamma = (counts[0] / counts[-1]) ** 2
    assert in_batch.imbalance(in_batch.expected) == pytest.approx(gamma, rel=0.02)
    assert in_batch.imbalance(in_batch.simulated) == pytest.approx(gamma, rel=0.2)
    queue = pair_counts.measure(counts, batch=64, slots=[10] * 4)
    assert queue.imbalance(queue.expected) == pytest.approx(20)
    assert queue.imbalance(queue.simulated) == pytest.approx(20, rel=0.1)


def test_pairs_are_drawn_also_where_the_rarest_has_none(tmp_path: Path) -> None:
    found = pair_counts.measure([50, 1], batch=8, steps=20)
    assert found.imbalance(found.expected) == np.inf
    _saved(pair_counts, found, tmp_path)


def test_pairs_refuse_impossible_batches() -> None:
    with raises("plot.value", 3, 4):
        pair_counts.measure([2, 1], batch=4)
    with raises("plot.value", "slots"):
        pair_counts.measure([2, 1], batch=2, slots=[1])


# Gradients


def _pairs(n: int = 12, m: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    near = torch.rand(n, m, generator=generator, dtype=torch.float64) * 2 - 1
    positive = torch.rand(n, m, generator=generator) < 0.2
    valid = torch.rand(n, m, generator=generator) < 0.8
    positive[0] = False  # a query without positives
    valid[1] = False  # a query without pairs
    return near, positive, valid


@pytest.mark.parametrize("weighted", [False, True])
def test_pair_gradients_are_autograds(weighted: bool) -> None:
    near, positive, valid = _pairs()
    weights = torch.linspace(0.5, 2, len(near), dtype=torch.float64) if weighted else torch.ones(len(near))
    logits = (near / 0.2).requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(near)):  # eq. 5 as printed, query by query
        chosen = [j for j in range(near.shape[1]) if valid[i, j] and positive[i, j]]
        everyone = [j for j in range(near.shape[1]) if valid[i, j]]
        for p in chosen:
            loss = loss - weights[i] / len(chosen) * (logits[i, p] - logits[i, everyone].logsumexp(0))
    loss.backward()
    found = gradients.pair_gradients(near, positive, valid, 0.2, weights if weighted else None)
    torch.testing.assert_close(found, logits.grad)
    assert (found[~valid] == 0).all() and (found[:2] == 0).all()


def test_gradients_are_sorted_from_hard_to_easy(tmp_path: Path) -> None:
    near, positive, valid = _pairs(40, 200)
    found = gradients.measure(near, positive, valid, temperature=0.2, points=10)
    assert (np.diff(found.positive_similarity) > 0).all() and (np.diff(found.negative_similarity) < 0).all()
    assert found.negative_norm[0] > 5 * found.negative_norm[-1]  # hard negatives push, easy ones do not
    assert found.positive_pairs == int((positive & valid).sum())
    _saved(gradients, found, tmp_path)


def test_gradients_refuse_nothing_to_draw() -> None:
    near, positive, valid = _pairs()
    with raises("plot.value", "positive"):
        gradients.measure(near, torch.zeros_like(positive), valid)
    with raises("plot.value", "negative"):
        gradients.measure(near, torch.ones_like(positive), valid)
    with raises("plot.value", "temperature"):
        gradients.measure(near, positive, valid, temperature=0)


# Similarity


def test_similarity_splits_positives_by_group(tmp_path: Path) -> None:
    near = torch.tensor([[0.9, 0.1, 0.5], [0.3, -1.0, 1.0]])
    positive = torch.tensor([[True, True, False], [True, True, True]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    found = similarity.measure(near, positive, valid, torch.tensor([0, 1]), counts=[500, 5], bins=4)
    assert found.pairs == {"many": 2, "few": 2}
    assert found.median["many"] == pytest.approx(0.5) and found.median["few"] == pytest.approx(-0.35)
    assert found.share["many"].tolist() == [0, 0, 50, 50] and found.share["few"].tolist() == [50, 0, 50, 0]
    _saved(similarity, found, tmp_path)
    with raises("plot.value", "positive"):
        similarity.measure(near, positive, torch.zeros_like(valid), torch.tensor([0, 1]), counts=[500, 5])


# t-SNE


def test_tsne_is_seeded_capped_and_balanced(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    features = torch.randn(73, 8, generator=generator)
    found = tsne.measure(features, labels, counts=[500, 50, 5], most=24)
    assert np.bincount(found.labels).tolist() == [11, 10, 3]
    again = tsne.measure(features, labels, counts=[500, 50, 5], most=24)
    np.testing.assert_array_equal(found.points, again.points)
    _saved(tsne, found, tmp_path)


def test_tsne_of_many_classes_and_bad_features() -> None:
    labels = torch.arange(24) % 12
    features = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    found = tsne.measure(features, labels, counts=long_tail(12, 500, 100))
    assert len(tsne.draw(found).legends[0].get_texts()) == 3  # the groups
    with raises("plot.value"):
        tsne.measure(features * torch.nan, labels, counts=[1] * 12)
    with raises("plot.value", 4):
        tsne.measure(features[:3], labels[:3], counts=[1] * 12)


# Contact sheet and queues


def test_contact_sheet_shows_pixels_as_they_are(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (7, 2, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = augmentations.measure(images, torch.tensor([0, 1, 2, 0, 1, 2, 0]), [500, 50, 5], most=5)
    assert found.images.shape == (5, 2, 8, 6, 3)
    np.testing.assert_array_equal(found.images[4, 1, :, :, 2], images[4, 1, 2].numpy())
    assert augmentations.table(found)["training_images"].tolist() == [500, 50, 5, 500, 50]
    _saved(augmentations, found, tmp_path)
    assert augmentations.measure(images[:, 0], torch.zeros(7), [3]).images.shape == (7, 1, 8, 6, 3)


def test_contact_sheet_refuses_normalised_images() -> None:
    with raises("plot.value", "float32"):
        augmentations.measure(torch.zeros(2, 2, 3, 8, 8), torch.zeros(2), [1])
    with raises("plot.value", "labels"):
        augmentations.measure(torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3), [1])


def test_queue_slots(tmp_path: Path) -> None:
    kinds = {"fifo": torch.tensor([0, 0, 0, 1]), "balanced": torch.tensor([0, 1, 2])}
    found = queues.measure(kinds, counts=[5, 500, 50])
    assert found.slots["fifo"].tolist() == [3, 1, 0]
    assert queues.table(found)["slots_fifo"].tolist() == [1, 0, 3]
    _saved(queues, found, tmp_path)
    with raises("plot.value", "2 classes"):
        queues.measure(kinds, counts=[5, 500])
