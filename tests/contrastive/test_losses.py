import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rescom_timm.contrastive.pairs import Pairs, against_queue, in_batch
from rescom_timm.contrastive.supcon import supcon
from rescom_timm.losses import balanced_softmax, class_weights
from tests.contrastive import reference
from tests.contrastive.cases import Case, cases, make_case, thrifty, unit
from tests.raises import raises


def assert_same_loss_and_gradient(mine: Tensor, naive: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(mine, naive, rtol=1e-11, atol=1e-12)
    if not naive.requires_grad:  # nothing was a pair: the loss is a constant zero
        naive = naive + 0 * leaf.sum()
    (ours,), (theirs,) = torch.autograd.grad(mine, leaf), torch.autograd.grad(naive, leaf, retain_graph=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# --- Balanced Softmax, eq. 6 ------------------------------------------------------------------------------------


@thrifty
@given(seed=st.integers(0, 2**31), images=st.integers(1, 5), classes=st.integers(1, 6))
def test_siamese_balanced_softmax_is_cross_entropy_over_the_stacked_views(seed: int, images: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(2 * images, classes, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(classes, (images,), generator=generator)
    counts = torch.randint(1, 5000, (classes,), generator=generator)
    naive = reference.siamese_balanced_softmax(logits.chunk(2), labels.tolist(), counts.tolist())
    assert_same_loss_and_gradient(balanced_softmax(logits, labels.repeat(2), counts), naive, logits)


def test_balanced_softmax_of_equal_logits_is_the_log_share_of_the_class() -> None:
    loss = balanced_softmax(torch.zeros(1, 3), torch.tensor([2]), torch.tensor([70, 20, 10]))
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)


def test_balanced_softmax_with_equal_counts_is_plain_cross_entropy() -> None:
    logits, labels = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(balanced_softmax(logits, labels, torch.full((5,), 300)), plain)


# --- Class weights, eq. 2 ---------------------------------------------------------------------------------------


def long_tailed(head: int, classes: int, factor: int) -> list[int]:
    return [int(head * (1 / factor) ** (k / (classes - 1))) for k in range(classes)]


def image_average(counts: list[int], beta: float, form: str = "normalized") -> float:
    number = torch.tensor(counts)
    return float((class_weights(number, beta, form).double() * number).sum() / number.sum())  # type: ignore[arg-type]


@thrifty
@given(
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    beta=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999, 0.999999, 0.99999999]),
    form=st.sampled_from(["normalized", "printed"]),
)
def test_class_weights_to_the_last_digit_of_float32(counts: list[int], beta: float, form: str) -> None:
    weights = class_weights(torch.tensor(counts), beta, form)  # type: ignore[arg-type]
    exact = torch.tensor(reference.class_weights(counts, beta, form == "normalized"), dtype=torch.float64)
    assert weights.dtype == torch.float32
    assert ((weights.double() - exact).abs() <= exact * 2**-24 * 1.01).all()


def test_class_weights_without_beta_are_ones() -> None:
    counts = torch.tensor([1000, 30, 1])
    assert class_weights(counts, 0.0).tolist() == class_weights(counts, 0.0, "printed").tolist() == [1.0, 1.0, 1.0]


def test_known_weights_of_long_tailed_cifar() -> None:
    assert image_average(long_tailed(5000, 10, 100), 0.99) == pytest.approx(0.875, abs=5e-4)
    assert image_average(long_tailed(500, 100, 100), 0.999999) == pytest.approx(1.000, abs=5e-4)


def test_known_weights_of_the_official_lists(shared_lists: Path) -> None:
    imagenet = json.loads((shared_lists / "ImageNet_LT_train_class_counts.json").read_text())
    assert (len(imagenet), sum(imagenet)) == (1000, 115846)
    assert image_average(imagenet, 0.99) == pytest.approx(0.806, abs=5e-4)
    assert image_average(imagenet, 0.99, "printed") == pytest.approx(0.0153, abs=5e-5)
    labels = [int(line.rsplit(" ", 1)[1]) for line in (shared_lists / "Places_LT_train.txt").read_text().splitlines()]
    assert image_average(torch.tensor(labels).bincount().tolist(), 0.99) == pytest.approx(0.701, abs=5e-4)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan")])
def test_beta_outside_its_range_is_refused(beta: float) -> None:
    with raises("method.value", "beta", beta):
        class_weights(torch.tensor([5, 3]), beta)


def test_classes_without_images_and_unknown_forms_are_refused() -> None:
    with raises("data.empty_class", "[1, 3]"):
        class_weights(torch.tensor([5, 0, 3, 0]), 0.9)
    with raises("method.value", "'printd'"):
        class_weights(torch.tensor([5, 3]), 0.9, "printd")  # type: ignore[arg-type]


# --- The contrastive loss, eqs. 3 and 5, both modes -------------------------------------------------------------


def queue_loss(case: Case, qp: int | None, qn: int | None) -> Tensor:
    pairs = against_queue(case.queries, case.labels, case.queue).hardest(qp, qn)
    return supcon(pairs, case.tau, case.weights[case.labels])


@thrifty
@given(cases())
def test_mined_queue_pairs_are_eq_5(case: Case) -> None:
    naive = reference.paper(case.queries, case.label_list, case.rings, case.qp, case.qn, case.tau, case.weight_list)
    assert_same_loss_and_gradient(queue_loss(case, case.qp, case.qn), naive, case.queries)


@thrifty
@given(cases())
def test_all_queue_pairs_are_eq_3_and_so_is_mining_all_of_them(case: Case) -> None:
    naive = reference.paper(case.queries, case.label_list, case.rings, None, None, case.tau, case.weight_list)
    assert_same_loss_and_gradient(queue_loss(case, None, None), naive, case.queries)
    everything = (case.rings.size, (case.rings.classes - 1) * case.rings.size)
    assert_same_loss_and_gradient(queue_loss(case, *everything), naive, case.queries)


@thrifty
@given(cases())
def test_mining_one_kind_keeps_the_other_whole(case: Case) -> None:
    for qp, qn in ((case.qp, None), (None, case.qn)):
        naive = reference.paper(case.queries, case.label_list, case.rings, qp, qn, case.tau, case.weight_list)
        assert_same_loss_and_gradient(queue_loss(case, qp, qn), naive, case.queries)


@thrifty
@given(cases(min_rows=2))
def test_released_mode_joins_the_views_of_the_batch(case: Case) -> None:
    pairs = in_batch(case.queries, case.labels).join(
        against_queue(case.queries, case.labels, case.queue).hardest(case.qp, case.qn)
    )
    naive = reference.released(case.queries, case.label_list, case.rings, case.qp, case.qn, case.tau, case.weight_list)
    assert_same_loss_and_gradient(supcon(pairs, case.tau, case.weights[case.labels]), naive, case.queries)


@thrifty
@given(cases())
def test_gradient_of_a_similarity_is_eq_4(case: Case) -> None:
    pairs = against_queue(case.queries, case.labels, case.queue).hardest(case.qp, case.qn)
    leaf = pairs.similarity.detach().requires_grad_()
    supcon(pairs._replace(similarity=leaf), case.tau, case.weights[case.labels]).backward()
    expected = torch.zeros_like(leaf)
    for i, label in enumerate(case.label_list):
        columns = [[m for m in range(leaf.shape[1]) if pairs.valid[i, m] and pairs.positive[i, m] == kind]
                   for kind in (True, False)]  # fmt: skip
        attracted, repelled = ([leaf[i, m].item() for m in one] for one in columns)
        both = reference.one_query_gradient(attracted, repelled, case.tau, case.weight_list[label])
        for one, gradient in zip(columns, both, strict=True):
            expected[i, one] = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, expected / len(leaf), rtol=1e-10, atol=1e-12)
    # A query that has a positive pulls and pushes with the same total force.
    assert leaf.grad is not None and leaf.grad.sum(dim=1).abs().max() < 1e-12


def test_hand_made_vectors() -> None:
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    case = make_case(0, classes=2, per_class=2, dim=2, rows=1, entered=0, qp=1, qn=1, tau=0.5)
    keys = torch.tensor([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], dtype=torch.float64)
    case.queue.enqueue(keys, torch.tensor([0, 0, 1, 1]))
    pairs = against_queue(query, torch.tensor([0]), case.queue)
    # All: positives 1 and 0, negatives -1 and .6.
    total = math.exp(2) + 1 + math.exp(-2) + math.exp(1.2)
    assert supcon(pairs, 0.5).item() == pytest.approx(math.log(total) - (2 + 0) / 2, rel=1e-12)
    # Hardest: the positive at a right angle, the negative at .6.
    hard = pairs.hardest(1, 1)
    assert supcon(hard, 0.5).item() == pytest.approx(math.log(1 + math.exp(1.2)), rel=1e-12)
    assert supcon(hard, 0.5, torch.tensor([3.0])).item() == pytest.approx(3 * math.log(1 + math.exp(1.2)), rel=1e-12)


def test_two_equal_views_and_nothing_else_cost_nothing() -> None:
    views = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = supcon(in_batch(views, torch.tensor([4, 4])), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert views.grad is not None and views.grad.abs().max() < 1e-6


def test_a_class_with_one_image_has_its_other_view_as_positive() -> None:
    generator = torch.Generator().manual_seed(3)
    case = make_case(3, classes=3, per_class=2, dim=4, rows=4, entered=0, qp=1, qn=1, tau=0.2)
    labels = torch.tensor([0, 1, 0, 1])  # two images, one of each class, two views
    pairs = in_batch(case.queries, labels).join(against_queue(case.queries, labels, case.queue).hardest(1, 1))
    assert (pairs.positive & pairs.valid).sum(dim=1).tolist() == [1, 1, 1, 1]
    lone = supcon(in_batch(unit((1, 4), generator).requires_grad_(), torch.tensor([0])), 0.2)
    assert lone.item() == 0


@pytest.mark.parametrize(("qp", "qn"), [(1, 2), (0, 0), (None, None)])
def test_no_positive_gives_zero_loss_and_zero_gradient(qp: int | None, qn: int | None) -> None:
    case = make_case(1, classes=3, per_class=2, dim=4, rows=2, entered=0, qp=1, qn=2, tau=0.2)
    labels = torch.tensor([0, 1])
    for fill in (False, True):
        if fill:  # only class 2 has keys: negatives without a positive
            case.queue.enqueue(unit((2, 4), case.generator), torch.tensor([2, 2]))
        queries = case.queries.detach().requires_grad_()
        loss = supcon(against_queue(queries, labels, case.queue).hardest(qp, qn), 0.2, torch.ones(2))
        loss.backward()
        assert loss.item() == 0
        assert queries.grad is not None and (queries.grad == 0).all()


def test_one_query_without_positives_leaves_the_others_alone() -> None:
    case = make_case(2, classes=2, per_class=2, dim=4, rows=2, entered=0, qp=1, qn=1, tau=0.2)
    case.queue.enqueue(unit((2, 4), case.generator), torch.tensor([0, 0]))
    case.labels = torch.tensor([0, 1])
    loss = queue_loss(case, 1, 1)
    loss.backward()
    assert torch.isfinite(loss) and case.queries.grad is not None
    assert (case.queries.grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss_and_half_gradients(dtype: torch.dtype) -> None:
    case = make_case(5, classes=3, per_class=4, dim=8, rows=6, entered=30, qp=2, qn=4, tau=0.05)
    queries = case.queries.detach().to(dtype).requires_grad_()
    pairs = in_batch(queries, case.labels).join(against_queue(queries, case.labels, case.queue).hardest(2, 4))
    assert pairs.similarity.dtype == dtype
    loss = supcon(pairs, case.tau, case.weights[case.labels].float())
    # The same rounded similarities in float64: what is left is float32 arithmetic.
    exact = supcon(pairs._replace(similarity=pairs.similarity.detach().double()), case.tau, case.weights[case.labels])
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert queries.grad is not None and queries.grad.dtype == dtype and torch.isfinite(queries.grad).all()
    logits = torch.randn(4, 3, generator=case.generator).to(dtype)
    assert balanced_softmax(logits, torch.tensor([0, 1, 2, 0]), torch.tensor([9, 3, 1])).dtype == torch.float32


@thrifty
@given(cases(min_rows=2))
def test_the_loss_does_not_depend_on_the_order_of_images_or_keys(case: Case) -> None:
    order = torch.randperm(len(case.labels), generator=case.generator)
    loss = supcon(in_batch(case.queries, case.labels), case.tau, case.weights[case.labels])
    shuffled = case.labels[order]
    again = supcon(in_batch(case.queries[order], shuffled), case.tau, case.weights[shuffled])
    torch.testing.assert_close(loss, again)


def test_pairs_that_are_not_valid_count_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    positive = torch.tensor([[True, False, False, True]]).expand(3, -1)
    valid = torch.tensor([[True, True, False, False]]).expand(3, -1)
    everything = supcon(Pairs(similarity, positive, valid), 0.2)
    kept = supcon(Pairs(similarity[:, :2], positive[:, :2], torch.ones(3, 2, dtype=torch.bool)), 0.2)
    torch.testing.assert_close(everything, kept)


def test_smoothed_balanced_softmax_is_the_cross_entropy_with_the_spread_target():
    logits, labels, counts = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 0]), [70, 20, 9, 1]
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        odds = [n * math.exp(s) for s, n in zip(row, counts, strict=True)]
        for k, odd in enumerate(odds):
            target = 0.1 / 4 + (0.9 if k == label else 0.0)
            total -= target * math.log(odd / sum(odds))
    ours = balanced_softmax(logits, labels, torch.tensor(counts), smoothing=0.1)
    assert ours.item() == pytest.approx(total / 6, rel=1e-12)
