import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from rescom_timm.contrastive.pairs import against_queue, in_batch
from rescom_timm.contrastive.queue import ClassBalancedQueue, FifoQueue, Queue, ReversedQueue
from rescom_timm.contrastive.supcon import supcon
from rescom_timm.distributed import gather, processes
from tests.contrastive.cases import make_case, thrifty, unit
from tests.contrastive.reference import Rings
from tests.raises import raises


def numbered(labels: list[int], first: int = 0) -> torch.Tensor:
    """Keys of width 1 that say when they entered."""
    return torch.arange(first, first + len(labels), dtype=torch.float32)[:, None]


def same_state(one: Queue, other: Queue) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- Rings ------------------------------------------------------------------------------------------------------


@thrifty
@given(
    classes=st.integers(1, 4),
    per_class=st.integers(1, 4),
    batches=st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=4),
)
def test_rings_are_those_of_one_by_one_entry(classes: int, per_class: int, batches: list[list[int]]) -> None:
    queue, rings, entered = ClassBalancedQueue(classes, per_class, 1), Rings(classes, per_class), 0
    for batch in batches:  # often more keys of a class than Q
        labels = [label % classes for label in batch]
        queue.enqueue(numbered(labels, entered), torch.tensor(labels, dtype=torch.long))
        rings.enqueue(numbered(labels, entered), labels)
        entered += len(labels)
    slots = [key for ring in rings.slots for key in ring]
    assert queue.valid.tolist() == [key is not None for key in slots]
    assert [key for key, ok in zip(queue.keys.flatten().tolist(), queue.valid, strict=True) if ok] == [
        key.item() for key in slots if key is not None
    ]
    assert queue.pointer.tolist() == [number % per_class for number in rings.entered]
    assert queue.labels.tolist() == [k for k in range(classes) for _ in range(per_class)]


def test_more_keys_of_a_class_than_slots_leave_the_last() -> None:
    queue = ClassBalancedQueue(2, 3, 1)
    queue.enqueue(numbered([1] * 8), torch.ones(8, dtype=torch.long))
    assert queue.keys.view(2, 3).tolist() == [[0, 0, 0], [6, 7, 5]]  # ring order: slot of key t is t mod 3
    assert queue.valid.tolist() == [False] * 3 + [True] * 3
    queue.enqueue(numbered([1], 8), torch.tensor([1]))
    assert queue.keys.view(2, 3)[1].tolist() == [6, 7, 8]


@thrifty
@given(batches=st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=5), size=st.integers(1, 6))
def test_fifo_keeps_the_most_recent_keys_with_their_labels(batches: list[list[int]], size: int) -> None:
    queue = FifoQueue(size, 1)
    history: list[int] = []
    for batch in batches:
        queue.enqueue(numbered(batch, len(history)), torch.tensor(batch, dtype=torch.long))
        history += batch
    recent = {t: label for t, label in enumerate(history) if t >= len(history) - size}
    held = zip(queue.keys.flatten().tolist(), queue.labels.tolist(), queue.valid.tolist(), strict=True)
    assert {int(key): label for key, label, valid in held if valid} == recent


def test_reversed_queue_gives_rare_classes_the_slots_of_the_frequent() -> None:
    queue = ReversedQueue(torch.tensor([100, 10, 50]), 160, 2)
    assert queue.ring_size.tolist() == [10, 100, 50]
    assert queue.labels.bincount().tolist() == [10, 100, 50]
    queue.enqueue(torch.ones(30, 2), torch.zeros(30, dtype=torch.long))
    assert queue.valid.nonzero().flatten().tolist() == list(range(10))
    tail = ReversedQueue(torch.tensor([5000, 3, 1]), 20, 2)
    assert tail.ring_size.min() == 1 and tail.ring_size[2] > tail.ring_size[0]


@thrifty
@given(counts=st.lists(st.integers(1, 2000), min_size=1, max_size=30), room=st.integers(0, 4000))
def test_reversed_queue_is_about_as_large_as_asked_for(counts: list[int], room: int) -> None:
    size = len(counts) + room
    queue = ReversedQueue(torch.tensor(counts), size, 1)
    assert abs(len(queue.keys) - size) <= len(counts)
    shares = queue.ring_size[torch.tensor(counts).argsort(descending=True, stable=True)]
    assert queue.ring_size.min() >= 1 and shares.numel() == len(counts)
    by_count: dict[int, list[int]] = {}
    for count, slots in zip(counts, queue.ring_size.tolist(), strict=True):
        by_count.setdefault(count, []).append(slots)
    ordered = [by_count[count] for count in sorted(by_count)]
    assert all(min(rarer) >= max(commoner) for rarer, commoner in itertools.pairwise(ordered))


def test_keys_enter_detached_and_in_the_type_of_the_queue() -> None:
    queue = ClassBalancedQueue(2, 2, 3)
    keys = torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)
    queue.enqueue(keys, torch.tensor([1]))
    assert not queue.keys.requires_grad and queue.keys.dtype == torch.float32
    assert queue.keys.view(2, 2, 3)[1, 0].tolist() == [1, 1, 1]


def test_held_keys_wait_and_enter_in_order_with_the_next() -> None:
    parts = [([0, 1, 0], 0), ([1, 1], 3), ([2, 0], 5)]
    held, whole = ClassBalancedQueue(3, 2, 1), ClassBalancedQueue(3, 2, 1)
    empty = ClassBalancedQueue(3, 2, 1)
    for labels, first in parts:
        held.holding = labels != [2, 0]
        held.enqueue(numbered(labels, first), torch.tensor(labels))
        assert same_state(held, empty) == held.holding
    whole.enqueue(numbered([0] * 7), torch.tensor([label for labels, _ in parts for label in labels]))
    assert same_state(held, whole)
    for queue in (held, whole):
        queue.enqueue(numbered([2]), torch.tensor([2]))
    assert held.keys[4:].flatten().tolist() == [5, 0] and same_state(held, whole)  # nothing enters twice


def test_a_queue_has_no_weights_and_little_state() -> None:
    queue = ClassBalancedQueue(100, 8, 128)
    assert not list(queue.parameters())
    state = sum(tensor.numel() * tensor.element_size() for tensor in queue.state_dict().values())
    assert state <= 1.05 * 100 * 8 * 128 * 4


def test_impossible_queues_and_keys_are_refused() -> None:
    for classes, per_class, dim in ((0, 4, 8), (4, 0, 8), (4, 4, 0)):
        with raises("queue.size"):
            ClassBalancedQueue(classes, per_class, dim)
    with raises("queue.size", 3):
        ReversedQueue(torch.tensor([5, 4, 3]), 2, 8)
    queue = ClassBalancedQueue(4, 4, 8)
    for keys, labels in ((torch.ones(2, 7), torch.ones(2)), (torch.ones(2, 8), torch.ones(3)), (torch.ones(8), [1])):
        with raises("queue.shape", 8):
            queue.enqueue(keys, torch.as_tensor(labels, dtype=torch.long))


# --- State ------------------------------------------------------------------------------------------------------


def every_kind() -> list[Queue]:
    return [ClassBalancedQueue(3, 2, 4), FifoQueue(5, 4), ReversedQueue(torch.tensor([9, 3, 1]), 12, 4)]


@pytest.mark.parametrize("kind", range(3))
def test_a_restored_queue_goes_on_as_the_saved_one(kind: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    saved, restored = every_kind()[kind], every_kind()[kind]
    saved.enqueue(unit((7, 4), generator), torch.arange(7) % 3)
    torch.save(saved.state_dict(), tmp_path / "queue.pt")
    restored.load_state_dict(torch.load(tmp_path / "queue.pt"))
    assert same_state(saved, restored)
    more = unit((4, 4), generator)
    for queue in (saved, restored):
        queue.enqueue(more, torch.tensor([2, 0, 2, 1]))
    assert same_state(saved, restored)


@pytest.mark.parametrize("other", [(3, 3, 4), (4, 2, 4), (3, 2, 5), (6, 1, 4)])
def test_a_queue_of_another_shape_says_so(other: tuple[int, int, int]) -> None:
    with raises("queue.saved"):
        ClassBalancedQueue(3, 2, 4).load_state_dict(ClassBalancedQueue(*other).state_dict())


def test_a_reversed_queue_of_other_counts_says_so() -> None:
    saved = ReversedQueue(torch.tensor([9, 3, 1]), 13, 4)
    other = ReversedQueue(torch.tensor([1, 3, 9]), 13, 4)
    assert saved.keys.shape == other.keys.shape
    with raises("queue.saved", "ring_size"):
        other.load_state_dict(saved.state_dict())


# --- Processes --------------------------------------------------------------------------------------------------

CLASSES, PER_CLASS, DIM, ROWS, WORLD = 3, 2, 5, 4, 2


def one_step(queue: Queue, views: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A step in released mode with in-batch pairs from all processes; returns the gradient of this process's loss."""
    views = views.clone().requires_grad_()
    rank, _ = processes()
    pairs = in_batch(views, labels, gather(views), gather(labels), first=rank * len(views))
    weights = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)[labels]
    supcon(pairs.join(against_queue(views, labels, queue).hardest(1, 2)), 0.2, weights).backward()
    queue.enqueue(gather(views.detach()), gather(labels))
    assert views.grad is not None
    return views.grad


def global_batch() -> tuple[Queue, torch.Tensor, torch.Tensor]:
    case = make_case(7, CLASSES, PER_CLASS, DIM, WORLD * ROWS, entered=5, qp=1, qn=2, tau=0.2)
    return case.queue, case.queries.detach(), case.labels


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    queue, views, labels = global_batch()
    gradient = one_step(queue, views.chunk(WORLD)[rank], labels.chunk(WORLD)[rank])
    torch.save({"gradient": gradient, "queue": queue.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    queue, views, labels = global_batch()
    alone = one_step(queue, views, labels)
    # Each rank's loss is the mean over its own queries; their average is the loss of the whole batch.
    together = torch.cat([rank["gradient"] for rank in ranks]) / WORLD
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    for rank in ranks:
        assert all(torch.equal(rank["queue"][name], tensor) for name, tensor in queue.state_dict().items())


def test_alone_gather_is_the_tensor_itself() -> None:
    rows = torch.ones(2, 3)
    assert gather(rows) is rows and processes() == (0, 1)
