"""Methods in real runs on the digits: second stages over a run, stages that train nothing, hooks, several processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F

from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load, presets
from rescom_timm.contrastive.queue import ClassBalancedQueue
from rescom_timm.data.config import DataConfig
from rescom_timm.data.sources import load as load_data
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import build_method, build_optimizer
from rescom_timm.engine.errors import Stopped
from rescom_timm.engine.evaluate import evaluate_run
from rescom_timm.engine.features import read_features
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.engine.step import TrainingStep
from rescom_timm.engine.trainer import Trainer
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.losses import log_prior
from rescom_timm.methods import METHODS, heads
from rescom_timm.methods.momentum import MomentumNet
from rescom_timm.methods.rescom import ResCom
from tests.raises import raises
from tests.recipes import UNDRAWN, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = [
    "train.batch_size=182",
    "checkpoint.every=1",
    "train.epochs=1",
    "schedule.warmup_epochs=0",
    "net.projector.hidden=8",
    "net.projector.dim=8",
    "net.backbone=resnet8_cifar",
    UNDRAWN,
]


def run(name, output, *words):
    return train(load_recipe(name, [f"output={output}", *QUICK, *words]))


def weights(folder):
    return checkpoint.newest(folder / "checkpoints")[1]


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A short first stage."""
    return run("digits_lt +cross_entropy", tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_crt_in_a_run_trains_the_classifier_alone(first, tmp_path):
    after = weights(run("digits_lt +crt", tmp_path, f"from={first}"))
    changed = {name for name in moved(weights(first), after) if not name.startswith("projector.1.")}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_las_in_a_run_shifts_statistics_and_its_export_is_read_back(first, tmp_path):
    folder = run("digits_lt +las", tmp_path, f"from={checkpoint.listed(first / 'checkpoints')[-1]}")
    before, after = weights(first), weights(folder)
    encoder = {name for name in moved(before, after) if name.startswith("encoder.")}
    assert encoder and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in encoder)
    scale = after["classifier.class_scale"]
    w, b = after["classifier.weight"] * scale[:, None], after["classifier.bias"] * scale
    check_export(folder, w, b)


@torch.no_grad()
def test_a_probe_is_the_regression_on_the_features_of_its_run(first, tmp_path):
    folder = run("digits_lt +probe", tmp_path, f"from={first}", "train.epochs=0", "method.ridge=0.3")
    before, after = weights(first), weights(folder)
    assert moved(before, after) & before.keys() <= {"classifier.weight", "classifier.bias"}
    recipe = load_recipe("digits_lt", QUICK)
    data = load_data(recipe.data)
    net = build_method(recipe, data).net
    net.load_state_dict(after, strict=False)
    features = read_features(new_accelerator("no"), net, recipe, data.train, flipped=True)
    scale = heads.standard(features.rows())
    prior = log_prior(torch.as_tensor(data.counts))
    head = scale.folded(heads.softmax_regression(features.rows(), prior, 0.3, scale))
    torch.testing.assert_close(after["classifier.weight"], head.weight)
    torch.testing.assert_close(after["classifier.bias"], head.bias)
    check_export(folder, head.weight, head.bias)


def test_a_probe_needs_a_run_or_pretrained_weights(tmp_path):
    with raises("recipe.missing_key", "from=RUN"):
        run("digits_lt +probe", tmp_path, "train.epochs=0")


def check_export(folder, weight, bias):
    """Our reader and plain timm give the logits of this linear layer over the encoder."""
    net, images = from_pretrained(folder).net, torch.rand(2, 3, 8, 8)
    plain = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        expected = F.linear(net.encoder(images), weight, bias)
        assert torch.allclose(net.classify(images), expected, atol=1e-5)
        assert torch.allclose(plain(images), expected, atol=1e-5)


def test_tau_norm_evaluates_and_saves_without_training(first, tmp_path):
    folder = run("digits_lt +tau_norm", tmp_path, f"from={first}", "train.epochs=0")
    assert (folder / "evaluation" / "test-last.json").is_file()
    assert not moved(weights(first), weights(folder))
    w = weights(first)["classifier.weight"]
    check_export(folder, w / w.norm(dim=1, keepdim=True) ** 0.7, torch.zeros(10))


@pytest.mark.slow
def test_experts_in_a_run_are_saved_and_read_back(tmp_path):
    folder = run("digits_lt +experts", tmp_path, "method.experts=2", "method.views=1")
    net = from_pretrained(folder).net
    assert len(net.experts) == 2
    saved = weights(folder)
    assert torch.equal(net.state_dict()["experts.1.layer3.0.conv1.weight"], saved["experts.1.layer3.0.conv1.weight"])
    with raises("train.from", "from"):
        run("digits_lt +crt", tmp_path, f"from={folder}")


def test_a_run_that_is_resumed_has_momentum_encoder_and_queue_as_they_were(tmp_path):
    words = ["method.queue_size=32", "method.momentum=0.9", "train.epochs=2", "checkpoint.keep=9"]
    whole = run("digits_lt +table6_1_moco", tmp_path, *words, "name=whole")
    halved = load_recipe("digits_lt +table6_1_moco", [f"output={tmp_path}", *QUICK, *words, "name=halved"])
    middle, last = checkpoint.listed(whole / "checkpoints")
    (tmp_path / "halved" / "checkpoints").mkdir(parents=True)
    middle.rename(tmp_path / "halved" / "checkpoints" / middle.name)
    resumed = train(halved, resume=True)
    states = [checkpoint.load(folder / "checkpoints" / last.name)[1]["method"] for folder in (whole, resumed)]
    assert {"momentum_net.copy.encoder.conv1.weight", "queue.keys"} <= set(states[0])
    assert not moved(*states)
    assert not moved(weights(whole), weights(resumed))


@pytest.mark.parametrize("name", ["bbn", "reslt", "gistnet", "elf"])
@pytest.mark.slow
def test_a_run_of_branches_is_resumed_in_mid_epoch_and_read_back(tmp_path, name, monkeypatch):
    """Two draws a step, weights of the branches, what an epoch sets: bit for bit; then evaluated and exported."""
    words = ["train.epochs=2", "train.batch_size=91", "net.backbone=resnet8_cifar"]  # epochs of 4 steps
    whole = run(f"digits_lt +{name}", tmp_path, *words, "name=whole")
    halved = load_recipe(f"digits_lt +{name}", [f"output={tmp_path}", *QUICK, *words, "name=halved"])
    forward, passes = METHODS[name][1].forward, Probe()

    def stop_at_the_fifth(self, batch):
        passes(batch["label"])
        if len(passes.calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(METHODS[name][1], "forward", stop_at_the_fifth)
        with pytest.raises(Stopped):
            train(halved)
    assert {len(labels) for (labels,) in passes.calls} == {182 if name in ("bbn", "gistnet") else 91}
    stopped = checkpoint.listed(tmp_path / "halved" / "checkpoints")[-1].name
    resumed = train(halved, resume=True)
    assert "step-00000004" < stopped < "step-00000008", "it stopped in the second epoch"
    assert not moved(weights(whole), weights(resumed))
    pretrained = from_pretrained(resumed)
    assert not moved(weights(whole), pretrained.net.state_dict())
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(pretrained.net.classify(images), pretrained.net(images).logits, atol=1e-4)
    assert (whole / "model" / "model.safetensors").is_file() == (name == "reslt"), "a plain timm model where it can be"
    written = json.loads((whole / "evaluation" / "test-last.json").read_text())["numbers"]
    assert evaluate_run(resumed)[2].compute() == written


class Probe:
    """Counts the calls of a method's hooks."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)


def test_hooks_are_called_once_an_epoch_and_once_an_optimizer_step(tmp_path, monkeypatch):
    from rescom_timm.methods.baselines import CrossEntropy

    epochs, steps = Probe(), Probe()
    monkeypatch.setattr(CrossEntropy, "set_epoch", lambda self, *a: epochs(*a), raising=False)
    monkeypatch.setattr(CrossEntropy, "after_step", lambda self: steps(), raising=False)
    folder = run("digits_lt +cross_entropy", tmp_path, "train.accumulate=2", "method.views=1")
    assert epochs.calls == [(0, 1)]
    assert len(steps.calls) == int(checkpoint.listed(folder / "checkpoints")[-1].name.removeprefix("step-"))


def test_keys_of_accumulated_passes_are_not_pairs_of_each_other(tmp_path, monkeypatch):
    entered, passes = [], []
    contrast, enqueue = ResCom.contrast, ClassBalancedQueue.enqueue
    monkeypatch.setattr(
        ResCom, "contrast", lambda self, *a: passes.append(int(self.queue.valid.sum())) or contrast(self, *a)
    )
    monkeypatch.setattr(
        ClassBalancedQueue, "enqueue", lambda self, *a: enqueue(self, *a) or entered.append(int(self.valid.sum()))
    )
    run("digits_lt", tmp_path, "train.accumulate=2", "train.epochs=2")
    assert passes[:2] == [0, 0] and entered[0] == 0 < entered[1]
    assert passes[2:4] == [entered[1]] * 2 and entered[2] == entered[1]


@pytest.mark.slow
def test_momentum_keys_have_the_precision_of_the_queries(alone, tmp_path, monkeypatch):
    seen = []

    def forward(self, images):
        hook = self.copy.encoder.conv1.register_forward_hook(
            lambda module, inputs, output: seen.append((output.dtype, module.weight.stride()))
        )
        embeddings = original(self, images)
        hook.remove()
        return embeddings

    original = MomentumNet.forward
    monkeypatch.setattr(MomentumNet, "forward", forward)
    run("digits_lt +paco", tmp_path, "train.precision=bf16", "speed.channels_last=true")
    assert set(seen) == {(torch.bfloat16, (27, 1, 9, 3))}


@pytest.mark.slow
def test_resumed_moments_lie_in_memory_as_the_weights_do(tmp_path, monkeypatch):
    words = ["speed.channels_last=true"]
    folder = run("digits_lt +cross_entropy", tmp_path, *words)
    strides = []

    def fit(self):
        strides.extend((p.stride(), moments["momentum_buffer"].stride()) for p, moments in self.optimizer.state.items())

    monkeypatch.setattr(Trainer, "fit", fit)
    train(load(folder / "recipe.yaml", [f"output={tmp_path}"]), resume=True)
    assert (144, 1, 48, 16) in [weight for weight, _ in strides] and all(one == other for one, other in strides)


def test_a_run_is_evaluated_without_the_weights_that_it_started_from(first, tmp_path):
    started = ["net.pretrained=true", f"net.weights_file={tmp_path / 'gone.safetensors'}"]
    assert evaluate_run(first, overrides=started)[2].compute() == evaluate_run(first)[2].compute()


@pytest.mark.parametrize(
    ("name", "words", "code", "named"),
    [
        ("digits_lt +lws", [], "recipe.missing_key", ["lws", "from="]),
        ("digits_lt +lws", ["from={tmp}/nothing"], "train.from", ["nothing"]),
        ("digits_lt +lws", ["from={tmp}"], "train.from", ["from"]),
        ("digits_lt +lws", ["from={first}/model"], "train.from", ["model"]),
        ("digits_lt +crt", ["from={first}", "net.backbone=resnet32_cifar"], "train.from", ["encoder.layer1.1"]),
    ],
)
def test_a_second_stage_without_a_fitting_run_is_refused(first, tmp_path, name, words, code, named):
    (tmp_path / "checkpoints").mkdir()
    words = [word.format(tmp=tmp_path, first=first) for word in words]
    with raises(code, *named):
        train(load_recipe(name, [f"output={tmp_path}", *QUICK, *words]), dry_run=True)


def test_any_method_may_start_from_a_run_or_a_file(first):
    data = load_data(DataConfig(source="digits", index="exponential(50)"))
    file = checkpoint.listed(first / "checkpoints")[-1] / "net.safetensors"
    recipe = load_recipe("digits_lt +balanced_softmax", [*QUICK, f"init_from={file}"])
    assert not moved(weights(first), build_method(recipe, data, start=True).net.state_dict())
    assert moved(weights(first), build_method(recipe, data).net.state_dict())


def test_all_that_a_net_trains_is_in_the_optimizer_also_in_groups():
    data = load_data(DataConfig(source="digits", index="exponential(50)"))
    for name in ("hybrid_psc", "dro_lt", "experts", "disalign", "causal_norm", "bbn", "reslt", "gistnet", "elf"):
        for words in ([], ["optimizer.decay_norm_and_bias=false"]):
            recipe = load_recipe(f"digits_lt +{name}", [*QUICK, *words])
            net = build_method(recipe, data).net
            held = {id(p) for group in build_optimizer(recipe.optimizer, net).param_groups for p in group["params"]}
            assert held == {id(p) for p in net.parameters() if p.requires_grad}, (name, words)


def test_every_method_has_a_preset_and_table_6_its_rows():
    shown = {load("digits_lt", [f"+{name}"]).method.name for name in presets()}
    assert shown | {"rescom"} == set(METHODS)
    for base in ("digits_lt", "cifar10_lt_if100_r32", "imagenet_lt_r50"):
        rows = [load(base, [f"+{name}"]).method for name in sorted(presets()) if name.startswith("table6_")]
        assert len(rows) == 6 and rows[0].name == "moco" and rows[5] == load(base).method
        told = [(r.beta > 0, r.queue.kind == "class_balanced", r.negatives is not None, r.siamese) for r in rows[1:]]
        assert told == [tuple(k < n for k in range(4)) for n in range(5)], "one module at a time"


def test_second_stages_draw_as_their_papers_do():
    for name in (name for name, (_, method) in METHODS.items() if method.second_stage):
        sampler = load_recipe(f"digits_lt +{name}").loader.sampler
        assert sampler == ("class_balanced" if name in ("crt", "lws", "las") else "uniform")


@pytest.mark.slow
def test_two_processes_hold_the_same_state(tmp_path):
    """Momentum encoder, queues, centroids, prototypes, mean feature: equal on both after accumulated steps."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("child.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all equal" in result.stdout


@pytest.mark.parametrize(("name", "again"), [("cross_entropy", 0), ("bbn", 0), ("ldam", 2)])
def test_a_step_is_captured_again_where_the_method_changes_on_the_host_alone(name, again):
    """Not for hooks that do nothing, or change buffers in place."""
    method, forgotten = METHODS[name][1], []
    step = TrainingStep.__new__(TrainingStep)
    step.recipe = load_recipe(f"digits_lt +{name}")
    step.method = build_method(step.recipe, load_data(step.recipe.data))
    step.captured = SimpleNamespace(forget=lambda: forgotten.append(None))
    for epoch in (0, 1):
        step.start_epoch(epoch)
    assert len(forgotten) == again and isinstance(step.method, method) and step.method.training
