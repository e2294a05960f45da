"""A run's folder: taken by one start, held by one training, known again by its log, readable when damaged."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rescom_timm.config.loading import load_dict
from rescom_timm.engine import run_folder as folder
from rescom_timm.engine.run_folder import check_place, existing, lines, make, run_recipe, same_run
from rescom_timm.engine.run_folder import locked as held
from tests.engine.child import SERVER, recipe
from tests.engine.made_up_run import make_run
from tests.raises import raises, warns


def test_each_start_takes_a_folder_of_its_own(tmp_path):
    made = load_dict(recipe(tmp_path / "deep" / "er"))
    taken = [make(made).name for _ in range(3)]
    assert taken == ["run", "run-2", "run-3"]
    assert [path.name for path in existing(made)] == taken


def test_of_two_starts_at_once_none_gets_the_others_folder(tmp_path):
    made = load_dict(recipe(tmp_path))
    with SERVER.Pool(2) as pool:
        taken = pool.map(make, [made] * 40, chunksize=1)
    assert sorted(path.name for path in taken) == sorted(["run", *(f"run-{n}" for n in range(2, 41))])


@pytest.mark.parametrize(
    ("output", "named"),
    [("file", "file "), ("file/below", "file "), ("/proc/x", "/proc")],
)
def test_an_output_that_cannot_be_a_folder_is_an_error(tmp_path, output, named):
    (tmp_path / "file").write_text("")
    made = load_dict(recipe(tmp_path / output))
    with raises("run.output", "output", named):
        make(made)
    if output != "/proc/x":  # whose rights say yes
        with raises("run.output", "output", named):
            check_place(made)


def test_a_folder_is_held_by_one_and_the_other_is_told_by_whom(tmp_path):
    with held(tmp_path):
        child = SERVER.Process(target=_refused, args=(tmp_path, os.getpid()))
        child.start()
        child.join(30)
        assert child.exitcode == 0
    with held(tmp_path):
        assert json.loads((tmp_path / folder.OWNER).read_text())["process"] == os.getpid()
    assert not (tmp_path / folder.OWNER).exists()


def _refused(run: Path, owner: int) -> None:
    with raises("run.locked", run, f"process {owner}"), held(run):
        pass


def test_a_killed_owner_leaves_the_folder_free_though_its_number_lives_on(tmp_path):
    child = SERVER.Process(target=_hold_and_die, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == -9
    owner = json.loads((tmp_path / folder.OWNER).read_text())
    assert owner["process"] == child.pid
    (tmp_path / folder.OWNER).write_text(json.dumps(owner | {"process": os.getpid()}))  # the number is given anew
    assert not folder._lives(folder._owner(tmp_path))
    with held(tmp_path):
        pass


def _hold_and_die(run: Path) -> None:
    with held(run):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_workers_of_a_killed_owner_are_waited_for(tmp_path, monkeypatch):
    """With their parent's files they may have its lock, until they notice that it is gone."""
    child = SERVER.Process(target=_hold_fork_and_die, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == -9
    worker = psutil.Process(int((tmp_path / "worker").read_text()))

    def nap(seconds):
        with suppress(psutil.NoSuchProcess):  # the second time
            worker.kill()  # as it does by itself after some seconds
        psutil.wait_procs([worker], timeout=10)

    monkeypatch.setattr(folder.time, "sleep", nap)
    with held(tmp_path):
        assert json.loads((tmp_path / folder.OWNER).read_text())["process"] == os.getpid()
    nap(0)


def _hold_fork_and_die(run: Path) -> None:
    with held(run):
        worker = os.fork()
        if worker == 0:
            signal.pause()
        (run / "worker").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_is_known_again_by_its_log(tmp_path):
    log = [{"epoch": n, "step": 5 * n, "train/loss": 1.0, "seconds": 1.234567 * n} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log[:2]))
    assert same_run(tmp_path, log) and same_run(tmp_path, log[:1])
    assert not same_run(tmp_path, []) and not same_run(tmp_path / "none", log)
    other = [{**log[0], "seconds": 1.234568}, *log[1:]]
    assert not same_run(tmp_path, other) and not same_run(tmp_path, [log[0], other[0]])


def test_torn_lines_are_left_out_and_what_follows_them_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = ['{"epoch": 1, "step": 5}', '{"epoch": 4, "step": 20}']
    for torn in ('{"epoch": 2, "st', "[1, 2]", "7", '{"epoch": "2", "step": 9}', "[" * 5000, "\udcff\udcfe"):
        path.write_bytes("\n".join([whole[0], torn, whole[1], '{"epoch": 5']).encode("utf-8", "surrogateescape"))
        with warns("metrics.jsonl", "line 2"):
            assert [line["step"] for line in lines(path)] == [5, 20]


@pytest.mark.parametrize("text", ["", "name: [", "- 1\n", "data: {source: digits}\nmethod: {temprature: 1}\n", None])
def test_a_damaged_recipe_is_read_from_the_newest_checkpoint(tmp_path, text):
    run = make_run(tmp_path / "run", steps=(2, 4))
    own = run_recipe(run)
    (run / "recipe.yaml").unlink() if text is None else (run / "recipe.yaml").write_text(text)
    with warns("step-00000004"):
        assert run_recipe(run) == own
    with warns("step-00000004"):
        assert run_recipe(run, ["evaluation.batch_size=7"]).evaluation.batch_size == 7


def test_of_a_good_recipe_with_a_wrong_word_the_word_is_told(tmp_path):
    run = make_run(tmp_path / "run")
    with raises("recipe.unknown_key", "net.backbon;", "net.backbone"):
        run_recipe(run, ["net.backbon=resnet18"])
    with raises("run.missing", tmp_path / "none", kind=FileNotFoundError):
        run_recipe(tmp_path / "none")
