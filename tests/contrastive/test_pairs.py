import pytest
import torch
from hypothesis import given

from rescom_timm.contrastive.pairs import Pairs, against_queue, in_batch
from rescom_timm.contrastive.queue import FifoQueue
from rescom_timm.contrastive.supcon import supcon
from tests.contrastive.cases import Case, cases, make_case, thrifty, unit
from tests.contrastive.reference import mine
from tests.raises import raises


@thrifty
@given(cases())
def test_mining_chooses_what_sorting_chooses(case: Case) -> None:
    pairs = against_queue(case.queries, case.labels, case.queue).hardest(case.qp, case.qn)
    assert pairs.similarity.shape == (len(case.labels), case.qp + case.qn)
    for i, label in enumerate(case.label_list):
        positives, negatives = mine(case.queries[i], label, case.rings, case.qp, case.qn)
        for kind, expected in ((True, positives), (False, negatives)):
            chosen = pairs.similarity[i][pairs.valid[i] & (pairs.positive[i] == kind)]
            wanted = torch.tensor([s.item() for s in expected], dtype=torch.float64)
            torch.testing.assert_close(chosen.detach().sort().values, wanted.sort().values)


@thrifty
@given(cases())
def test_an_unfilled_slot_is_never_a_valid_pair(case: Case) -> None:
    pairs = against_queue(case.queries, case.labels, case.queue)
    filled = [sum(len(case.rings.of(k)) for k in range(case.rings.classes))] * len(case.labels)
    assert pairs.valid.sum(dim=1).tolist() == filled


@pytest.mark.parametrize(("qp", "qn"), [(7, 1), (1, 7), (-1, 1), (1, -1)])
def test_mining_more_than_there_is_or_less_than_nothing_is_refused(qp: int, qn: int) -> None:
    pairs = Pairs(torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool))
    with raises("queue.mined", -1 if -1 in (qp, qn) else 7, 6):
        pairs.hardest(qp, qn)


def test_mining_nothing_returns_the_pairs_themselves() -> None:
    pairs = in_batch(torch.eye(3), torch.tensor([0, 0, 1]))
    assert pairs.hardest(None, None) is pairs


def test_a_view_is_no_pair_of_itself_and_gathered_keys_know_where_it_stands() -> None:
    labels = torch.tensor([0, 1])
    pairs = in_batch(torch.eye(2), labels)
    assert pairs.valid.tolist() == [[False, True], [True, False]]
    keys, key_labels = torch.eye(2).repeat(2, 1), torch.tensor([1, 0, 0, 1])
    pairs = in_batch(torch.eye(2), labels, keys, key_labels, first=2)
    assert pairs.valid.tolist() == [[True, True, False, True], [True, True, True, False]]
    assert pairs.positive.tolist() == [[False, True, True, False], [True, False, False, True]]


def test_gradient_flows_through_both_sides_of_the_batch_and_not_into_the_queue() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = unit((4, 3), generator).requires_grad_()
    queries = unit((2, 3), generator).requires_grad_()
    supcon(in_batch(queries, torch.tensor([0, 1]), keys, torch.tensor([0, 1, 0, 1])), 0.2).backward()
    assert keys.grad is not None and keys.grad[2:].abs().min() > 0
    case = make_case(0, classes=2, per_class=2, dim=3, rows=2, entered=8, qp=1, qn=1, tau=0.2)
    supcon(against_queue(case.queries, case.labels, case.queue), 0.2).backward()
    assert not case.queue.keys.requires_grad and case.queue.keys.grad is None


def test_enqueue_before_backward_is_harmless() -> None:
    case = make_case(0, classes=2, per_class=2, dim=3, rows=4, entered=8, qp=1, qn=1, tau=0.2)

    def gradient(write_first: bool) -> torch.Tensor:
        queries = case.queries.detach().requires_grad_()
        loss = supcon(against_queue(queries, case.labels, case.queue).hardest(1, 1), 0.2)
        if write_first:
            case.queue.enqueue(queries, case.labels)
        loss.backward()
        assert queries.grad is not None
        return queries.grad

    torch.testing.assert_close(gradient(False), gradient(True))


def test_pairs_of_a_fifo_queue_follow_the_labels_that_entered() -> None:
    queue = FifoQueue(4, 2)
    queue.enqueue(torch.eye(2).repeat(2, 1)[:3], torch.tensor([5, 6, 5]))
    pairs = against_queue(torch.tensor([[1.0, 0.0]]), torch.tensor([5]), queue)
    assert pairs.similarity.tolist() == [[1, 0, 1, 0]]
    assert pairs.positive[0, :3].tolist() == [True, False, True]
    assert pairs.valid.tolist() == [[True, True, True, False]]
