"""Every writer on a machine that refuses: full, over its quota, read-only, failing. What was there stays whole."""

import errno
import itertools
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rescom_timm.__main__ import main
from rescom_timm.analysis import style
from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from rescom_timm.data.index import Index
from rescom_timm.engine.checkpoint import load, newest, save
from rescom_timm.engine.errors import ADVICE, FAILURES, MachineError, advice, one_line, with_advice
from rescom_timm.engine.log import Log
from rescom_timm.engine.run_folder import lines
from rescom_timm.inference.export import export
from rescom_timm.inference.neighbours import Embeddings
from rescom_timm.inference.predict import Prediction
from rescom_timm.inference.predictions_table import write_csv
from rescom_timm.inference.pretrained import damaged
from rescom_timm.io import write_json, write_tensors, write_text
from rescom_timm.models.net import ProjectorConfig, create_model
from rescom_timm.models.text_features import save_class_features
from tests.engine.child import differences, figures, last, recipe
from tests.faults.data_lists import LIST
from tests.faults.fault import photos, text
from tests.faults.refusal import refused, small_files
from tests.faults.test_table import files
from tests.faults.trained import a_run
from tests.raises import raises

if not sys.platform.startswith("linux"):
    pytest.skip("these disks are Linux's", allow_module_level=True)

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)


def drawn(place: Path, k: int) -> None:
    figure = style.new_figure(2, 2)
    figure.subplots().plot([0, k])
    style.save(figure, {"x": [0, k]}, place / "line")


def labelled(place: Path, k: int) -> None:
    write_csv([Prediction("a.png", ["cat"], [k / 10], "", "")], place / "x.csv", 1)


def indexed(place: Path, k: int) -> None:
    Index(["a", "b"], np.array([0, 1]), 2, {"rule": str(k)}).save(place / "x.txt")


NET = create_model("resnet8_cifar", 2, projector=ProjectorConfig(4, 2))
WRITERS = {
    "text": lambda place, k: write_text(place / "x.txt", [f"line {k}\n"] * 9),
    "JSON": lambda place, k: write_json(place / "x.json", {"k": k}),
    "tensors": lambda place, k: write_tensors(place / "x.safetensors", {"k": torch.full((9,), k)}),
    "a new folder's file": lambda place, k: write_text(place / str(k) / "x.txt", "x"),
    "embeddings": lambda place, k: Embeddings(torch.eye(2) * k, torch.eye(2), ["a"] * 2, [""] * 2).save(place / "x"),
    "class features": lambda place, k: save_class_features(place / "x", torch.eye(2) * k, ["a", "b"], "clip", ["{}"]),
    "index": indexed,
    "labels": labelled,
    "picture": drawn,
    "export": lambda place, k: export(NET, place / "model", [f"a{k}", "b"], (3, 8, 8), plain=False),
    "checkpoint": lambda place, k: save(place, k, {"w": torch.full((9,), k)}, {"step": k, "x": torch.ones(3)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_whatever_is_refused_the_old_files_are_whole_and_the_new_come_whole(tmp_path, name):
    tmp_path, whole = tmp_path / "a", tmp_path / "b"
    for place, k in ((tmp_path, 1), (whole, 1), (whole, 2)):
        place.mkdir(exist_ok=True)
        WRITERS[name](place, k)
    before, then = files(tmp_path), files(whole)
    for at in itertools.count(1):
        number = NUMBERS[at % len(NUMBERS)]
        try:
            with refused(tmp_path, at, number) as refusal:
                WRITERS[name](tmp_path, 2)
        except FAILURES as error:
            told = error
        else:
            assert refusal.count < at, "what was refused was told"
            break
        assert advice(told) == ADVICE[number] and "\n" not in one_line(told)
        after = files(tmp_path)
        assert before.keys() <= after.keys() <= then.keys() | {"x.csv.partial"}
        for path, digest in after.items():
            assert digest in (before.get(path), then.get(path)) or path in ("x.csv.partial", "line.svg")
    assert at > 1 and files(tmp_path) != before, "it is written in the end"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("most", [0, 40])
def test_on_a_full_disk_the_old_files_are_whole(tmp_path, name, most):
    """The system itself refuses the bytes, in whatever library they are written."""
    WRITERS[name](tmp_path, 1)
    before = files(tmp_path)
    try:
        with small_files(most), with_advice():
            WRITERS[name](tmp_path, 2)
    except FAILURES as error:
        told = str(error)
    else:
        assert name in ("text", "JSON", "a new folder's file") and most == 40, "small enough"
        return
    assert "ulimit -f" in told and str(tmp_path) in told
    assert before.items() <= files(tmp_path).items()
    WRITERS[name](tmp_path, 2)
    assert files(tmp_path) != before


def test_a_labels_table_that_fails_keeps_what_was_predicted_and_the_old_table(tmp_path):
    labelled(tmp_path, 1)
    old = (tmp_path / "x.csv").read_bytes()

    def stops():
        yield Prediction("b.png", ["dog"], [0.5], "", "")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with raises("file.failed", "x.csv", kind=OSError):
        write_csv(stops(), tmp_path / "x.csv", 1)
    assert (tmp_path / "x.csv").read_bytes() == old
    assert (tmp_path / "x.csv.partial").read_text().splitlines()[1].startswith("b.png,dog,0.5")


@pytest.mark.filterwarnings("ignore:track.log_with. tensorboard is left out", "ignore:the last of")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
@pytest.mark.parametrize("number", NUMBERS)
def test_a_log_that_is_refused_keeps_its_lines(tmp_path, number):
    made = load_dict(recipe(tmp_path))
    log = Log(tmp_path, made, {})
    for step in range(1, 4):
        log.write(step, step, {"x": 1.0})
    log.close()
    refusals = 0
    for at in itertools.count(1):
        log = None
        try:
            with refused(tmp_path, at, number) as refusal:
                log = Log(tmp_path, made, {}, step=3)
                log.write(4, 4, {"x": 1.0})
        except OSError:
            refusals += 1
        finally:
            if log is not None:
                log.close()
        told = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
        assert told[:3] == [1, 2, 3] and told in ([1, 2, 3], [1, 2, 3, 4])
        if refusal.count < at:
            break
    assert refusals >= 6


# ----------------------------------------------------------------------------------------- a whole run, at every write


@pytest.mark.parametrize("written", [False, True], ids=["before the line", "after it"])
def test_an_evaluation_that_could_not_be_logged_is_made_again(alone, tmp_path, written):
    """The epoch is saved without it; without a second one the best epoch would be another."""
    words = {"train__epochs": 2, "train__batch_size": 64, "speed__channels_last": False}
    tree, whole = (recipe(tmp_path / name, **words) for name in "ab")
    train_recipe(load_dict(whole))
    write = Log.write

    def full(self, epoch, step, told):
        if "test/top1" in told and epoch == 1:
            if written:
                write(self, epoch, step, told)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, epoch, step, told)

    with alone.context() as patch:
        patch.setattr(Log, "write", full)
        for resume in (False, True):
            with raises("file.failed", "No space left", "disk space", kind=MachineError):
                train_recipe(load_dict(tree), resume=resume)
    assert newest(tmp_path / "a/run/checkpoints")[2]["progress"]["unevaluated"]
    train_recipe(load_dict(tree), resume=True)
    assert differences(last(tree), last(whole)) == [] and figures(tree) == figures(whole)
    assert newest(tmp_path / "a/run/checkpoints")[2]["progress"]["best_epoch"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:track.log_with. tensorboard is left out", "ignore:the last of")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_run_refused_at_any_write_goes_on_to_what_it_would_have_been(alone, tmp_path, capsys, lasting):
    """Of training, evaluation, checkpoints, log, TensorBoard and export: each write of a run, one after the other."""
    words = {"train__epochs": 2, "checkpoint__keep": 1, "train__batch_size": 64}
    whole = recipe(tmp_path / "whole", **words)
    train_recipe(load_dict(whole))
    refusals = 0
    for at in itertools.count(1):
        tree = recipe(tmp_path / str(at), **words)
        number, place = NUMBERS[at % len(NUMBERS)], tmp_path / str(at) / "run"
        try:
            with refused(tmp_path / str(at), at, number, lasting) as refusal:
                train_recipe(load_dict(tree))
        except FAILURES as error:
            refusals += 1
            told = one_line(error)
            assert "\n" not in told and os.strerror(number) in told and ADVICE[number].lower() in told.lower(), told
        for found in place.glob("checkpoints/step-*"):
            load(found)
        assert [line["step"] for line in lines(place / "metrics.jsonl")] in STEPS
        train_recipe(load_dict(tree), resume=True)
        assert differences(last(tree), last(whole)) == [] and figures(tree) == figures(whole)
        assert not damaged(place / "model") and newest(place / "checkpoints") is not None
        shutil.rmtree(tmp_path / str(at))
        if refusal.count < at:
            break
    assert refusals > 40
    with capsys.disabled():
        print(f"\n{refusals} of {at - 1} refused writes ended the run")


STEPS = ([], [5], [5, 5], [5, 5, 10], [5, 5, 10, 10])
"""Of the lines that a log may hold: of an epoch's training and its evaluation, of two epochs."""


VERBS = {
    "evaluate": "evaluate run",
    "evaluate five crops": "evaluate run --five-crops",
    "predict": "predict run p --embeddings e.safetensors -o l.csv",
    "plot": "plot run --only curves,confusion,report",
    "export": "export run -o out",
    "export torch": "export run --format torch -o m.pt2",
    "export onnx": "export run --format onnx -o m.onnx",
    "index make": "index make digits exponential(10) -o o.txt",
    "init": "init p -o p.yaml --force",
    "index describe": "index describe l.txt --png t.png",
    "doctor": "doctor digits_lt -o d.html",
    "sweep": "sweep --table --output s",
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refused_at_any_write_says_so_and_harms_nothing(alone, tmp_path, capsys, verb):
    """Everything is there from before; afterwards each file is the old one or the whole new one."""
    alone.chdir(tmp_path)
    for make in (a_run, photos(), text("l.txt", LIST), text("s/sweep.json", '[[["a"], "x"]]')):
        make(tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "s/x")
    words = shlex.split(VERBS[verb].replace("(10)", "'(10)'"))
    assert main(words) in (0, 1)
    before, refusals = files(tmp_path), 0
    for at in itertools.count(1):
        number = NUMBERS[at % len(NUMBERS)]
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with refused(tmp_path, at, number) as refusal:
                code = main(words)
        told = capsys.readouterr().err
        if refusal.count < at:
            break
        refusals += 1
        assert code in (1, 2) and os.strerror(number) in told and ADVICE[number] in told, f"write {at}: {told}"
        assert len(told.strip().splitlines()) == 1, told
        after = files(tmp_path)
        assert before.keys() <= after.keys() <= before.keys() | {"l.csv.partial"}, f"write {at}"
        for path in after:
            whole(tmp_path / path)
    assert refusals >= 2


def whole(path: Path) -> None:
    """Raises where a file is no whole one of its kind."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix in (".svg", ".html"):
        assert path.read_text().rstrip().endswith(("</svg>", "</html>"))
    assert path.stat().st_size or path.suffix in (".lock", ".partial", "")
