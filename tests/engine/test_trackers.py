"""Trackers: told of a run, gone on with when it is resumed, and never what stops it."""

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from accelerate.tracking import is_mlflow_available
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from rescom_timm.analysis.writing import pictures
from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load_dict
from rescom_timm.engine import trackers
from rescom_timm.engine.log import Log
from rescom_timm.engine.trackers import STARTS
from tests.engine.child import figures, recipe
from tests.marks import slow
from tests.raises import raises, warns

ONE = {"train__epochs": 2, "schedule__warmup_epochs": 0, "track__tags": ["a"]}


class Fake:
    """A tracker instead of wandb's; what it is told lies in `told`. fails: the call that raises."""

    requires_logging_directory = False
    told: ClassVar[list] = []
    fails = ""

    def __init__(self, project, **options):
        self._tell("init", project, options)
        self.tracker = self
        self.id = options.get("id") or "new"

    def _tell(self, call, *said):
        if call == Fake.fails:
            raise ConnectionError("no network\nhere")
        Fake.told.append((call, *said))

    def start(self):
        self._tell("start")

    def store_init_configuration(self, values):
        self._tell("config", values)

    def log(self, values, step=None):
        self._tell("log", values, step)

    def log_table(self, name, columns, data, step=None):
        self._tell("table", name, columns, data, step)

    def log_images(self, values, step=None):
        self._tell("images", values, step)

    def finish(self):
        self._tell("finish")


@pytest.fixture
def fake(alone):
    Fake.told, Fake.fails = [], ""
    alone.setattr(trackers, "get_available_trackers", lambda: ["wandb", "comet_ml"])
    alone.setattr(trackers, "LOGGER_TYPE_TO_CLASS", {"wandb": Fake, "comet_ml": Fake})
    return Fake


def calls(name):
    return [said for call, *said in Fake.told if call == name]


@pytest.mark.slow
def test_a_run_is_told_and_a_resumed_one_goes_on_as_the_same(fake, tmp_path):
    tree = recipe(tmp_path, track__log_with=["wandb"], track__project="mine", **ONE)
    folder = train(load_dict(tree))
    ((project, options),) = calls("init")
    assert (project, options["name"], options["tags"]) == ("mine", "run", ["a"]) and "id" not in options
    ((config,),) = calls("config")
    assert config["train.epochs"] == 2 and config["method.name"] == "rescom"
    told = [({"step": step} | values) for values, step in calls("log")]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert told == [{key: value for key, value in line.items() if key != "epoch"} for line in lines]
    ((name, columns, data, step),) = calls("table")
    assert name == "final" and step == 22 and columns[:2] == ["evaluation", "top1"]
    assert data[0][1] == pytest.approx(lines[-1]["test/top1"])
    assert Fake.told[-1] == ("finish",) and not (folder / "tensorboard").exists()
    shutil.rmtree(folder / "checkpoints" / "step-00000022")
    Fake.told = []
    train(load_dict(tree), resume=True)
    ((_, options),) = calls("init")
    assert (options["id"], options["resume"]) == ("new", "allow") and calls("config") == []
    assert [step for _, step in calls("log")] == [22, 22]


@pytest.mark.parametrize("call", ["start", "log", *slow("config", "table", "images", "finish")])
def test_a_tracker_that_fails_is_one_line_and_the_training_goes_on(fake, tmp_path, call):
    Fake.fails = call
    tree = recipe(tmp_path, track__log_with=["wandb"], **ONE)
    with pytest.warns(UserWarning, match="wandb") as caught:
        train(load_dict(tree))
    (line,) = [str(one.message) for one in caught]
    why = "ConnectionError: no network here"
    assert line == f"track.log_with: wandb is left out, training continues: {why}"
    assert len(figures(tree)) == 4 and len(calls("log")) == (0 if call in ("start", "config", "log") else 4)


@pytest.mark.slow
def test_the_figures_of_the_finished_run_are_sent(fake, tmp_path):
    folder = train(load_dict(recipe(tmp_path, track__log_with=["wandb", "tensorboard"], **ONE)))
    drawn = pictures(folder)
    assert list(drawn) == ["figures/curves", "figures/longtail", "figures/confusion", "figures/reliability"]
    ((images, step),) = calls("images")
    assert step == 22 and {name: [picture] for name, picture in drawn.items()} == images
    (path,) = (folder / "tensorboard").iterdir()
    events = [(event.step, value) for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    for name, picture in drawn.items():
        ((at, value),) = [(at, value) for at, value in events if value.tag == name]
        read = Image.open(BytesIO(value.tensor.string_val[2]))  # after width and height
        assert at == 22 and np.array_equal(read, picture) and picture.getextrema()[0] == (0, 255)


def test_no_figure_is_drawn_for_trackers_that_take_none(fake, tmp_path):
    fake.set_name = fake.add_tags = lambda self, *said: None
    drawn = []
    log = Log(tmp_path, load_dict(recipe(tmp_path, track__log_with=["comet_ml"])), {})
    log.finished({}, lambda: drawn.append(1), 0)
    assert list(log.trackers.running) == ["comet_ml"] and drawn == calls("images") == []


def test_figures_that_cannot_be_drawn_are_one_line_and_the_tracker_stays(fake, tmp_path):
    log = Log(tmp_path, load_dict(recipe(tmp_path, track__log_with=["wandb"])), {})
    with pytest.warns(UserWarning, match="trackers") as caught:
        log.finished({}, lambda: 1 / 0, 0)
    (line,) = [str(one.message) for one in caught]
    assert line == "the figures for the trackers could not be drawn: ZeroDivisionError: division by zero"
    assert list(log.trackers.running) == ["wandb"]


def test_a_tracker_that_is_not_installed_is_one_line(fake, tmp_path):
    with warns("pip install swanlab"):
        train(load_dict(recipe(tmp_path, track__log_with=["swanlab", "tensorboard"], **{**ONE, "train__epochs": 0})))
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_every_tracker_of_accelerate_can_be_named():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert {*STARTS, "tensorboard"} == set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(
    "section", [{"log_with": ["x"]}, {"log_with": ["aim", "aim"]}, {"project": ""}, {"tags": [""]}]
)
def test_bad_values_are_refused(tmp_path, section):
    with raises("recipe.value", "track"):
        load_dict({**recipe(tmp_path), "track": section})


@pytest.mark.skipif(not is_mlflow_available(), reason="mlflow is not installed")
@pytest.mark.filterwarnings("default")
def test_mlflow_itself(alone, tmp_path):
    import mlflow

    alone.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/store")
    tree = recipe(tmp_path, track__log_with=["mlflow"], **ONE)
    folder = train(load_dict(tree))
    shutil.rmtree(folder / "checkpoints" / "step-00000022")
    train(load_dict(tree), resume=True)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_id == json.loads((folder / "trackers.json").read_text())["mlflow"]
    assert run.data.params["train.epochs"] == "2" and run.data.tags["a"] == "true"
    assert run.data.metrics["test/top1"] == pytest.approx(figures(tree)[-1]["test/top1"])
    sent = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="figures", dst_path=str(tmp_path))
    drawn = {f"figures/{path.stem}": Image.open(path) for path in Path(sent).iterdir()}
    assert drawn.keys() == pictures(folder).keys()
    assert all(np.array_equal(drawn[name], picture) for name, picture in pictures(folder).items())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.filterwarnings("default")
def test_wandb_and_trackio_themselves_keep_the_figures(alone, tmp_path, name):
    alone.setenv("WANDB_MODE", "offline")
    alone.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when it is imported
    pytest.importorskip(name, reason=f"{name} is not installed")
    folder = train(load_dict(recipe(tmp_path, track__log_with=[name], **ONE)))
    kept = {Image.open(path).convert("RGB").tobytes() for path in tmp_path.rglob("media/**/*.png")}
    assert kept == {picture.tobytes() for picture in pictures(folder).values()}
