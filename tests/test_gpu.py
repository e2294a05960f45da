"""What only a GPU shows. Run with  pytest -m gpu ; elsewhere each test skips."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import rescom_timm
from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load_dict
from rescom_timm.contrastive.mined import composed, mined_supcon
from rescom_timm.contrastive.queue import ClassBalancedQueue
from rescom_timm.engine import checkpoint
from rescom_timm.engine import launch as launching
from rescom_timm.fitting import plan
from rescom_timm.fitting.plan import Training
from rescom_timm.methods import METHODS
from tests.conftest import ROOT
from tests.contrastive.cases import unit
from tests.engine.child import differences, figures, last, recipe, trainer_of
from tests.fitting.made_up import NET as TIMM_NET
from tests.fitting.made_up import photographs

pytestmark = pytest.mark.gpu
NET = {"net__backbone": "resnet20_cifar", "net__options": {}, "data__validation": "none"}


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    """Accelerate's state as in a fresh process, and full float32, so that forms can be compared."""
    for name in (*launching.STARTED, "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    torch.cuda.set_sync_debug_mode("default")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.cuda.empty_cache()


def losses(tree, steps=8):
    """Of the first steps of a training, as the trainer does them."""
    trainer, told = trainer_of(tree), []
    trainer.method.train()
    while len(told) < steps:
        for batch in trainer.completed(trainer.loader):
            told.append((trainer.step.captured or trainer.step.whole)(batch)["loss"].clone())
    return torch.stack(told[:steps]).cpu()


# ---------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize(
    ("classes", "per_class", "negatives", "rows"),
    [(10, 64, 400, 256), (100, 10, 400, 256), (365, 8, 500, 128), (1000, 4, 500, 512), (8142, 4, 500, 128)],
)
@pytest.mark.parametrize("chunk", [None, 50])
def test_the_head_is_the_float64_reference(classes, per_class, negatives, rows, chunk):
    generator = torch.Generator().manual_seed(0)
    queue = ClassBalancedQueue(classes, per_class, 32).double()
    entered = 2 * classes * per_class
    queue.enqueue(unit((entered, 32), generator), torch.randint(classes, (entered,), generator=generator))
    z = unit((rows, 32), generator).requires_grad_()
    labels = torch.randint(classes, (rows // 2,), generator=generator).repeat(2)
    weights = torch.rand(rows, generator=generator).double() + 0.1
    expected = composed(z, labels, queue, 1, negatives, 0.2, weights, z, labels)
    (gradient,) = torch.autograd.grad(expected, z)
    there = z.detach().float().cuda().requires_grad_()
    found = mined_supcon(
        there, labels.cuda(), queue.float().cuda(), 1, negatives, 0.2, weights.cuda(), keys=there, chunk=chunk
    )
    found.backward()
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(there.grad.cpu().double(), gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_the_queue_is_that_of_a_cpu():
    generator = torch.Generator().manual_seed(0)
    here, there = ClassBalancedQueue(20, 3, 8), ClassBalancedQueue(20, 3, 8).cuda()
    for rows in (1, 7, 200, 64):
        keys, labels = torch.randn(rows, 8, generator=generator), torch.randint(20, (rows,), generator=generator)
        here.enqueue(keys, labels)
        there.enqueue(keys.cuda(), labels.cuda())
        for name, value in here.state_dict().items():
            assert torch.equal(value, there.state_dict()[name].cpu()), name


def test_the_head_takes_less_memory_than_its_definition():
    classes, per_class, views = 8142, 4, 256
    queue = ClassBalancedQueue(classes, per_class, 128).cuda()
    labels = torch.arange(classes, device="cuda").repeat_interleave(per_class)
    queue.enqueue(torch.nn.functional.normalize(torch.randn(len(labels), 128, device="cuda"), dim=1), labels)
    z = torch.nn.functional.normalize(torch.randn(views, 128, device="cuda"), dim=1).requires_grad_()
    y, taken = torch.arange(views, device="cuda"), {}
    for function in (mined_supcon, composed):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(z, y, queue, 1, 500, 0.2, None, keys=z, key_labels=y).backward()
        torch.cuda.synchronize()
        taken[function] = torch.cuda.max_memory_allocated() - before
    assert taken[mined_supcon] < taken[composed] / 2
    assert taken[mined_supcon] < 3 * 4 * views * len(labels), "three arrays of all similarities"


# ---------------------------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_never_waits_for_the_device(tmp_path, mode, precision):
    tree = recipe(tmp_path, method__mode=mode, train__precision=precision, **NET)
    trainer = trainer_of(tree)
    trainer.method.train()
    batches = [batch for _, batch in zip(range(5), trainer.completed(trainer.loader), strict=False)]
    for batch in batches[:3]:
        trainer.step.whole(batch)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this way of looking is new
        torch.cuda.set_sync_debug_mode("error")
    for batch in batches[3:]:
        trainer.step.whole(batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"speed__channels_last": True},
        {"speed__compile": True},
        {"speed__compile": "reduce-overhead"},
        {"speed__capture": True},
        {"speed__capture": True, "speed__compile": True, "speed__channels_last": True},
        {"speed__capture": True, "speed__resident": True},
    ],
    ids=lambda changes: "-".join(f"{key.removeprefix('speed__')}={value}" for key, value in changes.items()),
)
def test_faster_forms_of_a_step_give_its_losses(tmp_path, changes):
    small = {**NET, "optimizer__lr": 1e-3, "schedule__warmup_epochs": 0}
    plain = losses(recipe(tmp_path, **small))
    AcceleratorState._reset_state(True)
    torch.testing.assert_close(losses(recipe(tmp_path, **small, **changes)), plain, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "rescom", "mode": "paper", "queue": {"per_class": 4}, "positives": 1, "negatives": 20},
        {"name": "balanced_softmax", "views": 2},
        {"name": "moco"},
        {"name": "paco"},
        {"name": "ldam"},
        {"name": "lade"},
        {"name": "dro_lt"},
        {"name": "causal_norm"},
        {"name": "experts"},
        {"name": "bbn"},
        {"name": "reslt"},
        {"name": "gistnet"},
        {"name": "elf"},
        {"name": "dive"},
        {"name": "ssd"},
        {"name": "bcl"},
        {"name": "proco"},
        {"name": "logit_adjustment", "gamma": 0.05, "reweight_from": 0.5, "nu": 0.15},
    ],
    ids=lambda method: method["name"],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_methods_are_captured(tmp_path, method, precision):
    """Over epochs too, where a method may change on the host."""
    if METHODS[method["name"]][1].needs_teacher:
        method = {**method, "teacher": str(short(tmp_path / "teacher", {"name": "balanced_softmax"})[0])}
    _, plain = short(tmp_path / "plain", method, train__precision=precision)
    _, captured = short(tmp_path / "captured", method, train__precision=precision, speed__capture=True)
    assert captured == pytest.approx(plain, rel=2e-2)


def short(output, method, **changes):
    """The folder of a run of four epochs, and their losses."""
    tree = recipe(
        output, method=method, optimizer__lr=1e-3, train__epochs=4, schedule__warmup_epochs=2,
        loader__sampler="uniform", evaluation__every=4, checkpoint__every=4, **NET, **changes,
    )  # fmt: skip
    folder = train(load_dict(tree))
    AcceleratorState._reset_state(True)
    told = [figure["train/loss"] for figure in figures(tree) if "train/loss" in figure]
    assert len(told) == 4 and all(math.isfinite(loss) for loss in told)
    return folder, told


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_aware_steps_are_captured(tmp_path, precision, adaptive):
    """rho too, which changes in the last of the four epochs."""
    how = {"train__precision": precision, "optimizer__sam": {"rho": 0.05, "rho_late": 0.2, "adaptive": adaptive}}
    method = {"name": "balanced_softmax"}
    _, plain = short(tmp_path / "plain", method, **how)
    _, captured = short(tmp_path / "captured", method, **how, speed__capture=True)
    assert captured == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("changes", [{}, {"speed__capture": True}, {"speed__capture": True, "speed__resident": True}])
def test_views_of_their_own_for_contrast(tmp_path, changes):
    method = {"queue": {"per_class": 4}, "positives": 4, "negatives": 20, "prototypes": True}
    short(tmp_path, method, views__contrast="random_resized_crop(8) | jitter(0.4,0.4,0.4,0.1,0.8)", **changes)


def test_fit_on_a_gpu_is_that_of_a_cpu(tmp_path, monkeypatch):
    """Features and heads to rounding; the training goes through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = photographs(tmp_path / "photos", [20, 12, 8, 6])
    monkeypatch.setattr(plan, "trainings", lambda *_: [])
    how = {"backbone": TIMM_NET, "weights_file": "none", "size": 16}
    cpu, gpu = (rescom_timm.fit(photos, 1, **how, device=at, output=tmp_path / at) for at in ("cpu", "cuda"))
    heads = [load_file(run.folder / "model/model.safetensors") for run in (cpu, gpu)]
    for name, weight in heads[0].items():
        torch.testing.assert_close(heads[1][name], weight, rtol=2e-2, atol=2e-3)
    monkeypatch.setattr(plan, "trainings", lambda *_: [Training("linear", 1)])
    trained = rescom_timm.fit(photos, 1, **how, device="cuda", output=tmp_path / "trained")
    assert json.loads((trained.folder / "fit/fit.json").read_text())["finished"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rsg_trains_as_it_is(tmp_path, precision):
    """Its batches grow, so it is captured by nothing: speed.capture and speed.compile are refused (test_rsg.py)."""
    short(tmp_path, {"name": "rsg", "generate_from": 0.5}, train__precision=precision)


def test_a_captured_run_follows_the_learning_rate(tmp_path):
    """With a rate of nothing after the first epoch the weights stay."""
    steps = {"name": "steps", "milestones": [1], "gamma": 1e-6, "warmup_epochs": 0}
    tree = recipe(tmp_path, speed__capture=True, optimizer__lr=0.05, optimizer__momentum=0.0, train__epochs=2, **NET)
    train(load_dict({**tree, "schedule": steps}))
    one, two = (checkpoint.load(path)[0] for path in sorted((tmp_path / "run/checkpoints").iterdir()))
    moved = (one["encoder.conv1.weight"] - two["encoder.conv1.weight"]).abs().max()
    assert 0 < moved < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("capture", [False, True])
def test_half_precision_learns_and_goes_on(tmp_path, precision, capture):
    if precision == "fp16" and capture:
        pytest.skip("refused: the scaler decides on the host")
    tree = recipe(tmp_path, train__precision=precision, speed__capture=capture, train__epochs=4, **NET)
    train(load_dict(tree))
    before = figures(tree)
    assert before[-2]["train/loss"] < before[0]["train/loss"]
    for newer in sorted((tmp_path / "run/checkpoints").iterdir())[-1:]:
        shutil.rmtree(newer)
    scaler = last(tree)[1]["scaler"]
    assert (scaler is not None) == (precision == "fp16")
    AcceleratorState._reset_state(True)
    train(load_dict(tree), resume=True)
    assert [f["train/loss"] for f in figures(tree) if "train/loss" in f] == pytest.approx(
        [f["train/loss"] for f in before if "train/loss" in f], rel=0.02
    )


def test_deterministic_runs_are_equal(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        trees = [recipe(tmp_path / name, train__epochs=2, **NET) for name in ("one", "two")]
        for tree in trees:
            train(load_dict(tree))
            AcceleratorState._reset_state(True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(last(trees[0])[0], last(trees[1])[0]) == []


# ----------------------------------------------------------------------------------------------------- other processes

DIGITS = ("recipes/digits_lt.yaml", "train.epochs=2", "schedule.warmup_epochs=0", "checkpoint.every=1")


def tool(output: Path, *words: str, launcher: tuple[str, ...] = (sys.executable,), cpu: bool = False) -> str:
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, **({"ACCELERATE_USE_CPU": "1"} if cpu else {})}
    command = [*launcher, "tools/train.py", *DIGITS, f"output={output}", "name=run", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def told(output: Path) -> dict[str, float]:
    lines = (output / "run/metrics.jsonl").read_text().splitlines()
    return {k: v for line in lines for k, v in json.loads(line).items() if k in ("train/loss", "test/top1")}


@pytest.mark.parametrize("first_on_cpu", [False, True])
def test_a_checkpoint_goes_on_where_it_was_not_made(tmp_path, first_on_cpu):
    tool(tmp_path, cpu=first_on_cpu)
    whole = told(tmp_path)
    shutil.rmtree(sorted((tmp_path / "run/checkpoints").iterdir())[-1])
    assert "resumed from" in tool(tmp_path, "--resume", cpu=not first_on_cpu)
    assert told(tmp_path)["train/loss"] == pytest.approx(whole["train/loss"], rel=0.05)


def test_one_process_under_nccl(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", "29513")
    tool(tmp_path / "nccl", launcher=torchrun)
    tool(tmp_path / "alone")
    assert math.isclose(told(tmp_path / "nccl")["train/loss"], told(tmp_path / "alone")["train/loss"], rel_tol=0.05)


def test_fsdp2(tmp_path):
    accelerate = (
        sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "1",
    )  # fmt: skip
    tool(tmp_path, launcher=accelerate)
    assert told(tmp_path)["train/loss"] < 10
