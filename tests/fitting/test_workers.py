"""Several processes on one fit."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import rescom_timm
from rescom_timm.engine.run_folder import LOCK, locked
from rescom_timm.fitting import plan, steps, training, workers
from rescom_timm.fitting.plan import FitOptions, Training
from rescom_timm.fitting.record import Record
from rescom_timm.fitting.tasks import work
from rescom_timm.io import file_lock, read_json
from tests.fitting.made_up import NET, photographs
from tests.raises import raises

HOW = {"backbone": NET, "weights_file": "none", "size": 16, "device": "cpu"}
HOLDER = (
    "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
)


@pytest.fixture
def photos(tmp_path, monkeypatch, alone):
    monkeypatch.setattr(plan, "trainings", lambda *_: [Training("linear", 1), Training("cosine", 1)])
    monkeypatch.setattr(training, "FALL", 100.0)
    return photographs(tmp_path / "photos", [60, 40, 25, 12])


def test_two_workers_end_with_what_one_ends_with(photos, tmp_path, monkeypatch):
    """The other worker is faster: it has done every second task when the leader comes to it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "alone"))
    one = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "one", join=True)
    count, post, kinds = itertools.count(), workers.Workers.post, []

    def posted(self, name, task):
        post(self, name, task)
        if next(count) % 2:
            kinds.append(task["kind"])
            file = self.tasks / f"{name}.json"
            assert workers.done_once(file, lambda: work(file)) is not None

    monkeypatch.setattr(workers.Workers, "post", posted)
    monkeypatch.setattr(workers.Workers, "number", lambda self: 2)
    monkeypatch.setattr(steps, "SHARED", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "beside"))
    two = rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "two")
    assert {"features", "training"} == set(kinds)
    ours, theirs = (json.loads((run.folder / "fit/fit.json").read_text()) for run in (one, two))
    assert ours["table"] == theirs["table"] and ours["chosen"] == theirs["chosen"]
    ours, theirs = (load_file(run.folder / "fit/chosen.safetensors") for run in (one, two))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    ours, theirs = (sorted((tmp_path / name).rglob("*.npy")) for name in ("alone", "beside"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert all(np.array_equal(np.load(a), np.load(b)) for a, b in zip(ours, theirs, strict=True))
    assert not list((two.folder / "fit/tasks").glob("*.npy"))


def test_a_worker_with_other_images_is_refused(photos, tmp_path, monkeypatch):
    """Their names and classes are the same: a copy on another machine that is older."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(workers.Workers, "number", lambda self: 2)
    monkeypatch.setattr(steps, "SHARED", 0.0)
    post, kinds = workers.Workers.post, set()

    def posted(self, name, task):
        post(self, name, task)
        kinds.add(task["kind"])
        image = photos / "train/a/1.png"
        content = image.read_bytes()
        Image.new("RGB", (20, 20)).save(image)
        with raises("fit.changed", image):
            work(self.tasks / f"{name}.json")
        image.write_bytes(content)

    monkeypatch.setattr(workers.Workers, "post", posted)
    rescom_timm.fit(photos, 100, **HOW, output=tmp_path / "run")
    assert kinds == {"features", "training"}


def test_a_task_that_is_cleared_away_is_no_error(tmp_path, monkeypatch):
    """While a worker reads it, and while it works: nothing is left of it."""
    crew = workers.Workers(tmp_path)
    for lost in (True, False):
        crew.post("a", {})

        def do(path, lost=lost):
            path.unlink()
            return read_json(path) if lost else {"used": True}

        looks = iter([False, True])
        with file_lock(tmp_path / LOCK):
            assert workers.follow(tmp_path, lambda looks=looks: next(looks), do)
        assert not list((tmp_path / "tasks").glob("*.done"))


def test_the_task_of_a_killed_worker_is_taken_over(tmp_path):
    crew = workers.Workers(tmp_path)
    (tmp_path / "workers").mkdir()
    crew.post("linear", {"kind": "training"})
    lock = tmp_path / "tasks/linear.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        assert not workers.free(lock) and workers.free(tmp_path / "tasks/cosine.lock")
        assert crew.result("linear", dict, lambda: False) is None
        assert crew.result("linear", lambda: {"used": True}, lambda: other.kill() is None) == {"used": True}
    assert crew.result("linear", dict, lambda: True) == {"used": True}, "it is done once"


def test_a_worker_ends_with_the_fit_or_without_a_leader(tmp_path, monkeypatch):
    crew = workers.Workers(tmp_path)
    crew.post("a", {})
    crew.post("b", {})
    looks, seen = iter([False, False, True]), []

    def do(path):
        seen.append((path.name, crew.number()))
        return {"used": True}

    monkeypatch.setattr(workers, "POLL", 0.01)
    with file_lock(tmp_path / LOCK):
        assert workers.follow(tmp_path, lambda: next(looks), do)
    assert seen == [("a.json", 2), ("b.json", 2)] and crew.number() == 1
    assert not workers.follow(tmp_path, lambda: False, do)


def test_a_worker_of_another_command_is_refused(tmp_path, photos):
    Record(tmp_path / "run", FitOptions(str(photos), 5.0)).save()
    with locked(tmp_path / "run/fit"), raises("fit.other_run", "minutes"):
        rescom_timm.fit(photos, 6, output=tmp_path / "run", join=True)


def test_processes_of_a_launch_work_by_themselves(monkeypatch):
    assert workers.independent() == 1
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert workers.independent() == 2
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(os.environ)


@pytest.mark.slow
def test_two_processes_of_one_launch(tmp_path, alone):
    photos = photographs(tmp_path / "photos", [20, 12, 8, 3])
    command = [
        "fit", photos, "--minutes", "100", "--backbone", NET, "--weights-file", "none", "--size", "16", "--device",
        "cpu", "-o", tmp_path / "run",
    ]  # fmt: skip
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "rescom_timm"]
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run/fit/fit.json").read_text())
    assert found["finished"] and [one["kind"] for one in found["plan"]] == ["linear", "cosine"]
    assert "takes a part of the work" in done.stdout and "training: " in done.stdout
