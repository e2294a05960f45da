"""Processes that are killed, lost or asked to stop, folders that move, clocks that jump, disks that are slow."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from rescom_timm.engine import checkpoint, errors, run_folder
from rescom_timm.engine.errors import CheckpointError, MachineError, Stopped, with_advice, worker_was_lost
from rescom_timm.engine.launch import STARTED
from rescom_timm.engine.run_folder import OWNER, locked
from rescom_timm.engine.trainer import Trainer
from tests.engine.child import Launch, differences, figures, last, recipe, run
from tests.raises import raises

ROOT = Path(__file__).parents[2]
KILL, TERM = signal.SIGKILL, signal.SIGTERM
EPOCHS = {"train__epochs": 2, "train__batch_size": 64}


@pytest.fixture
def whole(alone, tmp_path):
    """The run that nothing happens to."""
    tree = recipe(tmp_path / "whole", **EPOCHS)
    train_recipe(load_dict(tree))
    return tree


def assert_same(tree, whole):
    assert differences(last(tree), last(whole)) == [] and figures(tree) == figures(whole)


def at_epoch(monkeypatch, n, act):
    """act(trainer) when epoch n has ended, before its evaluation."""
    evaluate = Trainer._evaluate

    def acting(self, bar):
        if self.progress.epoch == n:
            act(self)
        evaluate(self, bar)

    monkeypatch.setattr(Trainer, "_evaluate", acting)


# -------------------------------------------------------------------------------------------------- folders that move


def test_a_run_that_is_moved_while_it_trains_says_so_and_goes_on_where_it_is(alone, tmp_path, whole):
    tree = recipe(tmp_path / "a", **EPOCHS, track={"log_with": []})  # TensorBoard's own thread fails when it likes
    place, moved = tmp_path / "a/run", tmp_path / "b/run"
    moved.parent.mkdir()
    with alone.context() as patch:
        at_epoch(patch, 2, lambda trainer: place.rename(moved))
        with raises("file.failed", "moved or removed", "--resume", kind=CheckpointError):
            train_recipe(load_dict(tree))
    train_recipe(load_dict(tree), resume=moved)
    assert_same({**tree, "output": str(moved.parent)}, whole)


def test_a_copied_run_goes_on_by_itself_and_the_first_is_not_touched(alone, tmp_path, whole):
    tree = recipe(tmp_path / "a", **EPOCHS)
    with alone.context() as patch:
        at_epoch(patch, 1, lambda trainer: os.kill(os.getpid(), TERM))
        with locked_copy(tmp_path / "a/run", tmp_path / "b/run", patch), pytest.raises(Stopped):
            train_recipe(load_dict(tree))
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "a").rglob("*"))]
    train_recipe(load_dict(tree), resume=tmp_path / "b/run")
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "a").rglob("*"))] == before
    assert_same({**tree, "output": str(tmp_path / "b")}, whole)


class locked_copy:
    """The run is copied while it is trained: with its lock and the name of its owner, who lives."""

    def __init__(self, place, to, patch):
        self.place, self.to, self.patch = place, to, patch

    def __enter__(self):
        save = Trainer.save

        def saved(trainer):
            save(trainer)
            if not self.to.exists():
                shutil.copytree(self.place, self.to)

        self.patch.setattr(Trainer, "save", saved)

    def __exit__(self, *_):
        assert (self.to / OWNER).is_file()


# --------------------------------------------------------------------------------------------------- clocks and disks


def test_a_clock_that_jumps_changes_nothing(alone, tmp_path, whole):
    jumps = iter([-3e7, 3e7, -1e9] * 10_000)
    now = time.time
    tree = recipe(tmp_path / "a", **EPOCHS)
    with alone.context() as patch:
        patch.setattr(time, "time", lambda: now() + next(jumps))
        patch.setattr(time, "strftime", lambda form, *_: "1970-01-01")
        at_epoch(patch, 1, lambda trainer: os.kill(os.getpid(), TERM))
        with pytest.raises(Stopped):
            train_recipe(load_dict(tree))
    train_recipe(load_dict(tree), resume=True)
    assert_same(tree, whole)
    told = [json.loads(line) for line in (tmp_path / "a/run/metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in told if "seconds" in line]
    assert 0 < seconds[0] <= seconds[-1] < 600


def test_a_folder_is_held_though_the_clock_of_its_owner_jumped(tmp_path, monkeypatch):
    """Since the boot moved with the clock, the owner's start is another by the hour, and its number may be anyone's."""
    monkeypatch.setattr(run_folder, "PATIENCE", 0.3)
    with locked(tmp_path):
        owner = json.loads((tmp_path / OWNER).read_text())
        (tmp_path / OWNER).write_text(json.dumps(owner | {"created": owner["created"] - 3600}))
        with raises("run.locked", f"process {os.getpid()} "), locked(tmp_path):
            pass


def test_a_stop_that_comes_while_a_slow_disk_saves_waits_for_it(alone, tmp_path, whole):
    tree, sync = recipe(tmp_path / "a", **EPOCHS), checkpoint._sync

    def slow(path):
        if not slow.called:
            os.kill(os.getpid(), TERM)
        slow.called = True
        time.sleep(0.05)
        sync(path)

    slow.called = False
    with alone.context() as patch:
        patch.setattr(checkpoint, "_sync", slow)
        with pytest.raises(Stopped):
            train_recipe(load_dict(tree))
    assert not list((tmp_path / "a/run/checkpoints").glob(".*"))
    train_recipe(load_dict(tree), resume=True)
    assert_same(tree, whole)


# ------------------------------------------------------------------------------------------------------ lost processes


def ends(launch, seconds=60):
    """Exit codes and seconds from the first end to the last, where nobody kills the others."""
    end, first = time.monotonic() + 120, None
    while any(process.is_alive() for process in launch.processes):
        if first is None and any(process.exitcode is not None for process in launch.processes):
            first = time.monotonic()
            end = first + seconds
        if time.monotonic() > end:
            launch.signal(KILL)
            pytest.fail(f"hangs\n{launch.text}")
        time.sleep(0.02)
    return [process.exitcode for process in launch.processes], time.monotonic() - (first or time.monotonic())


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_where_a_process_of_several_is_killed_the_others_end_and_say_so(tmp_path, lost):
    tree, other = (recipe(tmp_path / name, train__epochs=2) for name in "ab")
    launch = Launch(tree, 2, fault=("signal_at_pass", KILL, 15, lost))
    codes, seconds = ends(launch)
    assert codes == ([-9, 1] if lost == 0 else [1, -9]) and seconds < 30
    assert "another process of this training is gone" in launch.text and "continue with --resume" in launch.text
    assert "Traceback" not in launch.text
    run(tree, 2, resume=True)
    run(other, 2)
    assert_same(tree, other)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_where_a_loaders_worker_is_killed_the_run_ends_and_says_what_to_do(tmp_path, ranks):
    tree, other = (recipe(tmp_path / name, train__epochs=2, speed__workers=1) for name in "ab")
    launch = Launch(tree, ranks, fault=("kill_a_worker", 15, ranks - 1))
    codes, seconds = ends(launch)
    assert codes == [1] * ranks and seconds < 30
    assert "memory ran out" in launch.text and "use fewer speed.workers" in launch.text
    assert "Traceback" not in launch.text
    run(tree, ranks, resume=True)
    run(other, ranks)
    assert_same(tree, other)


def rebuild_storage_fd(error):
    """As torch's function of that name, which asks a worker for a tensor, fails where the worker is gone."""
    raise error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), OSError(24, "?")])
def test_a_lost_worker_is_told_wherever_it_shows(error):
    many_files = isinstance(error, OSError) and error.errno == 24
    code, key = ("file.failed", "ulimit") if many_files else ("system.process", "speed.workers")
    with raises(code, key, "--resume", kind=MachineError), with_advice():
        rebuild_storage_fd(error)
    with pytest.raises(type(error)) as caught, with_advice():  # of something else
        raise type(error)("?")
    assert not worker_was_lost(caught.value)


def test_a_lost_worker_is_told_where_torch_interrupts_the_telling(monkeypatch):
    says = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    told = errors._advised

    def interrupted(error, again):
        monkeypatch.setattr(errors, "_advised", told)
        raise says

    monkeypatch.setattr(errors, "_advised", interrupted)
    with raises("system.process", "pid 7", "speed.workers", kind=MachineError), with_advice():
        raise ConnectionResetError(104, "Connection reset by peer")


# ----------------------------------------------------------------------------------------- a tool that is asked to stop


TOOLS = {
    "train": ["-m", "rescom_timm", "train", "digits_lt", "output=o", "speed.workers=2"],
    "sweep": ["-m", "rescom_timm", "sweep", "digits_lt", "--seeds", "0,1", "--output", "o", "speed.workers=2"],
    "startup": ["-m", "rescom_timm", "benchmark", "startup", "digits_lt", "--repetitions", "50"],
    "soak": ["-m", "rescom_timm", "benchmark", "soak", "--minutes", "5", "--folder", "o"],
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_is_asked_to_stop_takes_its_children_with_it(tmp_path, tool):
    own = {name: value for name, value in os.environ.items() if name not in STARTED}
    own |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "told.txt", "wb") as told:
        process = subprocess.Popen([sys.executable, *TOOLS[tool]], cwd=tmp_path, env=own, stdout=told, stderr=told)
    children, end = [], time.monotonic() + 200
    trains = tool in ("train", "sweep")
    while not children or (trains and not list(tmp_path.glob("o/*/metrics.jsonl"))):
        assert time.monotonic() < end and process.poll() is None, (tmp_path / "told.txt").read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    time.sleep(2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(TERM)
    assert process.wait(60) == 143, (tmp_path / "told.txt").read_text()
    _, alive = psutil.wait_procs(children, timeout=20)
    for orphan in alive:
        orphan.kill()
    assert children and not alive
    assert "Traceback" not in (tmp_path / "told.txt").read_text()
    if trains:
        assert "all is saved in" in (tmp_path / "told.txt").read_text()
