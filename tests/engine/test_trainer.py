"""The loop: learning, the best epoch, what is not finite, precision, accumulation, the schedule, compilation.
Resume and processes have files of their own."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import flat, load_dict
from rescom_timm.config.loading import load as load_recipe
from rescom_timm.config.recipe import RecipeError, SpeedConfig
from rescom_timm.data.digits import digits
from rescom_timm.engine import checkpoint, log, nonfinite
from rescom_timm.engine import trainer as training
from rescom_timm.engine.build import speed_up
from rescom_timm.engine.errors import Stopped, with_advice
from rescom_timm.engine.evaluate import evaluate, evaluate_run
from rescom_timm.engine.launch import refuse_what_cannot_be_sharded
from rescom_timm.engine.run_folder import lines
from rescom_timm.engine.run_folder import locked as held
from rescom_timm.engine.state import Progress, check_resumable
from rescom_timm.hub import publish
from tests.engine.child import Launch, differences, figures, last, recipe, run, trainer_of
from tests.raises import raises

DIGITS = Path(__file__).parents[2] / "recipes/digits_lt.yaml"


def losses(trainer, steps):
    """Of the first steps of the first epoch."""
    trainer.method.train()
    told = []
    for _, batch in zip(range(steps), trainer.completed(trainer.loader), strict=False):
        told.append(trainer.step.forward_backward(batch, last=True)["loss"])
        trainer.step.update(finite=True)
    return torch.stack(told)


# ------------------------------------------------------------------------------------------------------------ learning


def test_a_run_learns(alone, tmp_path):
    tree = recipe(
        tmp_path, net__backbone="resnet20_cifar", method={"name": "balanced_softmax"}, train__epochs=4,
        evaluation__every=4, data__validation="none",
    )  # fmt: skip
    train(load_dict(tree))
    first, *_, trained, evaluated = figures(tree)
    assert trained["train/loss"] < 0.6 * first["train/loss"]
    assert trained["train/top1"] > 30 and evaluated["test/top1"] > 40, "chance is 10"


def test_the_figures_of_an_epoch_are_the_means_of_its_forward_passes(alone, tmp_path):
    tree = recipe(tmp_path, train__accumulate=2, train__epochs=1, schedule__warmup_epochs=0)
    trainer, seen = trainer_of(tree), []

    def note(method, args, outputs):
        right = outputs["logits"].argmax(dim=1) == args[0]["label"].repeat(method.views)
        seen.append((outputs["loss"].item(), 100 * right.float().mean().item()))

    trainer.method.register_forward_hook(note)
    trainer.open(resume=False)
    trainer.fit()
    trainer.close()
    assert len(seen) == 22
    told = figures(tree)[0]
    assert [told["train/loss"], told["train/top1"]] == pytest.approx(np.mean(seen, axis=0), rel=1e-5)


def test_the_seed_decides_weights_noise_and_rows(alone, tmp_path):
    """As they are at the start, which a run of no epochs saves."""
    weights, noise, rows = [], [], []
    for number, seed in enumerate((0, 0, 1)):
        tree = recipe(tmp_path / str(number), seed=seed, train__epochs=0)
        train(load_dict(tree))
        net, state = last(tree)
        weights.append(net["classifier.weight"])
        noise.append(state["ranks"][0]["random"])
        rows.append(next(iter(trainer_of(recipe(tmp_path, seed=seed)).loader))["row"])
    for told in (weights, noise, rows):
        assert differences(told[0], told[1]) == [] != differences(told[0], told[2])


@pytest.mark.slow
def test_processes_draw_noise_of_their_own(tmp_path):
    tree = recipe(tmp_path, train__epochs=0)
    run(tree, ranks=2)
    first, second = (rank["random"] for rank in last(tree)[1]["ranks"])
    assert all(differences(first[kind], second[kind]) for kind in ("python", "numpy", "torch"))


def test_the_gradient_is_clipped(alone, tmp_path):
    moved = []
    for norm in (None, 1e-6):
        trainer = trainer_of(recipe(tmp_path, optimizer__clip_norm=norm, optimizer__weight_decay=0.0))
        before = nn.utils.parameters_to_vector(trainer.net.parameters()).clone()
        losses(trainer, 1)
        moved.append((nn.utils.parameters_to_vector(trainer.net.parameters()) - before).norm().item())
    assert moved[0] > 0.01
    assert moved[1] < 1.01e-7  # at a learning rate of 0.1


# ------------------------------------------------------------------------------------------------------------ the best

SCORES = {
    "validation": {"top1": (30.0, 20.0, 10.0), "few": (10.0, 30.0, 20.0)},
    "test": {"top1": (30.0, 20.0, 10.0), "few": (30.0, 20.0, 10.0)},
}
"""Of three epochs."""


def scripted(seen):
    """evaluate, whose figures in the n-th evaluation of a split are the n-th of SCORES, whatever the net."""

    def told(accelerator, net, loader, *more, **named):
        meter = evaluate(accelerator, net, loader, *more, **named)
        split = "test" if len(loader.dataset) == 500 else "validation"
        epoch = min(seen[split], 2)
        seen[split] += 1
        meter.compute = lambda: {name: scores[epoch] for name, scores in SCORES[split].items()}
        return meter

    return told


def test_the_best_epoch_is_chosen_by_the_figure_on_validation_saved_and_evaluated(alone, tmp_path):
    alone.setattr(training, "evaluate", scripted(Counter()))
    tree = recipe(tmp_path, evaluation__select="few", checkpoint={"every": 5, "keep": 1})
    folder = train(load_dict(tree))
    progress = last(tree)[1]["progress"]
    assert (progress["best"], progress["best_epoch"], progress["best_checkpoint"]) == (30.0, 2, "step-00000022")
    saved = checkpoint.listed(folder / "checkpoints")
    assert [path.name for path in saved] == ["step-00000022", "step-00000033"]
    evaluate_run(folder, which=saved[0].name)
    names = ("best", "last", "step-00000022")
    best, final, anew = (load_file(folder / "evaluation" / f"test-{name}.safetensors") for name in names)
    assert differences(best, anew) == []
    assert not torch.equal(best["confidence"], final["confidence"])


def test_patience_ends_a_training_that_gets_no_better_and_a_resumed_one_at_the_same_epoch(alone, tmp_path):
    alone.setattr(training, "evaluate", scripted(Counter()))
    tree = recipe(tmp_path, train__epochs=9, evaluation__select="few", evaluation__patience=2)
    folder = train(load_dict(tree))  # the best is epoch 2, those after it are worse
    assert last(tree)[1]["progress"]["epoch"] == 4 and len(figures(tree)) == 8
    shutil.rmtree(folder / "checkpoints" / "step-00000044")
    alone.setattr(training, "evaluate", scripted(Counter(validation=3, test=3)))
    for _ in range(2):  # from epoch 3, and once more where it has ended
        train(load_dict(tree), resume=True)
        assert last(tree)[1]["progress"]["epoch"] == 4 and len(figures(tree)) == 8
    with raises("recipe.conflict", "evaluation.patience", "data.validation"):
        load_dict(recipe(tmp_path, evaluation__patience=2, data__validation="none"))
    with raises("recipe.value", "patience"):
        load_dict(recipe(tmp_path, evaluation__patience=0))


def test_a_figure_that_validation_does_not_have_is_refused_before_anything_is_trained(tmp_path):
    with raises("recipe.conflict", "evaluation.select", "few"):
        train(load_dict(recipe(tmp_path, data__index="step(1)", evaluation__select="few")))
    with raises("recipe.value", "evaluation.select", "'topl'", "top1", "few", "mean_class", "worst_class"):
        train(load_dict(recipe(tmp_path, evaluation__select="topl")))
    with raises("recipe.value", "evaluation.select", "'ece'"):
        train(load_dict(recipe(tmp_path, evaluation__select="ece", data__validation="none")))
    assert not any(tmp_path.iterdir())


def test_images_of_a_size_that_the_net_does_not_take_are_refused_before_anything_is_trained(tmp_path):
    words = [f"output={tmp_path}", "net.backbone=test_vit", "net.projector.hidden=8"]
    with raises("recipe.conflict", "test_vit", "8 x 8", "net.options.img_size=8"):
        train(load_recipe(DIGITS, words))
    assert not any(tmp_path.iterdir())
    train(load_recipe(DIGITS, [*words, "net.options={img_size: 8, patch_size: 4}"]), dry_run=True)


def test_the_hub_is_offered_every_checkpoint_and_at_the_end_the_best(alone, tmp_path):
    offered = []

    class Recorder:
        def __init__(self, config, folder):
            self.saved = lambda *names: offered.append(("saved", *names))
            self.finished = lambda *names: offered.append(("finished", *names))
            self.wait = lambda: offered.append(("wait",))

    alone.setattr(training, "evaluate", scripted(Counter()))
    alone.setattr(publish, "Pusher", Recorder)
    train(load_dict(recipe(tmp_path, evaluation__select="few")))
    first, second, third = "step-00000011", "step-00000022", "step-00000033"
    saved = [("saved", first, first), ("saved", second, second), ("saved", third, second)]
    assert offered == [*saved, ("finished", third, second), ("wait",)]


# ---------------------------------------------------------------------------------------------------------- not finite


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    tree = recipe(tmp_path, train__epochs=3)
    launch = Launch(tree, fault=[("poison", [15]), ("watch", str(tmp_path))])
    assert launch.wait() == [1]
    said = r"error\[train.nonfinite\]: the loss is not finite in epoch 1, step 14 \(learning rate 0\.0750003, \{'loss'"
    assert re.search(said, launch.text)
    assert "Traceback" not in launch.text
    record = json.loads((tmp_path / "run" / "nonfinite-step14-process0.json").read_text())
    rows = json.loads((tmp_path / "watch-0.jsonl").read_text().splitlines()[14])["rows"]
    assert record == {"epoch": 1, "step": 14, "lr": pytest.approx(0.075, rel=1e-3), "rows": rows} and len(rows) == 32
    assert [path.name for path in checkpoint.listed(tmp_path / "run" / "checkpoints")] == ["step-00000011"]
    tree = recipe(tmp_path, train__epochs=3, train__nonfinite="skip")
    run(tree, resume=True, fault=("poison", [4]))  # as its message says
    assert figures(tree)[2]["train/skipped"] == 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skip_leaves_weights_statistics_and_queue_as_they_were_in_all_processes(tmp_path, what):
    tree = recipe(tmp_path, train__epochs=2, train__nonfinite="skip", train__accumulate=2)
    launch = run(tree, ranks=2, fault=[("poison", [9, 26], what), ("watch", str(tmp_path))])
    for rank in range(2):
        steps = [json.loads(line) for line in (tmp_path / f"watch-{rank}.jsonl").read_text().splitlines()]
        assert [i for i, step in enumerate(steps) if not step["done"]] == [4, 12]
        for skipped in (4, 12):  # both halves of the step
            assert steps[skipped]["net"] == steps[skipped - 1]["net"] != steps[skipped + 1]["net"]
        if what == "loss":
            rows = json.loads((tmp_path / "run" / f"nonfinite-step4-process{rank}.json").read_text())["rows"]
            assert rows == steps[4]["rows"][:8]
    told = figures(tree)
    assert [line.get("train/skipped") for line in told] == [1, None, 1, None]
    assert all(math.isfinite(value) for line in told for value in line.values())
    if what == "loss":
        assert "epoch 0, step 4 (learning rate 0.1" in launch.text and "the batch is left out" in launch.text
    assert last(tree)[1]["progress"]["step"] == 22


def test_undo_is_exact(alone, tmp_path):
    """Weights, buffers and queue, bit for bit; the run then goes on as if the batch had not been."""
    trainer = trainer_of(recipe(tmp_path, train__nonfinite="skip"))
    losses(trainer, 3)
    state = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    before = {name: buffer.clone() for name, buffer in trainer.method.named_buffers()}
    batch = next(iter(trainer.loader))
    trainer.step.forward_backward(batch, last=True)
    assert any(not torch.equal(value, state[name]) for name, value in trainer.method.state_dict().items())
    assert trainer.step.update(finite=False) is False
    nonfinite.put_back(trainer.method, before)
    for name, value in trainer.method.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in trainer.net.parameters())


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("method", ["rescom", "dro_lt", "causal_norm"])
def test_a_skipped_step_leaves_no_buffer_moved_by_any_of_its_passes(alone, tmp_path, method, part):
    """BatchNorm's statistics, keys of the queue, centroids, mean feature: as they were before the step's first pass."""
    own = {"queue": {"per_class": 4}, "positives": 1, "negatives": 20} if method == "rescom" else {}
    trainer = trainer_of(recipe(tmp_path, train__nonfinite="skip", train__accumulate=2, train__epochs=1,
                                schedule__warmup_epochs=0, method={"name": method, **own}))  # fmt: skip
    before, seen, passed = [], trainer.mixed, trainer.step.forward_backward

    def first_of_a_step(batch, index):
        if index % 2 == 0:
            before.append({name: buffer.clone() for name, buffer in trainer.method.named_buffers()})
        return seen(batch, index)

    def poisoned(batch, last):
        outputs = passed(batch, last)
        return {**outputs, "loss": outputs["loss"] * math.nan} if len(before) == 4 and last == part else outputs

    trainer.mixed, trainer.step.forward_backward = first_of_a_step, poisoned
    trainer.open(resume=False)
    with pytest.warns(RuntimeWarning):
        trainer.fit()
    trainer.close()
    moved = [differences(one, other) for one, other in itertools.pairwise(before)]
    assert [not names for names in moved] == [step == 3 for step in range(len(moved))], moved[3]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A finite loss whose gradient is not, in the last step of an epoch: no later loss tells of it before the save."""
    launch = Launch(recipe(tmp_path, train__epochs=2, evaluation__every=5), fault=("poison", [11], "gradient"))
    assert launch.wait() == [1]
    assert "error[train.nonfinite]" in launch.text and "step 11" in launch.text
    assert checkpoint.listed(tmp_path / "run" / "checkpoints") == []


def test_a_finished_run_whose_weights_are_no_numbers_is_not_gone_on_with(alone, tmp_path):
    tree = recipe(tmp_path, train__epochs=1, schedule__warmup_epochs=0)
    folder = train(load_dict(tree))
    (path,) = checkpoint.listed(folder / "checkpoints")
    net, state = checkpoint.load(path)
    shutil.rmtree(path)
    checkpoint.save(
        path.parent, state["progress"]["step"], {**net, "classifier.bias": net["classifier.bias"] * math.nan}, state
    )
    with raises("checkpoint.differs", "classifier.bias"):
        train(load_dict(tree), resume=True)


def test_a_model_that_cannot_be_written_fails_the_run_which_then_is_finished(alone, tmp_path, monkeypatch):
    def full(*arguments, **words):
        raise OSError(28, "No space left on device")

    tree = recipe(tmp_path, train__epochs=1, schedule__warmup_epochs=0)
    with monkeypatch.context() as patch:
        patch.setattr(publish, "save_model", full)
        with raises("run.export", tmp_path / "run", "No space left", kind=checkpoint.CheckpointError):
            train(load_dict(tree))
    assert not (tmp_path / "run" / "model").exists()
    assert train(load_dict(tree), resume=True) == tmp_path / "run" and (tmp_path / "run" / "model").is_dir()


def test_two_trainings_of_one_folder_are_refused(alone, tmp_path):
    tree = recipe(tmp_path, train__epochs=1, schedule__warmup_epochs=0)
    folder = train(load_dict(tree))
    before = (folder / "metrics.jsonl").read_bytes()
    with held(folder):
        launch = Launch(tree, resume=True)
        assert launch.wait() == [1]
    assert f"CheckpointError: error[run.locked]: {folder} is being trained by process {os.getpid()} on" in launch.text
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_log_has_a_line_an_epoch_and_nothing_drawn_over(alone, tmp_path, capsys):
    train(load_dict(recipe(tmp_path, train__epochs=2)))
    told = capsys.readouterr()
    first, second = [line for line in told.out.splitlines() if re.match(r"epoch \d/2: ", line)]
    pattern = (
        r"epoch 1/2: loss [\d.]+, .*top1 [\d.]+, [\d,]+ images/s, 0:\d\d:\d\d trained, .* left, [\d.]+ GiB at most"
    )
    assert re.fullmatch(pattern, first)
    assert "trained, 0:00:00 left, " in second and "\r" not in told.out + told.err
    evaluations = [line for line in told.out.splitlines() if line.startswith("after epoch ")]
    pattern = r"after epoch (\d): test  top1 [\d.]+ \([\d.]+-[\d.]+\)  .*; validation  top1 .*"
    assert [re.fullmatch(pattern, line)[1] for line in evaluations] == ["1", "2"]


def folder_of_digits(root: Path, broken: bytes | None) -> dict[str, object]:
    """A data section over files, one test image of which is `broken`."""
    for part in ("train", "test"):
        rows = digits(part).select(range(60))
        (root / part).mkdir(parents=True)
        for k, row in enumerate(rows):
            (root / part / f"{k}.png").write_bytes(row["image"]["bytes"])
        lines = [f"{part}/{k}.png {label}" for k, label in enumerate(rows["label"])]
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    if broken is not None:
        path = root / "test" / "7.png"
        path.write_bytes(broken or path.read_bytes()[:70])
    return {"source": str(root), "index": str(root / "train.txt"), "test_index": str(root / "test.txt")}


def test_a_test_image_that_is_none_is_found_before_training(alone, tmp_path):
    data = folder_of_digits(tmp_path / "data", b"no image")
    tree = recipe(tmp_path, data=data, loader={"broken": "skip"}, train__batch_size=16, method__negatives=5)
    with raises("image.unreadable", "test.txt", "test/7.png", kind=RecipeError):
        train(load_dict(tree))
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_fails_loses_no_epoch(alone, tmp_path):
    """A test image that was cut off: its header is good."""
    data = folder_of_digits(tmp_path / "data", b"")
    words = {"data": data, "train__batch_size": 16, "method__queue__per_class": 2, "evaluation__every": 2}
    tree = recipe(tmp_path, **words, checkpoint={"every": 100}, method__negatives=5)
    with raises("image.unreadable", "test/7.png"):
        train(load_dict(tree))
    assert [path.name for path in checkpoint.listed(tmp_path / "run/checkpoints")] == ["step-00000006"]
    (tmp_path / "data/test/7.png").write_bytes((tmp_path / "data/test/8.png").read_bytes())
    folder = train(load_dict(tree), resume=True)
    assert last(tree)[1]["progress"]["epoch"] == 3 and (folder / "evaluation/test-last.json").is_file()


@pytest.mark.parametrize("batch_size", [32, 364], ids=["within an epoch", "at its end"])
def test_a_run_that_is_asked_to_stop_stops_where_it_cannot_save_too(alone, tmp_path, monkeypatch, batch_size):
    """Else a sweep would go on with its next run."""

    def full(*arguments):
        raise checkpoint.CheckpointError("file.failed", "no space")

    trainer = trainer_of(recipe(tmp_path, train__batch_size=batch_size, data__validation="none", data__index="all"))
    trainer.open(resume=False)
    monkeypatch.setattr(checkpoint, "save", full)
    trainer.signals.requested = True
    with pytest.raises(Stopped, match=": no space"):
        trainer.fit()
    trainer.close()


def test_the_progress_bar_shows_each_epoch_and_the_last_table_is_printed_once(alone, tmp_path, monkeypatch, capsys):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(log, "MININTERVAL", 0.0)
    folder = train(load_dict(recipe(tmp_path, train__epochs=2)))
    means = [line["train/loss"] for line in lines(folder / "metrics.jsonl") if "train/loss" in line]
    drawn = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "% of training" in line]
    for epoch, loss in enumerate(means, start=1):
        shown = [line for line in drawn if line.startswith(f"epoch {epoch}/2: ")]
        assert len(shown) > 5 and f"loss {loss:.3f}, top1 " in shown[-1]
        assert sum("loss " in line for line in shown) > 5, "before the epoch has ended"
        others = [len(line) - len(line.split("|")[1]) for line in shown]
        assert max(others) <= 95, "25 of 120 columns are left to the bar"
    told = capsys.readouterr().out
    assert "after epoch 1\n" in told and "after epoch 2\n" not in told


@pytest.mark.parametrize(("images", "steps", "left"), [(364, 11, 12), (352, 11, 0), (63, 1, 31)])
def test_images_that_fill_no_batch_are_named(images, steps, left):
    line = log.trained_line({"trained": 1, "all": 4}, images, steps, 32)
    assert line.startswith("25.0% of 0.00 M weights train")
    assert (f"leaves out {left} of {images} images" in line) == bool(left) == ("leaves out" in line)


def test_a_lost_worker_and_a_full_gpu_are_told_with_what_to_do():
    lost = "DataLoader worker (pid 7) is killed by signal: Killed. "
    with raises("system.process", "speed.workers", "--resume", kind=checkpoint.CheckpointError), with_advice():
        raise RuntimeError(lost)
    with raises("train.memory", "train.accumulate", kind=RecipeError), with_advice():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with raises("file.failed", "'x'", "disk space", kind=checkpoint.CheckpointError), with_advice():
        raise OSError(28, "No space left on device", "x")
    with pytest.raises(RuntimeError, match=r"^another$"), with_advice():
        raise RuntimeError("another")


def test_an_epoch_without_one_finite_loss_ends_the_run(tmp_path):
    tree = recipe(tmp_path, train__epochs=2, train__nonfinite="skip", train__batch_size=64)
    launch = Launch(tree, fault=("poison", list(range(1, 9))))
    assert launch.wait() == [1]
    assert "no batch of epoch 0 had a finite loss" in launch.text


# ----------------------------------------------------------------------------------------------------------- precision


def test_bf16_on_a_cpu_has_its_loss_in_float32(alone, tmp_path):
    trainer = trainer_of(recipe(tmp_path, train__precision="bf16"))
    seen = []
    trainer.net.encoder.body[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer.net.projector[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    told = losses(trainer, 3)
    assert set(seen) == {torch.bfloat16}
    assert told.dtype == torch.float32 and bool(told.isfinite().all())
    assert {parameter.dtype for parameter in trainer.net.parameters()} == {torch.float32}
    assert trainer.method.queue.keys.dtype == torch.float32


def test_bf16_is_near_float32(alone, tmp_path):
    exact = losses(trainer_of(recipe(tmp_path, net__options={"drop": 0.0})), 3)
    AcceleratorState._reset_state(True)
    rough = losses(trainer_of(recipe(tmp_path, net__options={"drop": 0.0}, train__precision="bf16")), 3)
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.02, atol=0.02)


# -------------------------------------------------------------------------------------------------------- accumulation


def test_accumulated_gradients_are_those_of_the_big_batch(alone, tmp_path):
    """Where no layer and no loss looks at other images: without BatchNorm and without pairs."""
    weights = []
    for accumulate in (1, 4):
        tree = recipe(
            tmp_path / str(accumulate), train__accumulate=accumulate, train__epochs=1, schedule__warmup_epochs=0,
            method={"name": "balanced_softmax"}, net__options={"norm": False, "drop": 0.0},
        )  # fmt: skip
        trainer = trainer_of(tree)
        trainer.method.double()
        trainer.open(resume=False)
        trainer.fit()
        trainer.close()
        assert trainer.progress.step == 11
        weights.append(trainer.net.state_dict())
    for name, value in weights[0].items():
        if not name.startswith("projector."):  # not trained here, but its BatchNorm sees the images
            torch.testing.assert_close(value, weights[1][name], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ schedule


def test_the_schedule_is_applied(tmp_path):
    tree = recipe(tmp_path, train__epochs=4, schedule={"name": "steps", "milestones": [2, 3], "warmup_epochs": 2})
    run(tree)
    rates = [line["lr"] for line in figures(tree) if "lr" in line]
    assert rates == pytest.approx([0.05, 0.1, 0.01, 0.001])


def test_the_schedule_by_updates_is_applied_before_each_step(alone, tmp_path):
    trainer = trainer_of(recipe(tmp_path, train__epochs=2, schedule__by="update", train__accumulate=2))
    update, rates = trainer.step.update, []
    trainer.step.update = lambda finite: rates.append(trainer.optimizer.param_groups[0]["lr"]) or update(finite)
    trainer.open(resume=False)
    trainer.fit()
    trainer.close()
    cosine = [0.1 * (1e-5 + (1 - 1e-5) * (1 + math.cos(math.pi * k / 12)) / 2) for k in range(1, 12)]
    assert rates == pytest.approx([0.1 * (k + 1) / 11 for k in range(11)] + cosine)


# ------------------------------------------------------------------------------------------------------------- signals


def test_handlers_are_put_back(alone, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(load_dict(recipe(tmp_path, train__epochs=1, schedule__warmup_epochs=0, data__validation="none")))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_flat():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("backbone", ["tiny_for_tests", "resnet20_cifar"])
@pytest.mark.slow
def test_no_graph_break_inside_the_net(alone, tmp_path, backbone, precision):
    """As accelerate prepared it, with its wrapper of mixed precision. An eager backend shows breaks as any other."""
    torch._dynamo.reset()
    tree = recipe(tmp_path, net__backbone=backbone, train__precision=precision)
    trainer = trainer_of(tree)
    trainer.method.train()
    batch = next(iter(trainer.loader))
    images = batch["image"].transpose(0, 1).flatten(0, 1)
    explained = torch._dynamo.explain(trainer.method.net)(images)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1
    torch._dynamo.reset()


def test_speed_up_is_in_place(monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    speed_up(net, SpeedConfig())
    assert asked == [] and net[0].weight.is_contiguous()
    speed_up(net, SpeedConfig(compile="reduce-overhead", channels_last=True))
    assert asked == [{"fullgraph": True, "mode": "reduce-overhead"}]
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    with raises("recipe.value", "speed.compile"):
        load_dict({"data": {"source": "digits"}, "speed": {"compile": "fast"}})


def test_channels_last_trains_the_same(alone, tmp_path):
    options = {"drop": 0.0}  # dropout draws in the order of memory
    one = losses(trainer_of(recipe(tmp_path, net__options=options)), 3)
    other = losses(trainer_of(recipe(tmp_path, net__options=options, speed__channels_last=True)), 3)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_losses_are_the_same_and_the_checkpoint_is_plain(tmp_path):
    """By the recipe's switch, with the real compiler (on a CPU: a C++ one)."""
    changes = {"train__epochs": 2, "net__options": {"drop": 0.0}}
    plain, compiled = recipe(tmp_path / "a", **changes), recipe(tmp_path / "b", speed__compile=True, **changes)
    run(plain)
    assert Launch(compiled, fault=("signal_at_pass", signal.SIGTERM, 5)).wait(600) == [143]
    resumed = Launch(compiled, resume=True)
    assert resumed.wait(600) == [0], resumed.text
    for one, other in zip(figures(plain), figures(compiled), strict=True):
        assert one["epoch"] == other["epoch"]
        if "train/loss" in one:
            assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
    assert list(last(plain)[0]) == list(last(compiled)[0])


# ------------------------------------------------------------------------------------------------------- ways of launch


def way(kind, fsdp2=False):
    return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2)


def test_ways_that_this_loop_cannot_save_are_refused(tmp_path):
    made = load_dict(recipe(tmp_path))
    inside, outside = nn.Module(), nn.Module()
    inside.fits_head = outside.fits_head = False
    inside.net, outside.net, outside.momentum_net = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        with raises("train.distributed", kind.value):
            refuse_what_cannot_be_sharded(way(kind), made, inside)
    with raises("train.distributed", "momentum_net.weight"):
        refuse_what_cannot_be_sharded(way(DistributedType.FSDP, True), made, outside)
    skipping = load_dict(recipe(tmp_path, train__nonfinite="skip"))
    with raises("train.distributed", "train.nonfinite: skip"):
        refuse_what_cannot_be_sharded(way(DistributedType.FSDP, True), skipping, inside)
    averaging = load_dict(recipe(tmp_path, train__ema={}))
    with raises("train.distributed", "train.ema"):
        refuse_what_cannot_be_sharded(way(DistributedType.FSDP, True), averaging, inside)
    refuse_what_cannot_be_sharded(way(DistributedType.FSDP, True), made, inside)
    refuse_what_cannot_be_sharded(way(DistributedType.MULTI_GPU), made, outside)


def test_the_same_rows_from_another_place_go_on_and_other_rows_do_not(tmp_path):
    saved = load_recipe(DIGITS)
    moved = load_recipe(DIGITS, ["data.source=/elsewhere"])
    split = SimpleNamespace(name="digits train")
    data = SimpleNamespace(provenance={"train": {"sha256": "a"}}, train=split, class_names=None)
    check_resumable(tmp_path, saved.to_dict(), "a", moved, data, tmp_path)
    with raises("checkpoint.differs", "digits train"):
        check_resumable(tmp_path, saved.to_dict(), "b", moved, data, tmp_path)


WORDS = {
    True: "name=a output=b data.source=c evaluation.every=3 evaluation.batch_size=9 checkpoint.keep=9 speed.workers=3 "
    "train.nonfinite=skip hub.strategy=every_save",
    False: "seed=1 data.index=all views.train=none loader.sampler=class_balanced net.backbone=resnet56_cifar "
    "method.temperature=0.3 optimizer.lr=0.01 schedule.warmup_epochs=9 train.batch_size=8 train.epochs=99 "
    "evaluation.select=few",
}
"""Whether a run goes on with them: they do not change what is trained."""


@pytest.mark.parametrize(("free", "word"), [(free, word) for free, words in WORDS.items() for word in words.split()])
def test_a_run_goes_on_with_what_changes_nothing_that_is_trained(tmp_path, free, word):
    saved, changed = load_recipe(DIGITS), load_recipe(DIGITS, [word])
    assert changed != saved
    data = SimpleNamespace(provenance={"train": {"sha256": "a"}}, train=SimpleNamespace(name="x"), class_names=None)
    if free:
        check_resumable(tmp_path, saved.to_dict(), "a", changed, data, tmp_path)
    else:
        with raises("checkpoint.differs", f": {word.split('=')[0]} ("):
            check_resumable(tmp_path, saved.to_dict(), "a", changed, data, tmp_path)


def test_views_finished_on_the_device_are_the_same_where_nothing_is_warped(tmp_path):
    changes = {"views__train": "crop(8,1) | flip"}
    on_the_cpu = losses(trainer_of(recipe(tmp_path, **changes)), 3)
    on_the_device = losses(trainer_of(recipe(tmp_path, loader__device_views=True, **changes)), 3)
    assert torch.equal(on_the_cpu, on_the_device)


def test_a_captured_step_is_the_step(alone, tmp_path):
    """On a CPU it runs uncaptured, over the tensors and with the optimizer that would be captured."""
    told = {}
    for name, capture in (("plain", False), ("captured", True)):
        once = {"train__epochs": 1, "schedule__warmup_epochs": 0}  # rounding grows with the steps
        tree = recipe(tmp_path / name, speed__capture=capture, net__options={"drop": 0.0}, **once)
        train(load_dict(tree))
        told[name] = figures(tree), last(tree)
    for ours, theirs in zip(told["captured"][0], told["plain"][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    (ours, state), (theirs, other) = told["captured"][1], told["plain"][1]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name].float(), value.float(), rtol=1e-4, atol=1e-5), name
    for group, its in zip(state["optimizer"]["param_groups"], other["optimizer"]["param_groups"], strict=True):
        assert group["lr"] == its["lr"] and type(group["lr"]) is float, "a checkpoint says numbers"


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_other_optimizers_are_captured(alone, tmp_path, name):
    rates = {"optimizer__name": name, "optimizer__lr": 1e-2, "train__epochs": 1, "schedule__warmup_epochs": 0}
    told = []
    for capture in (False, True):
        tree = recipe(tmp_path / str(capture), speed__capture=capture, **rates)
        train(load_dict(tree))
        told.append(figures(tree)[0]["train/loss"])
    assert told[1] == pytest.approx(told[0], rel=1e-4)


def test_a_captured_run_goes_on_with_the_bits_of_the_whole_one(alone, tmp_path):
    whole, cut = (recipe(tmp_path / name, speed__capture=True, speed__resident=True) for name in ("whole", "cut"))
    train(load_dict(whole))
    train(load_dict(cut))
    for newer in sorted((tmp_path / "cut/run/checkpoints").iterdir())[1:]:
        shutil.rmtree(newer)
    train(load_dict(cut), resume=True)
    assert differences(last(whole), last(cut)) == []


def test_a_run_that_was_not_captured_goes_on_captured(alone, tmp_path):
    tree = recipe(tmp_path)
    train(load_dict(tree))
    before = figures(tree)
    for newer in sorted((tmp_path / "run/checkpoints").iterdir())[1:]:
        shutil.rmtree(newer)
    train(load_dict({**tree, "speed": {**tree["speed"], "capture": True}}), resume=True)
    for ours, theirs in zip(figures(tree), before, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- mixed batches


def test_each_pass_is_mixed_by_draws_of_its_own_and_the_loader_draws_the_same(alone, tmp_path):
    plain = trainer_of(recipe(tmp_path, method={"name": "cross_entropy"}))
    trainer = trainer_of(recipe(tmp_path, method={"name": "cross_entropy"}, mix={"mixup": 1.0}))
    shares = []
    for index, (batch, untouched) in enumerate(zip(trainer.loader, plain.loader, strict=True)):
        assert torch.equal(batch["image"], untouched["image"])
        mixed, again = trainer.mixed(batch, index), trainer.mixed(batch, index)
        assert torch.equal(mixed["image"], again["image"])
        own = trainer.net.normalize(batch["image"])
        draws = np.random.default_rng((0, 0, index, 0))
        draws.random()
        share = draws.beta(1.0, 1.0)
        order = torch.from_numpy(draws.permutation(len(own)))
        torch.testing.assert_close(mixed["image"], share * own + (1 - share) * own[order])
        shares.append(share)
    assert len(set(shares)) == len(shares) == 11
    trainer.progress.epoch = 1
    assert trainer.mixed(batch, index)["share"] != shares[-1]


def test_a_mixed_run_learns(alone, tmp_path):
    tree = recipe(
        tmp_path, net__backbone="resnet20_cifar", method={"name": "cross_entropy"}, train__epochs=4,
        evaluation__every=4, data__validation="none", mix={"mixup": 0.2, "cutmix": 1.0},
    )  # fmt: skip
    train(load_dict(tree))
    assert figures(tree)[-1]["test/top1"] > 30, "chance is 10"


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, ["mix", "rescom"]),
        ({"method": {"name": "lade"}}, ["mix", "lade", "cross_entropy, balanced_softmax, focal"]),
        ({"method": {"name": "focal"}, "speed__capture": True}, ["speed.capture", "mix"]),
    ],
)
def test_what_cannot_be_mixed_is_an_error(tmp_path, changes, keys):
    with pytest.raises(RecipeError) as caught:
        load_dict(recipe(tmp_path, **{"mix": {"mixup": 0.2}, **changes}))
    assert all(key in str(caught.value) for key in keys)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train__accumulate": 2}, "train.accumulate"),
        ({"train__nonfinite": "skip"}, "train.nonfinite: skip"),
        ({"train__precision": "fp16"}, "train.precision: fp16"),
        ({"speed__compile": "reduce-overhead"}, "speed.compile: reduce-overhead"),
        ({"optimizer__name": "lamb"}, "optimizer.name"),
    ],
)
def test_what_cannot_be_captured_is_an_error(alone, tmp_path, changes, key):
    with raises("recipe.conflict", "speed.capture", key):
        train(load_dict(recipe(tmp_path, speed__capture=True, **changes)))


def test_the_share_of_trained_weights_is_told(tmp_path, capsys):
    train(load_dict(recipe(tmp_path)), dry_run=True)
    assert "; 100.0% of " in capsys.readouterr().out
    train(load_dict(recipe(tmp_path, net__trainable=["none"])), dry_run=True)
    told = re.search(r"; ([0-9.]+)% of ([0-9.]+) M weights train", capsys.readouterr().out)
    assert told and 0 < float(told[1]) < 100
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "net",
    [
        {"backbone": "resnet20_cifar"},
        {"backbone": "test_vit", "options": {"img_size": 8, "patch_size": 4, "drop_path_rate": 0.3}},
    ],
    ids=lambda net: net["backbone"],
)
@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_what_is_kept(alone, tmp_path, net):
    """Weights, BatchNorm's statistics and figures bit for bit; fewer bytes are saved for the backward pass."""
    trees = [
        recipe(tmp_path / str(on), net=net, speed__grad_checkpointing=on, train__epochs=1, schedule__warmup_epochs=0)
        for on in (False, True)
    ]
    for tree in trees:
        train(load_dict(tree))
    assert differences(last(trees[0]), last(trees[1])) == []
    saved = []
    for tree in trees:
        trainer = trainer_of({**tree, "output": str(tmp_path / "none")})
        images = torch.rand(16, 3, 8, 8)
        kept: dict[int, int] = {}

        def keep(value, kept=kept):
            kept[value.data_ptr()] = value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            trainer.net.encoder(images)
        saved.append(sum(kept.values()))
    assert saved[1] < 0.5 * saved[0]


def test_gradient_checkpointing_that_cannot_be(alone, tmp_path):
    tree = recipe(tmp_path, speed__grad_checkpointing=True)
    tree["net"] = {"backbone": "vgg11", "options": {}}
    with raises("recipe.conflict", "speed.grad_checkpointing"):
        trainer_of(tree)
    tree["speed"]["compile"] = True
    with raises("recipe.conflict", "speed.compile"):
        load_dict(tree)


def test_the_first_of_equal_scores_is_the_best():
    """A later epoch that is only as good neither replaces the checkpoint nor starts the patience anew."""
    progress, recipe_ = Progress(), load_dict(recipe("x", evaluation__patience=2, train__epochs=9))
    best = []
    for score in (50.0, 50.0, 60.0, 60.0, 60.0):
        progress.epoch, progress.step = progress.epoch + 1, progress.step + 10
        progress.scored(score)
        best.append((progress.best_epoch, progress.best_checkpoint, progress.ended(recipe_)))
    first, second = (1, "step-00000010", False), (3, "step-00000030", False)
    assert best == [first, first, second, second, (*second[:2], True)]
