"""A run opened again: its net and queue, and every figure that they give; without any training."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rescom_timm.analysis import net_plots, plots, style
from rescom_timm.analysis.opened_run import OpenedRun, open_run, take
from rescom_timm.analysis.pages import files
from rescom_timm.analysis.run_files import Missing, RunFolder
from rescom_timm.cli import plot as command
from rescom_timm.data.sources import load as load_data
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import build_method
from rescom_timm.engine.errors import CheckpointError
from tests.raises import raises
from tests.recipes import load_recipe


def save_run(folder: Path, recipe_name: str = "digits_lt", fill: bool = True, *overrides: str) -> Path:
    """A run as training leaves it, with an untrained net and a queue of random keys."""
    recipe = load_recipe(recipe_name, ["speed.workers=0", "data.validation=holdout(0.1)", *overrides])
    data = load_data(recipe.data)
    torch.manual_seed(0)
    method = build_method(recipe, data)
    if fill and method.queue is not None:
        labels = torch.from_numpy(data.train.labels)
        method.queue.enqueue(F.normalize(torch.randn(len(labels), 32), dim=1), labels)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    state = {
        "progress": {"epoch": 3, "best_checkpoint": None, "best_epoch": None},
        "method": {k: v for k, v in method.state_dict().items() if not k.startswith("net.")},
    }
    checkpoint.save(folder / "checkpoints", 7, method.net.state_dict(), state)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "rescom")


@pytest.fixture(scope="module")
def run(folder: Path) -> OpenedRun:
    return open_run(folder)


def test_a_run_is_opened_with_its_weights_and_its_queue(run: OpenedRun, folder: Path) -> None:
    _, weights, state = checkpoint.newest(folder / "checkpoints") or pytest.fail("no checkpoint")
    assert all(torch.equal(value, run.method.net.state_dict()[name]) for name, value in weights.items())
    assert torch.equal(run.queue().keys, state["method"]["queue.keys"]) and not run.method.training
    assert (run.name, run.checkpoint, run.chosen) == ("rescom", "last", "after epoch 3, not selected")
    by_path = open_run(folder, str(folder / "checkpoints" / "step-00000007"), ["data.index=all"])
    assert by_path.checkpoint.startswith("step-00000007-changed-") and by_path.weights == run.weights
    assert len(by_path.data.train.labels) > len(run.data.train.labels)


def test_a_run_opened_otherwise_has_another_name(folder: Path) -> None:
    otherwise = open_run(folder, overrides=["data.index=exponential(9)"])
    assert otherwise.checkpoint.startswith("last-changed-")
    assert otherwise.chosen.endswith("evaluated with data.index=exponential(9)")
    assert open_run(folder, overrides=["evaluation.batch_size=7"]).checkpoint == "last", "which changes no figure"


def test_one_pass_is_the_nets_output_in_the_splits_order(run: OpenedRun) -> None:
    split = take(run.data.test, np.array([3, 400, 40]))
    seen = run.look(split)
    assert seen.features.shape == (3, 64) and seen.embeddings.shape == (3, 32) and seen.logits.shape == (3, 10)
    assert seen.labels.tolist() == run.data.test.labels[[3, 400, 40]].tolist()
    torch.testing.assert_close(seen.embeddings.norm(dim=1), torch.ones(3))
    alone = run.look(take(run.data.test, np.array([400])))
    torch.testing.assert_close(alone.logits[0], seen.logits[1], rtol=1e-3, atol=1e-4)
    augmented = run.look(split, run.recipe.views.train)
    assert not torch.allclose(augmented.logits, seen.logits)
    assert torch.equal(augmented.logits, run.look(split, run.recipe.views.train).logits)


def test_judging_is_looking_without_the_outputs(run: OpenedRun) -> None:
    seen, judged = run.look(run.data.test), list(map(torch.from_numpy, run.judged))
    assert torch.equal(judged[0], seen.labels) and torch.equal(judged[1], seen.logits.argmax(dim=1))
    assert torch.equal(judged[2], seen.logits.softmax(dim=1).amax(dim=1))


def test_both_galleries_take_one_pass(run: OpenedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, passes = dataclasses.replace(run), []
    own = OpenedRun._batches
    monkeypatch.setattr(OpenedRun, "_batches", lambda self, split: [passes.append(split), *own(self, split)][1:])
    net_plots.confident_mistakes(fresh), net_plots.rare_classes(fresh)
    assert passes == [run.data.test]


def test_splits_by_name(run: OpenedRun) -> None:
    assert run.split("validation") is run.data.validation
    without = dataclasses.replace(run, data=dataclasses.replace(run.data, validation=None))
    with raises("data.split", "validation"):
        without.split("validation")


@pytest.mark.parametrize("name", plots.FROM_NET)
def test_every_figure_of_a_net_is_drawn(name: str, run: OpenedRun, tmp_path: Path) -> None:
    module, measure = net_plots.PLOTS[name]
    measured = measure(run)
    paths = style.save(module.draw(measured), module.table(measured), tmp_path / name, dpi=40)
    assert [path.suffix for path in paths] == [".png", ".svg", ".csv"]
    assert len(paths[2].read_text().splitlines()) > 1


def test_figures_tell_what_the_run_holds(run: OpenedRun) -> None:
    counts = run.data.counts
    slots = net_plots.queue_slots(run)
    held = slots.slots["class_balanced (this run)"]
    np.testing.assert_array_equal(held, np.minimum(counts, 16))
    assert slots.slots["fifo (simulated)"].sum() == 160
    assert abs(slots.slots["reversed (simulated)"].sum() - 160) <= 5  # shares are rounded, and every slot is filled
    assert (np.diff(slots.slots["reversed (simulated)"]) >= 0).all()
    sheet = net_plots.contact_sheet(run)
    assert sheet.images.shape == (24, 2, 8, 8, 3) and set(sheet.labels) == set(range(10))
    assert (np.diff(counts[sheet.labels]) <= 0).all() and (sheet.images[:, 0] != sheet.images[:, 1]).any()
    against = net_plots.queue_pairs(run)
    np.testing.assert_allclose(against.expected.sum(axis=0) / against.expected.sum(), held / held.sum())
    found = net_plots.pair_gradients(run)
    assert found.positive_pairs + found.negative_pairs == len(run.data.train.labels) * held.sum()
    near = net_plots.positive_similarity(run)
    assert sum(near.pairs.values()) == (held * counts).sum()


def test_methods_without_a_queue_and_empty_queues_say_so(tmp_path: Path) -> None:
    plain = RunFolder(save_run(tmp_path / "ce", "digits_lt +cross_entropy"))
    drawn = {one.name: one for one in plots.draw_all([plain], ["queues", "gradients", "similarity", "pairs"])}
    for name in ("queues", "gradients", "similarity"):
        assert "method cross_entropy" in drawn[name].missing and "queue" in drawn[name].missing
    assert drawn["pairs"].figure is not None  # the batch's pairs are the data's
    empty = open_run(save_run(tmp_path / "empty", fill=False))
    with raises("plot.queue", "empty", kind=Missing):
        net_plots.queue_slots(empty)


def test_runs_that_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    with raises("checkpoint.missing"):
        open_run(folder, "best")
    with raises("checkpoint.damaged"):
        open_run(folder, str(tmp_path))
    with raises("recipe.unknown_key", "data.sorce", "data.source"):
        open_run(folder, overrides=["data.sorce=x"])
    with raises("checkpoint.differs", kind=CheckpointError):
        open_run(folder, overrides=["net.backbone=resnet32_cifar"])
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    with raises("checkpoint.missing", kind=CheckpointError):
        open_run(tmp_path)


def test_tool_draws_figures_of_the_net_and_reports_them(folder: Path, tmp_path: Path, capsys) -> None:
    words = [str(folder), "--only", "queues,similarity,report", "-o", str(tmp_path), "data.index=exponential(20)"]
    assert command.main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in files("report.html")),
        *(f"{name}.{kind}" for name in ("queues", "similarity") for kind in ("csv", "png", "svg")),
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "Keys of each class in the queue" in page
    assert command.main(["key=value"]) == 1
    assert "error[usage.arguments]: " in capsys.readouterr().err
