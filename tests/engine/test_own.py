"""Metrics and callbacks of the caller: where they appear, what they choose, what stays as it is, what is refused."""

import json
import random

import numpy as np
import pytest
import torch

import rescom_timm
from rescom_timm.engine import checkpoint
from rescom_timm.engine.errors import RunError
from rescom_timm.engine.own import Own
from rescom_timm.engine.run_folder import lines
from rescom_timm.metrics import Meter
from tests.engine.child import recipe
from tests.raises import raises


def brier(labels, probabilities):
    """Of the classes, as a skill: larger is better."""
    assert not labels.flags.writeable and probabilities.dtype == np.float32
    random.random(), np.random.rand(), torch.rand(1)  # draws that must not change the training
    return 1 - float(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1).mean())


class Seen:
    """Keeps what the hooks get."""

    def __init__(self):
        self.epochs, self.evaluations = [], []

    def on_epoch_end(self, epoch, metrics):
        torch.rand(3)
        self.epochs.append((epoch, metrics))

    def on_evaluate(self, epoch, figures):
        self.evaluations.append((epoch, figures))


def weights(folder):
    return checkpoint.newest(folder / "checkpoints")[1]


def test_metrics_are_reported_choose_the_best_and_change_nothing(alone, tmp_path):
    tree = recipe(tmp_path, train__epochs=2, evaluation={"every": 1, "select": "brier"}, name="own")
    seen = Seen()
    run = rescom_timm.train(tree, metrics={"brier": brier}, callbacks=[seen])
    log = lines(run.folder / "metrics.jsonl")
    scores = {line["epoch"]: line["validation/brier"] for line in log if "validation/brier" in line}
    assert [epoch for epoch, _ in seen.epochs] == [epoch for epoch, _ in seen.evaluations] == [1, 2]
    assert [figures["validation"]["brier"] for _, figures in seen.evaluations] == list(scores.values())
    assert {"train/loss", "lr"} <= seen.epochs[0][1].keys()
    record = json.loads((run.folder / "evaluation" / "test-last.json").read_text())
    assert (
        -1 <= record["numbers"]["brier"] <= 1 and "brier" not in record["intervals"] and "brier" not in record["sizes"]
    )
    assert run.evaluate()["brier"] == pytest.approx(record["numbers"]["brier"], abs=1e-5)
    progress = checkpoint.newest(run.folder / "checkpoints")[2]["progress"]
    assert progress["best"] == max(scores.values()) and scores[progress["best_epoch"]] == progress["best"]
    plain = rescom_timm.train(recipe(tmp_path, train__epochs=2, evaluation={"every": 1}, name="plain"))
    for name, value in weights(plain.folder).items():
        assert torch.equal(value, weights(run.folder)[name])


def test_a_hook_that_raises_is_named_and_the_run_resumes_bit_equal(alone, tmp_path):
    class Fails(Seen):
        broken = True

        def on_evaluate(self, epoch, figures):
            super().on_evaluate(epoch, figures)
            if epoch == 2 and self.broken:
                raise KeyError("disk")

    whole = rescom_timm.train(recipe(tmp_path, train__epochs=3, evaluation={"every": 1}, name="whole"))
    tree, fails = recipe(tmp_path, train__epochs=3, evaluation={"every": 1}, name="halted"), Fails()
    with raises("train.callback", "Fails.on_evaluate", "epoch 2", "disk", kind=RunError) as caught:
        rescom_timm.train(tree, callbacks=[fails])
    assert isinstance(caught.value.__cause__, KeyError)
    fails.broken = False
    run = rescom_timm.train(tree, callbacks=[fails], resume=True)
    assert [epoch for epoch, _ in fails.evaluations] == [1, 2, 2, 3] and [epoch for epoch, _ in fails.epochs] == [
        1,
        2,
        3,
    ]
    for name, value in weights(whole.folder).items():
        assert torch.equal(value, weights(run.folder)[name])
    figures = [
        [{key: value for key, value in line.items() if "/" in key} for line in lines(folder / "metrics.jsonl")]
        for folder in (whole.folder, run.folder)
    ]
    assert figures[0] == figures[1]


def test_the_worst_class_is_the_least_accuracy_of_those_with_images():
    own, meter = Own(select="worst_class"), Meter(4)
    assert own.collector() is None
    meter.update(torch.eye(4)[[0, 0, 1, 0, 2]], torch.tensor([0, 0, 1, 1, 2]))
    own.add_to(meter, None)
    assert meter.compute()["worst_class"] == 50 and meter.record()["numbers"]["worst_class"] == 50


@pytest.mark.parametrize(
    "wrong", [lambda y, p: 1 / 0, lambda y, p: float("nan"), lambda y, p: "high", lambda y, p: None]
)
def test_metrics_that_raise_or_are_no_number(wrong):
    own, meter = Own({"mine": wrong}), Meter(3)
    collector = own.collector()
    for one in (meter, collector):
        one.update(torch.rand(5, 3), torch.tensor([0, 1, 2, 0, 1]))
    with raises("train.metric", "'mine'", kind=RunError):
        own.add_to(meter, collector)


def test_names_functions_and_objects_that_cannot_be(alone, tmp_path):
    for name in ("top1", "few_mean_class", "worst_class", "a b", "a/b", "", "\x1b[1m", 3):
        with raises("train.metric"):
            Own({name: brier})
    with raises("train.metric", "'mine'"):
        Own({"mine": 3})
    with raises("train.callback", "object"):
        Own(callbacks=[object()])
    tree = recipe(tmp_path, train__epochs=2, evaluation={"select": "other"})
    with raises("recipe.value", "evaluation.select", "'other'", "brier", "worst_class"):
        rescom_timm.train(tree, metrics={"brier": brier})
    assert not list(tmp_path.glob("*/metrics.jsonl"))
