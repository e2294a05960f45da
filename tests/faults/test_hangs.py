"""What could hang, lose work or race: shared memory, stuck loaders, second signals, disks without locks, readers of a
run that trains, leftovers of killed writers, trackers without a network, silence."""

import ctypes
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

from rescom_timm import io as files
from rescom_timm.data import progress, shared_memory
from rescom_timm.data.config import DataConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.loaders import eval_loader, train_loader
from rescom_timm.data.sources import load
from rescom_timm.engine import checkpoint, errors, stop_signals, trackers
from rescom_timm.engine.checkpoint import CheckpointError
from rescom_timm.engine.run_folder import locked
from rescom_timm.engine.stop_signals import StopSignals, in_own_process_group
from rescom_timm.inference.predict import Prediction
from rescom_timm.inference.predictions_table import write_csv
from rescom_timm.io import clear_leftovers, file_lock, write_text
from tests.raises import raises

ROOT = Path(__file__).parents[2]
NET = {"w": torch.ones(2)}
DEAD = 2**22 + 1  # above the largest number that Linux gives a process


# ------------------------------------------------------------------------------------------------------ shared memory


@pytest.fixture
def memory(monkeypatch):
    """memory(bytes): so many are free in /dev/shm."""

    def free(size):
        monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=size // 4096, f_frsize=4096))

    return free


@pytest.mark.parametrize(
    ("free", "together", "found"),
    [
        (100, 1, (4, 4)), (18, 1, (4, 4)), (17, 1, (4, 3)), (6, 1, (4, 1)), (5, 1, (3, 1)), (3, 1, (1, 1)),
        (2, 1, (0, 4)), (0, 1, (0, 4)), (35, 2, (4, 3)),
    ],
)  # fmt: skip
def test_workers_and_batches_ahead_fit_the_shared_memory(memory, free, together, found):
    memory(free * 2**20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert shared_memory.fitting(4, 4, 2**20, together) == found
    assert len(caught) == (found != (4, 4)) and all("--shm-size" in str(one.message) for one in caught)


def test_a_system_without_that_bound_has_all_workers(monkeypatch):
    monkeypatch.setattr(shared_memory, "PLACE", "/nowhere")
    assert shared_memory.fitting(4, 4, 2**40) == (4, 4)


@pytest.mark.filterwarnings("ignore:.*shared memory free")
def test_loaders_for_training_and_evaluation_take_what_fits_and_the_same_images(memory, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    split = load(DataConfig("digits")).test
    views = ViewsConfig(train="crop(8,1)", eval="none")
    sample = 3 * 8 * 8 + 16  # image, label and row
    for free, workers, ahead in ((1e9, 2, 4), (64 * sample * 9, 2, 3), (64 * sample * 2, 0, None)):
        memory(int(free))
        for loader in (
            train_loader(split, views, 1, 64, speed=LoadingConfig(workers=2)),
            eval_loader(split, views, 64, speed=LoadingConfig(workers=2)),
        ):
            assert (loader.num_workers, loader.prefetch_factor) == (workers, ahead)
            assert loader.timeout == (600 if workers else 0)
    first = next(iter(loader))
    memory(int(1e9))
    again = next(iter(eval_loader(split, views, 64, speed=LoadingConfig(workers=1))))
    assert torch.equal(first["image"], again["image"])


def test_prediction_takes_what_fits(memory, monkeypatch):
    asked = []
    monkeypatch.setattr("rescom_timm.inference.predict.worker_options", lambda *words: asked.append(words) or {})
    from rescom_timm.inference.predict import predict
    from rescom_timm.inference.pretrained import Pretrained
    from rescom_timm.models.net import create_model

    model = Pretrained(create_model("resnet8_cifar", 2).eval(), ["a", "b"], None, (3, 8, 8), "none", None, None)
    predict(model, [np.zeros((8, 8, 3), np.uint8)] * 2, batch_size=2, workers=3)
    assert asked == [(3, 2, 2 * 3 * 8 * 8)]


class Stuck(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, position):
        time.sleep(60)


def test_a_loader_that_is_stuck_times_out_and_says_what_to_do():
    loader = torch.utils.data.DataLoader(Stuck(), **shared_memory.worker_options(1, 1, 0, timeout=0.2))
    with raises("system.process", "/dev/shm", "speed.timeout", kind=errors.MachineError), errors.with_advice():
        next(iter(loader))


# ------------------------------------------------------------------------------------------------------------- signals


class Saved(Exception):
    pass


def hang(where, told):
    """A run that listens to signals and does not go on."""
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    stop_signals.STUCK, stop_signals.ECHO = 0.3, 0.3
    signals = StopSignals()
    signals.listen()
    Path(told + "-ready").touch()
    if where == "loop":
        while True:
            time.sleep(0.01)
    if where == "C":  # of which no handler of Python hears
        library = ctypes.CDLL(None)
        while True:
            library.sleep(600)
    try:
        with signals.unstuck(Saved):
            next(iter(torch.utils.data.DataLoader(Stuck(), num_workers=where, worker_init_fn=in_own_process_group)))
    except Saved:
        sys.exit(143)


@pytest.fixture
def hanging(tmp_path):
    processes = []

    def start(where):
        told = str(tmp_path / "told")
        process = multiprocessing.get_context("fork").Process(target=hang, args=(where, told))
        process.start()
        processes.append(process)
        end = time.monotonic() + 60
        while not Path(told + "-ready").exists():
            assert process.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        return process, Path(told)

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_is_stuck_hears_the_first_signal(hanging, workers):
    process, _ = hanging(workers)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143


@pytest.mark.parametrize(
    ("where", "second"), [("loop", signal.SIGTERM), ("loop", signal.SIGINT), ("C", signal.SIGTERM)]
)
def test_a_second_signal_ends_at_once_and_an_echo_does_not(hanging, where, second):
    process, told = hanging(where)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)  # a launcher passes on what its group got
    time.sleep(0.6)
    assert process.is_alive()
    os.kill(process.pid, second)
    process.join(60)
    assert process.exitcode == 128 + second and "second signal" in told.read_text()


# --------------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_one_warning(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    files._warn_no_locks.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with locked(tmp_path), file_lock(tmp_path / ".other", timeout=0) as held:
                assert not held
    assert [str(one.message) for one in caught if "no file locks" in str(one.message)] == [str(caught[0].message)]


def test_another_refusal_of_a_lock_is_an_error(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refused)
    with raises("file.failed", os.strerror(errno.EIO), kind=OSError), file_lock(tmp_path / ".lock", timeout=0):
        pass


# ------------------------------------------------------------------------------------------- readers beside a training


def test_a_reader_lists_anew_where_the_run_prunes(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, NET, {"step": step})
    whole = checkpoint.load

    def pruned(path):
        if path.name == "step-00000002":
            checkpoint.save(tmp_path, 3, NET, {"step": 3})
            shutil.rmtree(path)
        return whole(path)

    monkeypatch.setattr(checkpoint, "load", pruned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path)[2] == {"step": 3}


def test_what_is_read_of_a_best_checkpoint_is_read_anew(tmp_path):
    checkpoint.save(tmp_path, 1, NET, {})
    tries = []

    def read():
        tries.append(1)
        if len(tries) == 1:
            checkpoint.save(tmp_path, 2, NET, {})
            raise FileNotFoundError("pruned")
        return "read"

    assert checkpoint.whole_read(tmp_path, read) == "read" and len(tries) == 2


def test_what_fails_without_a_change_is_not_read_again(tmp_path):
    checkpoint.save(tmp_path, 1, NET, {})
    tries = []

    def read():
        tries.append(1)
        raise CheckpointError("checkpoint.damaged", "damaged")

    with pytest.raises(CheckpointError):
        checkpoint.whole_read(tmp_path, read)
    assert len(tries) == 1


def test_only_the_owner_of_the_lock_repairs(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, NET, {"step": 1})
    checkpoint.save(folder, 2, NET, {"step": 2}).rename(folder / ".partial-old-00000002")
    with FileLock(tmp_path / ".lock"):
        assert checkpoint.newest(folder)[2] == {"step": 1}
        assert (folder / ".partial-old-00000002").is_dir()
    assert checkpoint.newest(folder)[2] == {"step": 2}, "nobody trains: the reader owns it for a moment"
    (folder / "step-00000002").rename(folder / ".partial-old-00000002")
    with locked(tmp_path):
        assert (folder / "step-00000002").is_dir()


# ----------------------------------------------------------------------------------------------------------- leftovers


def left(folder, name, process, digits="0" * 16):
    path = folder / f".{name}.{files._writer(process)}{digits}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half")
    return path


def test_leftovers_of_killed_writers_go_and_those_of_the_living_stay(tmp_path):
    gone = [left(tmp_path, "test-last.json", DEAD), left(tmp_path, "x.png", os.getpid())]
    stays = [left(tmp_path, "x.json", os.getppid()), tmp_path / ".x.json.mine", tmp_path / ".lock"]
    other = tmp_path / (".x." + "f" * 32)
    for path in (*stays[1:], other):
        path.write_text("x")
    clear_leftovers(tmp_path)
    assert not any(path.exists() for path in gone) and all(path.exists() for path in (*stays, other))
    os.utime(other, (0, 0))  # of another machine, long ago
    clear_leftovers(tmp_path)
    assert not other.exists()


def test_the_owner_of_the_lock_clears_what_a_killed_evaluation_left(tmp_path):
    path = left(tmp_path / "evaluation", "test-last.json", DEAD)
    with locked(tmp_path):
        assert not path.exists()


def test_a_writer_clears_its_own_name_alone(tmp_path):
    own, other = left(tmp_path, "x.json", DEAD), left(tmp_path, "x.json.gz", DEAD)
    write_text(tmp_path / "x.json", "1")
    assert not own.exists() and other.exists()


ONE = Prediction("a.png", ["cat"], [0.5], "", "")


def test_a_full_disk_leaves_no_partial_table(tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rescom_timm.inference.predictions_table.write_rows", full)
    with raises("file.failed", "No space left", kind=OSError):
        write_csv([ONE], tmp_path / "x.csv", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"] and (tmp_path / "x.csv").read_text() == "old"


def test_three_predictions_into_one_table_at_once(tmp_path):
    barrier, wrong = threading.Barrier(3), []

    def found():
        barrier.wait()
        for _ in range(50):
            yield ONE
        barrier.wait()

    def write():
        try:
            write_csv(found(), tmp_path / "l.csv", 1)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [path.name for path in tmp_path.iterdir()] == ["l.csv"]
    assert len((tmp_path / "l.csv").read_text().splitlines()) == 51


# ------------------------------------------------------------------------------------------------ trackers and silence


def test_a_tracker_has_so_long_for_a_call_and_one_thread(monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    in_time = trackers._InTime()
    assert in_time(threading.get_ident) == in_time(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0)
    with pytest.raises(TimeoutError):
        in_time(lambda: time.sleep(1))


@pytest.mark.parametrize("words", [["recipes"], ["evaluate", "nowhere"], ["index", "describe", "nowhere.txt"]])
def test_a_command_says_something_within_a_second_of_its_words(words):
    """Before torch is imported, which a module that cannot be imported stands for here."""
    program = (
        "import sys\n"
        "class Late:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print('torch', file=sys.stderr); sys.exit(9)\n"
        "sys.meta_path.insert(0, Late())\n"
        f"sys.argv = ['rescom-timm', *{words!r}]\n"
        "from rescom_timm.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    first, *_ = done.stderr.splitlines()
    assert done.returncode == 9 and "loading" in first and done.stdout == "", done.stderr


def test_a_bar_is_for_a_terminal_of_the_first_process(monkeypatch, capsys):
    def shown():
        assert list(progress.progress([[1, 2], [3]], "x", 3, len)) == [[1, 2], [3]]
        return "0/3" in capsys.readouterr().err

    assert not shown()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert shown()
    with progress.quiet():
        assert not shown()
    monkeypatch.setenv("RANK", "1")
    assert not shown()
