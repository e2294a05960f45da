"""The estimate of a dry run: what is counted, what is timed, what is estimated."""

from types import SimpleNamespace

import torch

from rescom_timm.config.loading import load_dict
from rescom_timm.engine import dry_run as module
from rescom_timm.engine import trainer
from rescom_timm.engine.dry_run import Estimate, _Clock, dry_run
from rescom_timm.engine.step import TrainingStep
from tests.engine.child import recipe
from tests.raises import raises


def clock(monkeypatch, ends, workers=0, prefetch=None, warm_up=1, limit=1e9):
    """A clock over passes that end at these seconds, as far as it asks for them; and how many those are."""
    now = iter([0.0, *ends])
    monkeypatch.setattr(module.time, "monotonic", lambda: at[0])
    at = [next(now)]
    found = _Clock(SimpleNamespace(num_workers=workers, prefetch_factor=prefetch), warm_up, limit)
    for passes, end in enumerate(now, start=1):
        at[0] = end
        last = found.is_last()
        found.tick()
        if last:
            return found, passes
    raise AssertionError("it asks for more passes")


def test_the_first_pass_and_an_interrupted_one_do_not_count(monkeypatch):
    found, passes = clock(monkeypatch, [30, 31, 131, 132, 133])
    assert passes == 4 and found.seconds() == 1


def test_the_head_start_of_workers_does_not_hide_that_they_are_slow(monkeypatch):
    """Four workers take 8 s a batch each, a step 1 s: 8 batches are ready at the start, then four come every 8 s."""
    ends = [8, 9, 10, 11, 12, 13, 14, 15]
    for start in range(24, 80, 8):
        ends += [start, start + 1, start + 2, start + 3]
    found, passes = clock(monkeypatch, ends, workers=4, prefetch=2)
    assert passes == 1 + 8 + 3 * 4 and found.seconds() == 2


def test_a_slow_machine_times_two_passes(monkeypatch):
    found, passes = clock(monkeypatch, [100, 190], workers=4, prefetch=4, limit=15)
    assert passes == 2 and found.seconds() == 90


def test_steps_and_evaluations_are_those_of_the_run(alone, tmp_path):
    chosen = load_dict(recipe(tmp_path, train__epochs=3, evaluation__every=2, train__accumulate=2))
    estimate = dry_run(chosen, seconds=0)
    assert not any(tmp_path.iterdir())
    splits, evaluate = [], trainer.evaluate
    alone.setattr(trainer, "evaluate", lambda *a, **o: splits.append(a[2]) or evaluate(*a, **o))
    alone.setattr(trainer.Trainer, "close", lambda self: steps.append(self.progress.step))
    steps = []
    trainer.train(chosen)
    assert steps == [estimate.steps] and len(estimate.splits) == 2
    assert len(splits) in (2 * estimate.evaluations, 2 * estimate.evaluations - 2), "the last may be the best"
    assert estimate.step_seconds > 0 and estimate.evaluation_seconds > 0 and estimate.memory > 10**8


def test_other_numbers_of_processes_share_a_step():
    estimate = Estimate("", "a CPU", 2, 12, 2, 1800, 2.0, 1, ("test",), 0.0, 0.0, 2**30)
    assert estimate.seconds_on(1) == 7200 and estimate.seconds_on(2) == estimate.seconds == 3600
    rows = [line.split(maxsplit=2) for line in estimate.lines() if line.startswith(" ")]
    assert [(int(n), int(images)) for n, images, _ in rows] == [(1, 12), (2, 6)], "4 x 2 passes do not divide 12"
    assert ["measured" in text for *_, text in rows] == [False, True]


def test_a_loss_that_is_not_finite(alone, tmp_path):
    broken = {"loss": torch.tensor(float("nan"))}
    alone.setattr(TrainingStep, "forward_backward", lambda self, batch, last: dict(broken))
    with raises("train.nonfinite"):
        dry_run(load_dict(recipe(tmp_path)))
