"""The fast path against the naive loops, against the readable composition at every size, and its promises."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.common import calls
from rescom_timm.contrastive import mined
from rescom_timm.contrastive.mined import composed, largest_, mined_supcon, share_of_largest
from rescom_timm.contrastive.queue import ClassBalancedQueue, FifoQueue, Queue, ReversedQueue
from tests.contrastive import reference
from tests.contrastive.cases import Case, cases, make_case, thrifty, unit
from tests.contrastive.test_losses import assert_same_loss_and_gradient
from tests.raises import raises

chunks = st.sampled_from([None, 1, 2, 100])


def fast(case: Case, qp: int | None, qn: int | None, **more: Any) -> Tensor:
    return mined_supcon(case.queries, case.labels, case.queue, qp, qn, case.tau, case.weights[case.labels], **more)


# --- Against the equations --------------------------------------------------------------------------------------


@thrifty
@given(cases(), chunks)
def test_paper_mode_is_eq_5(case: Case, chunk: int | None) -> None:
    naive = reference.paper(case.queries, case.label_list, case.rings, case.qp, case.qn, case.tau, case.weight_list)
    assert_same_loss_and_gradient(fast(case, case.qp, case.qn, chunk=chunk), naive, case.queries)


@thrifty
@given(cases(), st.booleans(), st.booleans(), chunks)
def test_released_mode_is_the_naive_sum(case: Case, all_own: bool, all_others: bool, chunk: int | None) -> None:
    qp, qn = None if all_own else case.qp, None if all_others else case.qn
    naive = reference.released(case.queries, case.label_list, case.rings, qp, qn, case.tau, case.weight_list)
    loss = fast(case, qp, qn, keys=case.queries, key_labels=case.labels, chunk=chunk)
    assert_same_loss_and_gradient(loss, naive, case.queries)


# --- Against the readable composition ---------------------------------------------------------------------------


@thrifty
@given(cases(), st.integers(0, 4), st.integers(0, 4), chunks)
def test_keys_of_other_processes_get_their_gradient(case: Case, before: int, after: int, chunk: int | None) -> None:
    rows = len(case.labels)
    dim, classes = case.queries.shape[1], case.rings.classes
    keys = unit((before + rows + after, dim), case.generator).requires_grad_()
    key_labels = torch.randint(classes, (len(keys),), generator=case.generator)
    weights = case.weights[case.labels]
    arguments = (case.queue, case.qp, case.qn, case.tau, weights)
    simple = composed(case.queries, case.labels, *arguments, keys, key_labels, before)
    loss = fast(case, case.qp, case.qn, keys=keys, key_labels=key_labels, first=before, chunk=chunk)
    for leaf in (case.queries, keys):
        torch.testing.assert_close(loss, simple, rtol=1e-11, atol=1e-12)
        ours, theirs = (torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in (loss, simple))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


SIZES = [(10, 64, 400), (100, 8, 400), (365, 8, 500), (1000, 4, 500), (1000, 8, 500), (1001, 7, 3), (8142, 4, 500)]


@pytest.mark.parametrize(("classes", "per_class", "negatives"), [*SIZES, (8142, 8, 500)])
def test_fast_equals_simple_at_every_size(classes: int, per_class: int, negatives: int) -> None:
    """Two-level selection, groups with a rest, dense and sparse gradients; full and half-filled queues."""
    rows = 6
    for entered in (3 * classes * per_class // 4, 2 * classes * per_class):
        case = make_case(0, classes, per_class, 16, rows, entered=0, qp=1, qn=negatives, tau=0.2)
        keys = unit((entered, 16), case.generator)
        case.queue.enqueue(keys, torch.randint(classes, (entered,), generator=case.generator))
        case.labels = torch.randint(classes, (rows // 2,), generator=case.generator).repeat(2)
        weights = case.weights[case.labels]
        arguments = (case.labels, case.queue, 1, negatives, case.tau, weights)
        simple = composed(case.queries, *arguments, case.queries, case.labels)
        assert_same_loss_and_gradient(
            fast(case, 1, negatives, keys=case.queries, key_labels=case.labels), simple, case.queries
        )


@thrifty
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 3), width=st.integers(1, 200), part=st.floats(0, 1),
    ties=st.booleans(), group=st.integers(2, 5), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_largest_is_topk(
    seed: int, rows: int, width: int, part: float, ties: bool, group: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    number = int(part**3 * width)  # often few of many, where groups are used
    values = torch.randn(rows, width, generator=generator, dtype=dtype)
    if ties:
        values = values.round()
        values[values > 1] = -1e30
    found, index = largest_(values.clone(), number, group)
    expected = values.topk(number, dim=1).values
    assert torch.equal(found.sort(dim=1, descending=True).values, expected)
    assert torch.equal(values.gather(1, index), found)
    assert all(len(set(row)) == number for row in index.tolist())


@pytest.mark.parametrize(("number", "expected"), [(1, [1, 0, 0, 0, 0]), (3, [1, 2 / 3, 2 / 3, 0, 2 / 3]), (5, [1] * 5)])
def test_ties_share_the_last_places(number: int, expected: list[float]) -> None:
    values = torch.tensor([[3.0, 2.0, 2.0, -1e30, 2.0]], dtype=torch.float64)
    before = values.clone()
    assert share_of_largest(values, number).tolist() == [pytest.approx(expected)]
    assert torch.equal(values, before)


def test_equal_keys_at_the_border_give_the_mined_loss() -> None:
    """Which of several equal keys is mined makes no difference to the loss, and none to the gradient."""
    case = make_case(6, classes=4, per_class=5, dim=4, rows=6, entered=0, qp=2, qn=9, tau=0.2)
    case.queue.enqueue(unit((4, 4), case.generator).repeat(5, 1), torch.arange(20) // 5)
    simple = composed(case.queries, case.labels, case.queue, 2, 9, 0.2, case.weights[case.labels])
    assert_same_loss_and_gradient(fast(case, 2, 9), simple, case.queries)


@pytest.mark.parametrize("kind", ["fifo", "reversed"])
def test_other_queues_take_the_readable_path(kind: str) -> None:
    case = make_case(4, classes=3, per_class=2, dim=4, rows=6, entered=0, qp=1, qn=2, tau=0.2)
    queue: Queue = FifoQueue(8, 4) if kind == "fifo" else ReversedQueue(torch.tensor([9, 3, 1]), 9, 4)
    queue.double().enqueue(unit((7, 4), case.generator), torch.arange(7) % 3)
    weights = case.weights[case.labels]
    for keys, key_labels in ((None, None), (case.queries, case.labels)):
        ours = mined_supcon(
            case.queries, case.labels, queue, 1, 2, 0.2, weights, keys=keys, key_labels=key_labels, chunk=2
        )
        theirs = composed(case.queries, case.labels, queue, 1, 2, 0.2, weights, keys, key_labels)
        assert_same_loss_and_gradient(ours, theirs, case.queries)


# --- Edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qp", "qn", "named"),
    [(3, 1, ("3 positive", "Q = 2")), (1, 5, ("5 negative", "(K-1)Q = 4")), (-1, 1, ("-1 positive",))],
)
def test_mining_more_than_the_queue_holds_is_refused(qp: int, qn: int, named: tuple[str, ...]) -> None:
    case = make_case(1, classes=3, per_class=2, dim=4, rows=2, entered=12, qp=1, qn=1, tau=0.2)
    with raises("queue.mined", *named):
        fast(case, qp, qn)


@pytest.mark.parametrize(("qp", "qn"), [(1, 2), (0, 0), (None, None)])
@pytest.mark.parametrize("filled", ["nothing", "negatives"])
def test_no_positive_gives_zero_loss_and_zero_gradient(qp: int | None, qn: int | None, filled: str) -> None:
    case = make_case(1, classes=3, per_class=2, dim=4, rows=2, entered=0, qp=1, qn=2, tau=0.2)
    case.labels = torch.tensor([0, 1])
    if filled == "negatives":
        case.queue.enqueue(unit((2, 4), case.generator), torch.tensor([2, 2]))
    loss = fast(case, qp, qn)
    loss.backward()
    assert loss.item() == 0
    assert case.queries.grad is not None and (case.queries.grad == 0).all()


def test_a_chunk_of_nothing_is_refused() -> None:
    case = make_case(1, classes=3, per_class=2, dim=4, rows=2, entered=12, qp=1, qn=1, tau=0.2)
    for chunk in (0, -1):
        with raises("method.value", "chunk", chunk):
            fast(case, 1, 1, chunk=chunk)


@pytest.mark.parametrize(("limit", "rows"), [(2**28, [6]), (100, [2, 2, 2]), (150, [3, 3]), (7, [1] * 6)])
def test_similarities_are_held_within_the_limit(limit: int, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, classes=12, per_class=4, dim=5, rows=6, entered=90, qp=1, qn=5, tau=0.2)  # 48 keys
    together = fast(case, 1, 5, keys=case.queries, key_labels=case.labels)
    seen: list[int] = []

    def product(bias: Tensor, queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
        seen.append(len(queries))
        return plain(bias, queries, keys, out=out)

    plain = torch.addmm
    monkeypatch.setattr(mined, "SIMILARITIES_AT_ONCE", limit)
    monkeypatch.setattr(torch, "addmm", product)
    torch.testing.assert_close(fast(case, 1, 5, keys=case.queries, key_labels=case.labels), together)
    assert seen == rows


def test_keys_without_labels_have_those_of_the_queries() -> None:
    case = make_case(2, classes=3, per_class=2, dim=4, rows=4, entered=12, qp=1, qn=2, tau=0.2)
    explicit = fast(case, 1, 2, keys=case.queries, key_labels=case.labels)
    assert torch.equal(fast(case, 1, 2, keys=case.queries), explicit) and not torch.equal(fast(case, 1, 2), explicit)


def test_a_tiny_temperature_neither_overflows_nor_vanishes() -> None:
    """Logits reach 10,000 and each query's largest is its own: exp of them, or less one common largest, is inf or 0."""
    case = make_case(3, classes=4, per_class=3, dim=4, rows=6, entered=40, qp=2, qn=3, tau=1e-4)
    weights = case.weights[case.labels]
    simple = composed(case.queries, case.labels, case.queue, 2, 3, case.tau, weights, case.queries, case.labels)
    assert simple.isfinite()
    loss = fast(case, 2, 3, keys=case.queries, key_labels=case.labels)
    assert_same_loss_and_gradient(loss, simple, case.queries)


def test_without_weights_they_are_ones() -> None:
    case = make_case(2, classes=3, per_class=2, dim=4, rows=4, entered=12, qp=1, qn=2, tau=0.2)
    plain = mined_supcon(case.queries, case.labels, case.queue, 1, 2, 0.2)
    case.weights = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(plain, fast(case, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss_and_half_gradients(dtype: torch.dtype) -> None:
    case = make_case(5, classes=3, per_class=4, dim=8, rows=6, entered=30, qp=2, qn=4, tau=0.05)
    queries = case.queries.detach().to(dtype).requires_grad_()
    arguments = (case.labels, case.queue, 2, 4, 0.05, case.weights[case.labels])
    loss = mined_supcon(queries, *arguments, keys=queries, key_labels=case.labels)
    loss.backward()
    exact = queries.detach().double().requires_grad_()
    composed(exact, *arguments, exact, case.labels).backward()
    assert loss.dtype == torch.float32
    assert queries.grad is not None and exact.grad is not None and queries.grad.dtype == dtype
    torch.testing.assert_close(queries.grad.double(), exact.grad, rtol=2e-2, atol=2e-2)


def test_autocast_does_not_round_the_similarities() -> None:
    case = make_case(5, classes=3, per_class=4, dim=8, rows=6, entered=30, qp=2, qn=4, tau=0.05)
    queries, weights = case.queries.detach().float(), case.weights[case.labels].float()
    case.queue.float()
    plain = mined_supcon(queries, case.labels, case.queue, 2, 4, 0.05, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mined_supcon(queries, case.labels, case.queue, 2, 4, 0.05, weights)
    assert torch.equal(plain, cast)


# --- Promises ---------------------------------------------------------------------------------------------------


def test_enqueue_before_backward_is_harmless() -> None:
    case = make_case(0, classes=2, per_class=2, dim=3, rows=4, entered=8, qp=1, qn=1, tau=0.2)
    expected = torch.autograd.grad(fast(case, 1, 1), case.queries)[0]
    loss = fast(case, 1, 1)
    case.queue.enqueue(case.queries, case.labels)
    loss.backward()
    torch.testing.assert_close(case.queries.grad, expected)


def test_only_gradients_of_embeddings_are_kept_for_backward() -> None:
    case = make_case(0, classes=50, per_class=4, dim=3, rows=4, entered=400, qp=1, qn=20, tau=0.2)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = fast(case, 1, 20, keys=case.queries, key_labels=case.labels)
    assert kept == [(4, 3), (4, 3)]
    (gradient,) = torch.autograd.grad(loss, case.queries, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):  # once differentiable
        gradient.sum().backward()


def test_the_queue_is_only_read() -> None:
    case = make_case(0, classes=5, per_class=4, dim=3, rows=4, entered=9, qp=1, qn=3, tau=0.2)
    before = {name: tensor.clone() for name, tensor in case.queue.state_dict().items()}
    queries = case.queries.detach().clone()
    fast(case, 1, 3, keys=case.queries, key_labels=case.labels).backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in case.queue.state_dict().items())
    assert torch.equal(queries, case.queries)


def test_no_synchronisation_and_calls_that_do_not_grow_with_the_batch() -> None:
    queue = ClassBalancedQueue(1000, 4, 8)
    numbers = []
    for views in (16, 128):
        z = unit((views, 8), torch.Generator().manual_seed(0)).float().requires_grad_()
        labels = torch.arange(views) % 1000

        def step(z: Tensor = z, labels: Tensor = labels) -> None:
            mined_supcon(z, labels, queue, 1, 300, 0.2, keys=z, key_labels=labels).backward()
            queue.enqueue(z, labels)

        numbers.append(calls(step, "cpu"))
    assert numbers[0] == numbers[1]
    assert numbers[0][0] <= 150 and numbers[0][1] == 0
