"""rescom-timm sweep --search: the space, the trials that workers share, what is ended and what goes on."""

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rescom_timm.__main__ import main
from rescom_timm.cli.parts import search
from rescom_timm.cli.parts.search import Range, Search, space_of
from rescom_timm.engine.errors import Stopped
from rescom_timm.errors import InputError
from tests.raises import exits, raises

optuna = pytest.importorskip("optuna", reason="--search needs optuna: pip install 'rescom-timm[search]'")
VALIDATED = "data.validation=holdout(0.2)"
RATE = "optimizer.lr=1e-4:1e-1:log"


@pytest.fixture
def trainings(monkeypatch):
    """In place of trainings: three evaluations of a metric that is best at a rate of 0.01. Returns names of runs."""
    begun = []

    def train(recipe, resume, follower):
        begun.append(recipe.name)
        final = 80 - 10 * abs(math.log10(recipe.optimizer.lr) + 2)
        recipe.folder.mkdir(exist_ok=True)
        with (recipe.folder / "metrics.jsonl").open("w") as file:
            for epoch in (1, 2, 3):
                value = final * epoch / 3
                file.write(json.dumps({"epoch": epoch, "step": epoch, "validation/top1": value}) + "\n")
                follower.evaluated(epoch, {"validation": {"top1": value}})
        time.sleep(0.02)

    monkeypatch.setattr(search, "train_recipe", train)
    return begun


def worker(output, number=12, settings=(VALIDATED, RATE)):
    return Search(space_of("digits_lt", ["cross_entropy"], settings, 0, output), number, "top1", output)


def states(output):
    return [trial.state.name for trial in worker(output).study.get_trials()]


def test_the_space_of_a_command(tmp_path):
    settings = [
        VALIDATED,
        RATE,
        "train.batch_size=16:64",
        "optimizer.weight_decay=0:1",
        "schedule.name=cosine,constant",
    ]
    space = space_of("digits_lt", ["cross_entropy"], settings, 0, tmp_path)
    assert space.fixed == (("data.validation", "holdout(0.2)"),)
    assert dict(space.searched) == {
        "optimizer.lr": Range(1e-4, 1e-1, True, False),
        "train.batch_size": Range(16, 64, False, True),
        "optimizer.weight_decay": Range(0, 1, False, False),
        "schedule.name": ("cosine", "constant"),
    }
    values = {"optimizer.lr": 0.00123456789, "train.batch_size": 32, "optimizer.weight_decay": 0.5}
    cell = space.suggest(optuna.trial.FixedTrial(values | {"schedule.name": "cosine"}))
    recipe = cell.load(tmp_path)
    assert (recipe.optimizer.lr, recipe.train.batch_size, recipe.schedule.name) == (0.00123457, 32, "cosine")


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ([VALIDATED], "usage.arguments", "--search"),
        ([VALIDATED, "optimizer.lr=1:0.1"], "usage.arguments", "optimizer.lr"),
        ([VALIDATED, "optimizer.lr=0:1:log"], "usage.arguments", "optimizer.lr"),
        ([VALIDATED, "optimizer.lr=a:b"], "usage.arguments", "optimizer.lr"),
        ([VALIDATED, "optimizer.lr=0.1:inf"], "usage.arguments", "optimizer.lr"),
        ([VALIDATED, "train.batch_size=16:64.5"], "recipe.value", "train.batch_size"),
        ([VALIDATED, "optimizer.rate=1:2"], "recipe.unknown_key", "optimizer.lr"),
        ([VALIDATED, "schedule.name=cosine,linear"], "recipe.value", "linear"),
        ([RATE], "recipe.conflict", "data.validation"),
    ],
)
def test_a_space_that_cannot_be_searched(tmp_path, settings, code, named):
    with raises(code, named):
        space_of("digits_lt", ["cross_entropy"], settings, 0, tmp_path)


@pytest.mark.parametrize("words", [["--share", "1/2"], ["--seeds", "0,1"], ["--table"], ["digits_lt"], ["+a,+b"], []])
def test_arguments_that_do_not_go_together(words):
    with exits(2):
        main(["sweep", "digits_lt", RATE, "--search", "0" if words == [] else "5", *words])


def test_a_search_finds_the_best_and_ends_what_falls_behind(tmp_path, trainings):
    assert worker(tmp_path, 30).run() == []
    study = worker(tmp_path, 30).study
    assert (
        len(study.trials) == len(set(trainings)) == 30 and abs(math.log10(study.best_params["optimizer.lr"]) + 2) < 0.2
    )
    assert {"COMPLETE", "PRUNED"} == set(states(tmp_path))
    assert worker(tmp_path, 30).run() == [] and len(trainings) == 30, "there are enough trials"
    again = tmp_path / "again"
    worker(again, 15).run()
    assert trainings[30:] == trainings[:15], "the seed decides"
    with raises("run.output", tmp_path):
        worker(tmp_path, settings=[VALIDATED, "optimizer.lr=1e-3:1e-1:log"])


def test_workers_share_the_trials(tmp_path, trainings):
    workers = [worker(tmp_path) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Search.run, workers))
    assert len(trainings) == len(set(trainings)) == 12 and len(states(tmp_path)) == 12
    assert not list(tmp_path.glob(".trial-*"))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stopped])
def test_a_killed_trial_goes_on_in_its_run(tmp_path, monkeypatch, trainings, stop):
    train = search.train_recipe

    def killed(*words, **named):
        train(*words, **named)
        if len(trainings) == 3:
            raise stop

    monkeypatch.setattr(search, "train_recipe", killed)
    with pytest.raises(stop):
        worker(tmp_path, 5).run()
    assert states(tmp_path)[2] == "RUNNING"
    worker(tmp_path, 5).run()
    assert trainings[3] == trainings[2] and len(set(trainings)) == 5
    assert states(tmp_path)[2] == "FAIL" and len(states(tmp_path)) == 6


def test_a_trial_that_fails_is_left_out(tmp_path, monkeypatch, trainings):
    train = search.train_recipe

    def fails(recipe, *words, **named):
        if len(trainings) == 1:
            trainings.append("failed")
            raise InputError("train.memory", "too large")
        train(recipe, *words, **named)

    monkeypatch.setattr(search, "train_recipe", fails)
    (error,) = worker(tmp_path, 4).run()
    assert "too large" in error and states(tmp_path).count("FAIL") == 1 and len(trainings) == 4


def test_optuna_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with raises("system.package", "rescom-timm[search]", kind=ImportError):
        worker(tmp_path)


@pytest.mark.slow
def test_a_search_from_the_command_line(tmp_path):
    quick = ["train.epochs=1", "schedule.warmup_epochs=0", "method.views=1", "train.batch_size=364", VALIDATED]
    words = ["sweep", "digits_lt", "+cross_entropy", *quick, RATE, "--search", "2", "--output", str(tmp_path)]
    assert main(words) == 0
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 3
    assert main(words) == 0
