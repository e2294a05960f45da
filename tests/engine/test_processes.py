"""Two real processes are one: loss, gradients, queue, batches; BatchNorm is agreed where it is looked at."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rescom_timm.config.loading import load_dict
from rescom_timm.distributed import processes
from rescom_timm.engine import checkpoint
from rescom_timm.engine import launch as launching
from rescom_timm.engine.evaluate import agreed_statistics
from rescom_timm.methods import DisAlignConfig, HybridPscConfig, LdamConfig, MocoConfig, RescomConfig, create_method
from rescom_timm.methods.rescom import QueueConfig
from rescom_timm.models.net import Net, ProjectorConfig
from tests.engine.child import Launch, Tiny, differences, figures, last, recipe, run, together
from tests.raises import raises

COUNTS = torch.tensor([60, 25, 9, 4])
ROOT = Path(__file__).parents[2]


def some_steps(rank, config, folder):
    """Four SGD steps of a global batch of 64 in float64, BatchNorm in evaluation mode: rank 0's loss (averaged over the
    processes), gradients and queue of each step into folder/RANK.safetensors."""
    rank, world = processes()
    torch.manual_seed(0)
    net = Net(Tiny(drop=0.0), len(COUNTS), ProjectorConfig(hidden=12, dim=6)).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    method = create_method(net, COUNTS, config).double()
    method.set_epoch(9, 10)
    net.eval()
    if world > 1:
        method.net = DistributedDataParallel(net, broadcast_buffers=False)
    told = {}
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        images = torch.randn(64, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, len(COUNTS), (64,), generator=generator)
        size = 64 // world
        own = slice(rank * size, (rank + 1) * size)
        loss = method({"image": images[own, : method.views], "label": labels[own]})["loss"]
        loss.backward()
        mean = loss.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(mean)
        told[f"{step}.loss"] = mean / world
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        told |= {f"{step}.grad.{name}": p.grad.clone() for name, p in trained.items()}
        if method.queue is not None:
            told |= {f"{step}.queue.{name}": value.clone() for name, value in method.queue.state_dict().items()}
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    save_file(told, Path(folder) / f"{rank}.safetensors")


@pytest.mark.filterwarnings("ignore:`broadcast_buffers`:FutureWarning")
@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("positives", [2, None])
def test_one_process_of_64_and_two_of_32_are_the_same(tmp_path, mode, positives):
    config = RescomConfig(
        mode=mode, gather_pairs=True, queue=QueueConfig(per_class=8), positives=positives, negatives=20
    )
    some_steps(0, config, tmp_path)
    one = load_file(tmp_path / "0.safetensors")
    together(some_steps, 2, config, str(tmp_path))
    two = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert len(one) > 60
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert one["3.grad.encoder.body.0.weight"].abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:`broadcast_buffers`:FutureWarning")
@pytest.mark.parametrize("config", [LdamConfig(views=2), HybridPscConfig(views=2), DisAlignConfig()])
def test_weighted_means_are_those_of_one_process(tmp_path, config):
    some_steps(0, config, tmp_path)
    one = load_file(tmp_path / "0.safetensors")
    together(some_steps, 2, config, str(tmp_path))
    two = load_file(tmp_path / "0.safetensors")
    assert len(one) >= 4 * 5 and one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def watched(folder, rank):
    return [json.loads(line) for line in (folder / f"watch-{rank}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A watched run of two processes, and its recipe."""
    folder = tmp_path_factory.mktemp("pair")
    tree = recipe(folder, train__epochs=2, evaluation__every=2)
    run(tree, ranks=2, fault=("watch", str(folder)))
    return folder, tree


def test_queue_and_weights_are_the_same_after_every_step_and_batch_norm_is_not(pair):
    folder, _ = pair
    first, second = watched(folder, 0), watched(folder, 1)
    assert len(first) == len(second) == 22
    for a, b in zip(first, second, strict=True):
        assert a["queue"] == b["queue"] and a["net"] == b["net"]
        assert a["buffers"] != b["buffers"]
    assert first[0]["queue"] != first[5]["queue"] != first[21]["queue"]


def test_batch_norm_is_agreed_for_saving_and_each_process_keeps_its_own(pair):
    folder, _ = pair
    _path, net, state = checkpoint.newest(folder / "run" / "checkpoints")
    own = [rank["buffers"] for rank in state["ranks"]]
    name = "encoder.body.1.running_var"
    assert not torch.equal(own[0]["net." + name], own[1]["net." + name])
    torch.testing.assert_close(net[name], (own[0]["net." + name] + own[1]["net." + name]) / 2)
    for rank in range(2):  # evaluated and saved after the first epoch: the second went on with its own
        last = watched(folder, rank)[-1]["buffers"][name][0]
        assert own[rank]["net." + name].double().sum().item() == last


def test_a_class_balanced_batch_is_cut_among_the_processes(pair, tmp_path):
    folder, _tree = pair
    alone = recipe(tmp_path, train__epochs=2, evaluation__every=2)
    run(alone, fault=("watch", str(tmp_path)))
    parts = zip(watched(folder, 0), watched(folder, 1), strict=True)
    rows = [a["rows"] + b["rows"] for a, b in parts]
    assert rows == [step["rows"] for step in watched(tmp_path, 0)]
    assert all(len(step) == 32 for step in rows) and rows[0] != rows[11]


def statistics(rank, folder):
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].running_mean.fill_(rank)
    net[0].num_batches_tracked.fill_(5)
    with agreed_statistics(net):
        assert net[0].running_mean.tolist() == [0.5] * 3 and net[0].num_batches_tracked == 5
    assert net[0].running_mean.tolist() == [rank] * 3
    (Path(folder) / str(rank)).touch()


def test_agreed_statistics(tmp_path):
    together(statistics, 2, str(tmp_path))
    assert (tmp_path / "1").exists()


# -------------------------------------------------------------------------------------------------------------- FSDP2


@pytest.mark.slow
def test_fsdp2_is_the_same_run_and_resumes(tmp_path):
    """Weights and optimizer in shards, projector included, the queue whole in each process. Accelerate passes FSDP over
    on a CPU, so the test makes its state say otherwise; all else is its own code on two gloo processes."""
    changes = {
        "train__epochs": 2,
        "net__options": {"drop": 0.0},
        "method__gather_pairs": True,
        "optimizer__clip_norm": 1.0,
    }
    plain, whole, killed = (recipe(tmp_path / name, **changes) for name in "abc")
    run(plain, ranks=2)
    run(whole, ranks=2, fault=("fsdp",))
    assert Launch(killed, 2, fault=[("fsdp",), ("signal_at_pass", signal.SIGTERM, 14)]).wait() == [143, 143]
    launch = run(killed, ranks=2, resume=True, fault=("fsdp",))
    assert "resumed from step-000000" in launch.text
    assert differences(last(whole), last(killed)) == []
    assert last(whole)[1]["sharded"] and not last(plain)[1]["sharded"]
    for one, other in zip(figures(plain), figures(whole), strict=True):
        assert one.get("train/loss", 0) == pytest.approx(other.get("train/loss", 0), rel=1e-4)
    (net, state), (sharded, parts) = last(plain), last(whole)
    assert {name: value.shape for name, value in net.items()} == {name: value.shape for name, value in sharded.items()}
    torch.testing.assert_close(sharded["projector.0.weight"], net["projector.0.weight"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(parts["method"]["queue.keys"], state["method"]["queue.keys"], rtol=1e-2, atol=1e-3)
    launch = Launch(recipe(tmp_path / "a", **changes), 2, resume=True, fault=("fsdp",))
    assert launch.wait() == [1, 1] and "error[checkpoint.differs]" in launch.text


@pytest.mark.slow
def test_fsdp2_in_mixed_precision_and_channels_last_is_the_same_run(tmp_path):
    changes = {"train__precision": "bf16", "speed__channels_last": True}
    plain, whole = (recipe(tmp_path / name, net__options={"drop": 0.0}, **changes) for name in "ab")
    run(plain, ranks=2)
    run(whole, ranks=2, fault=("fsdp",))
    for one, other in zip(figures(plain), figures(whole), strict=True):
        assert one.get("train/loss", 0) == pytest.approx(other.get("train/loss", 0), rel=1e-2)
    (net, _), (sharded, _) = last(plain), last(whole)
    assert all(value.dtype == net[name].dtype for name, value in sharded.items())


@pytest.mark.parametrize(
    ("config", "part"), [(HybridPscConfig(), "net.prototypes"), (MocoConfig(queue_size=8), "momentum_net.copy")]
)
def test_fsdp2_is_refused_where_the_loss_reads_weights_outside_of_the_forward_pass(tmp_path, config, part):
    method = create_method(Net(Tiny(), len(COUNTS)), COUNTS, config)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with raises("train.distributed", "FSDP2", part):
        launching.refuse_what_cannot_be_sharded(accelerator, load_dict(recipe(tmp_path)), method)


# ------------------------------------------------------------------------------------------------------------ launch


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launch_that_became_single_runs_is_stopped(alone, tmp_path, name):
    alone.setenv(name, "4")
    alone.setattr(
        launching, "Accelerator", lambda **_: type("One", (), {"num_processes": 1, "device": torch.device("cpu")})
    )
    with raises("train.distributed", name, "torchrun --nproc_per_node 4 -m rescom_timm train"):
        launching.launch(load_dict(recipe(tmp_path)))


def test_a_batch_that_does_not_divide_names_the_nearest(tmp_path):
    launch = Launch(recipe(tmp_path, train__batch_size=38, train__accumulate=2), ranks=2)
    assert launch.wait() == [1, 1]
    assert "error[recipe.conflict]" in launch.text and "2 processes x 2 accumulated" in launch.text
    assert "36, 40" in launch.text


def test_fp16_on_a_cpu_is_refused(alone, tmp_path):
    with raises("train.device", "train.precision", "fp16"):
        launching.launch(load_dict(recipe(tmp_path, train__precision="fp16")))


# ----------------------------------------------------------------------------------------------- by the real commands


def command(words, tmp_path, **environment):
    tree = [
        "recipes/digits_lt.yaml",
        f"output={tmp_path}",
        "name=run",
        "train.epochs=1",
        "schedule.warmup_epochs=0",
        "speed.workers=1",
    ]
    own = {name: value for name, value in os.environ.items() if name not in launching.STARTED}
    return subprocess.Popen(
        [*words, "tools/train.py", *tree], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs these launches are right")
@pytest.mark.parametrize(
    "words",
    [
        [*TORCHRUN, "--nproc_per_node", "2"],
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
)
def test_launchers_whose_processes_would_each_train_alone(tmp_path, words):
    process = command(words, tmp_path)
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "2 processes were started (WORLD_SIZE), but each would train alone" in text, text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_nodes_of_one_process(tmp_path):
    """As on two machines, here both on 127.0.0.1."""
    from tests.engine.child import free_port

    port = free_port()
    nodes = [
        command(
            [
                *TORCHRUN, "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1",
                "--master_addr", "127.0.0.1", "--master_port", str(port),
            ],
            tmp_path, ACCELERATE_USE_CPU="1",
        )
        for rank in range(2)
    ]  # fmt: skip
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    state = checkpoint.newest(tmp_path / "run" / "checkpoints")[2]
    assert state["processes"] == 2 and len(state["ranks"]) == 2


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_leaves(tmp_path):
    """With loader workers, which are in torchrun's process group."""
    import time

    words = [*TORCHRUN, "--nproc_per_node", "2"]
    process = command(words, tmp_path, ACCELERATE_USE_CPU="1")
    time.sleep(1)
    folder = tmp_path / "run"
    while not folder.exists():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=300)
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None, text
    assert "asked to stop" in text or found[2]["progress"]["epoch"] == 1
