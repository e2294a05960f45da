"""A run that is killed, at any moment, and resumed is the run that never was: bit for bit, with dropout in the net."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from rescom_timm.engine import checkpoint
from tests.engine.child import Launch, differences, figures, last, recipe, run

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
TWO = {"method__mode": "released", "method__gather_pairs": True, "train__accumulate": 2, "train__epochs": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of some changes of the recipe, made once."""
    made = {}

    def get(ranks, **changes):
        key = json.dumps([ranks, changes], sort_keys=True)
        if key not in made:
            made[key] = recipe(tmp_path_factory.mktemp("whole"), **changes)
            run(made[key], ranks)
        return made[key]

    return get


def assert_same(one, other):
    assert differences(last(one), last(other)) == []
    assert figures(one) == figures(other)
    assert len(figures(one)) == 2 * one["train"]["epochs"]  # of training and of evaluation, each epoch once


def survive(tree, faults, ranks=1):
    """Start, suffer each fault, resume; at last end well. Returns the exit codes."""
    codes = []
    for fault in faults:
        launch = Launch(tree, ranks, resume=True, fault=fault)
        codes.append(launch.wait())
        assert -9 in codes[-1] or 1 not in codes[-1], launch.text
    run(tree, ranks, resume=True)
    return codes


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_steps_and_while_a_checkpoint_is_written(tmp_path, whole, seed):
    dice = random.Random(seed)
    tree = recipe(tmp_path, train__epochs=2)
    codes = survive(
        tree,
        [
            ("signal_at_pass", KILL, dice.randint(1, 11)),  # before anything was saved
            ("at_disk_operation", dice.randint(1, 12), "kill"),  # in the first checkpoint
            ("signal_at_pass", TERM, dice.randint(3, 8)),
            ("at_disk_operation", dice.randint(4, 15), "kill"),
            ("signal_at_pass", INT, dice.randint(1, 8)),
            ("signal_at_pass", KILL, dice.randint(1, 8)),
        ],
    )
    assert codes == [[-9], [-9], [143], [-9], [143], [-9]]
    assert_same(tree, whole(1, train__epochs=2))


def test_with_loader_workers_and_accumulated_gradients(tmp_path, whole):
    """Signals go to the whole group, as torchrun and a terminal send them: the workers must not die of them."""
    changes = {"train__epochs": 2, "train__accumulate": 2, "optimizer__name": "adamw", "optimizer__lr": 0.01}
    tree = recipe(tmp_path, speed__workers=2, **changes)
    codes = survive(tree, [("signal_at_pass", TERM, 9), ("signal_at_pass", INT, 20), ("signal_at_pass", KILL, 5)])
    assert codes == [[143], [143], [-9]]
    assert_same(tree, whole(1, speed__workers=0, **changes))


def test_two_processes(tmp_path, whole):
    """Each has dropout and BatchNorm statistics of its own; a signal to one stops both at the same step."""
    tree = recipe(tmp_path, **TWO)
    faults = [("signal_at_pass", TERM, 7, 1), ("at_disk_operation", 11, "kill"), ("signal_at_pass", KILL, 9, 1)]
    codes = survive(tree, faults, ranks=2)
    assert codes[0] == [143, 143] and -9 in codes[1] and -9 in codes[2]
    assert_same(tree, whole(2, **TWO))


def test_mixed_batches_averaged_weights_and_a_rate_by_steps(tmp_path, whole):
    """The mixing draws from the epoch, the pass and the process alone; of the average each process has BatchNorm
    statistics of its own."""
    changes = {
        "method": {"name": "balanced_softmax", "views": 2}, "mix": {"mixup": 0.4, "cutmix": 1.0}, "train__epochs": 2,
        "train__accumulate": 2, "train__ema": {"decay": 0.9}, "schedule__by": "update",
    }  # fmt: skip
    tree = recipe(tmp_path, **changes)
    assert survive(tree, [("signal_at_pass", TERM, 9)], ranks=2) == [[143, 143]]
    assert_same(tree, whole(2, **changes))


def test_stopped_at_the_last_step_of_an_epoch(tmp_path, whole):
    """The epoch is closed and evaluated before it is saved, so that its lines and the best score are not lost."""
    tree = recipe(tmp_path, train__epochs=2)
    assert survive(tree, [("signal_at_pass", TERM, 11)]) == [[143]]
    assert_same(tree, whole(1, train__epochs=2))


def test_stopped_in_an_epoch_of_one_step(tmp_path):
    """Where an epoch has fewer steps than the host lags behind, the signal is heeded all the same."""
    changes = {"train__batch_size": 256, "data__validation": "none", "train__epochs": 4}
    tree = recipe(tmp_path / "a", **changes)
    assert survive(tree, [("signal_at_pass", TERM, 2)]) == [[143]]
    other = recipe(tmp_path / "b", **changes)
    run(other)
    assert_same(tree, other)


def damage(tree):
    """Flip a byte, cut off or remove a file of the newest checkpoint, in turn; returns its name."""
    newest = checkpoint.listed(Path(tree["output"]) / "run" / "checkpoints")[-1]
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return newest.name


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, whole):
    tree = recipe(tmp_path, train__epochs=2, checkpoint__keep=1)
    Launch(tree, fault=("signal_at_pass", TERM, 17)).wait()
    name = damage(tree)
    # Stopped before the damaged step: the whole checkpoint must be kept and the damaged one not counted among the last.
    launch = Launch(tree, resume=True, fault=("signal_at_pass", TERM, 1))
    assert launch.wait() == [143]
    assert any(name in line and "state.safetensors" in line for line in launch.text.splitlines())
    assert [path.name for path in checkpoint.listed(tmp_path / "run" / "checkpoints")][-1] < name
    run(tree, resume=True)
    assert_same(tree, whole(1, train__epochs=2))


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, whole):
    tree = recipe(tmp_path, train__epochs=2)
    launch = Launch(tree, fault=("at_disk_operation", 15, "full"))  # in the second checkpoint
    assert launch.wait() == [1]
    said = (
        "step-00000022 could not be written: [Errno 28] No space left on device. Whole checkpoints there: step-00000011"
    )
    assert said in launch.text
    assert "Traceback" not in launch.text
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000011"]
    checkpoint.load(folder / "step-00000011")
    run(tree, resume=True)
    assert_same(tree, whole(1, train__epochs=2))


def test_resume_takes_the_last_run_of_that_name(tmp_path, whole):
    run(recipe(tmp_path, train__epochs=1, schedule__warmup_epochs=0))
    tree = recipe(tmp_path, train__epochs=2)
    assert Launch(tree, fault=("signal_at_pass", KILL, 15)).wait() == [-9]
    assert (tmp_path / "run-2").exists()
    launch = run(tree, resume=True)
    assert f"run folder: {tmp_path / 'run-2'}, resumed from step-00000011" in launch.text
    assert not (tmp_path / "run-3").exists()


def test_another_recipe_is_refused_by_its_keys_and_another_speed_is_not(tmp_path):
    tree = recipe(tmp_path, train__epochs=2)
    Launch(tree, fault=("signal_at_pass", TERM, 5)).wait()
    changed = recipe(tmp_path, train__epochs=2, optimizer__lr=0.2, method__queue__per_class=8)
    launch = Launch(changed, resume=True)
    assert launch.wait() == [1]
    assert "optimizer.lr (0.1 then, 0.2 now)" in launch.text
    assert "method.queue.per_class (4 then, 8 now)" in launch.text
    assert "RecipeError" in launch.text
    free = {"speed__workers": 1, "evaluation__batch_size": 100, "checkpoint__keep": 5, "train__nonfinite": "skip"}
    run(recipe(tmp_path, train__epochs=2, **free), resume=True)


def test_another_number_of_processes_goes_on_and_says_so(tmp_path):
    tree = recipe(tmp_path, train__epochs=2)
    Launch(tree, ranks=2, fault=("signal_at_pass", TERM, 5)).wait()
    launch = run(tree, ranks=1, resume=True)
    assert "was saved by 2 processes and is resumed by 1: batches, learning rate and augmentations stay" in launch.text
    assert last(tree)[1]["progress"]["step"] == 22
    assert len(figures(tree)) == 4


def test_processes_that_see_different_checkpoints_stop(tmp_path):
    """Two machines without a shared disk: the second would train on from nothing."""
    tree = recipe(tmp_path, train__epochs=2)
    Launch(tree, ranks=2, fault=("signal_at_pass", TERM, 5)).wait()
    launch = Launch(tree, ranks=2, resume=True, fault=("no_shared_disk",))
    assert launch.wait() == [1, 1]
    assert "the processes see different checkpoints" in launch.text and "disk that all machines share" in launch.text


# ------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_every_file_operation_of_a_checkpoint(tmp_path, whole, ranks):
    changes = {"train__epochs": 2, "train__batch_size": 64, "checkpoint__keep": 1}
    reference = whole(ranks, **changes)
    n, ended = 0, False
    while not ended:
        n += 1
        tree = recipe(tmp_path / str(n), **changes)
        ended = Launch(tree, ranks, fault=("at_disk_operation", n, "kill")).wait() == [0] * ranks
        run(tree, ranks, resume=True)
        assert differences(last(tree), last(reference)) == [], f"killed before file operation {n}"
    assert n > 25  # two checkpoints and the removal of one


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers", "accumulate"), [(1, 0, 1), (1, 2, 2), (2, 0, 2), (2, 2, 1)])
def test_killed_by_the_clock(tmp_path, whole, ranks, workers, accumulate):
    """Until it ends, at most thirty times, with a signal at a moment that knows nothing of the program."""
    changes = {"train__epochs": 6, "train__accumulate": accumulate}
    dice = random.Random(ranks + workers)
    tree = recipe(tmp_path, speed__workers=workers, **changes)
    killed, ended = 0, False
    while killed < 30 and not ended:
        launch = Launch(tree, ranks, resume=True, fault=("slow", 0.6))
        time.sleep(dice.uniform(3, 9))
        launch.signal(dice.choice([KILL, TERM, INT]))
        codes = launch.wait()
        assert set(codes) <= {0, 143, -9, 1, -15, -2}, launch.text
        ended = codes == [0] * ranks
        killed += not ended
    run(tree, ranks, resume=True)
    assert killed > 5
    assert_same(tree, whole(ranks, speed__workers=0, **changes))
