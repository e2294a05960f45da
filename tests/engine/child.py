"""Real processes for the tests of runs: trained, killed and resumed. They are forked from a server that has imported
everything once, so that one starts in a moment; what can go wrong in them is a fault of FAULTS."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn

from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import RecipeError
from rescom_timm.data.digits import digits
from rescom_timm.data.sources import load
from rescom_timm.engine import checkpoint, errors, step, trainer
from rescom_timm.engine.build import build_method
from rescom_timm.engine.launch import launch
from rescom_timm.errors import code_of
from rescom_timm.methods.rescom import ResCom
from rescom_timm.models.net import Net

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.engine.child"])
for part in ("train", "test"):
    digits(part)  # which every process then has


class Tiny(nn.Module):
    """A backbone with everything that has a state: BatchNorm, dropout."""

    head_hidden_size = num_features = 16

    def __init__(self, num_classes: int = 0, norm: bool = True, drop: float = 0.2, **_: Any) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(drop)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, num_classes) if num_classes else nn.Identity()
        self.num_classes = num_classes
        self.pretrained_cfg = {"architecture": "tiny_for_tests", "input_size": (3, 8, 8)}
        self.pretrained_cfg |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": num_classes}

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


@timm.models.register_model
def tiny_for_tests(pretrained: bool = False, **kwargs: Any) -> Tiny:
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return Tiny(**kwargs)


def trainer_of(tree: dict[str, Any]) -> trainer.Trainer:
    """A trainer in this process, not opened."""
    made = load_dict(tree)
    accelerator = launch(made)
    torch.manual_seed(0)
    data = load(made.data)
    return trainer.Trainer(made, accelerator, data, build_method(made, data))


def recipe(output: Path | str, **changes: Any) -> dict[str, Any]:
    """A run of seconds that has every kind of state; changes: dotted keys with "__" for ".". As plain types."""
    tree: dict[str, Any] = {
        "name": "run",
        "output": str(output),
        "data": {"source": "digits", "index": "exponential(20)", "validation": "holdout(0.2)"},
        "views": {"train": "crop(8,1) | flip", "eval": "none", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "net": {"backbone": "tiny_for_tests", "projector": {"hidden": 16, "dim": 8}},
        "method": {"queue": {"per_class": 4}, "positives": 1, "negatives": 20},
        "optimizer": {"lr": 0.1},
        "schedule": {"name": "cosine", "warmup_epochs": 1},
        "train": {"epochs": 3, "batch_size": 32},
        "evaluation": {"every": 1, "batch_size": 250},
        "loader": {"sampler": "class_balanced"},
        "speed": {"workers": 0},
        "track": {"log_with": []},  # drawing its figures takes longer than the training
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return load_dict(tree).to_dict()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Launch:
    """Processes that train one recipe together."""

    def __init__(self, tree: dict[str, Any], ranks: int = 1, resume: bool = False, fault: Any = None) -> None:
        """fault: (name in FAULTS, *arguments), or a list of them, in every process."""
        self.logs = [Path(tree["output"]) / f"log-{rank}.txt" for rank in range(ranks)]
        self.logs[0].parent.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.processes = [
            SERVER.Process(target=work, args=(tree, resume, fault, rank, ranks, port, str(self.logs[rank])))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes (-9: killed). Where one process was killed or failed, the others are killed, as torchrun does."""
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode not in (None, 0, 143) for process in self.processes)
            if failed or time.monotonic() > end:
                time.sleep(0.5)  # let the others tell
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]

    def signal(self, number: int) -> None:
        """To the whole process group of every process, loader workers included, as torchrun does."""
        for process in self.processes:
            if process.is_alive() and process.pid:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:  # not yet a group
                    os.kill(process.pid, number)

    @property
    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def work(tree: dict[str, Any], resume: bool, fault: Any, rank: int, ranks: int, port: int, log: str) -> None:
    os.setsid()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a run of its own
    torch.set_num_threads(1)
    if fault is not None:
        for name, *arguments in fault if isinstance(fault, list) else [fault]:
            FAULTS[name](*arguments)
    code = 0
    try:
        train_recipe(load_dict(tree), resume=resume)
    except (RecipeError, checkpoint.CheckpointError, errors.NonFiniteLoss, errors.Stopped) as error:
        print(f"{type(error).__name__}: error[{code_of(error)}]: {error}")
        code = 143 if isinstance(error, errors.Stopped) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def run(tree: dict[str, Any], ranks: int = 1, resume: bool = False, fault: Any = None) -> Launch:
    """Train to the end. Raises AssertionError where a process did not end well."""
    launch = Launch(tree, ranks, resume, fault)
    codes = launch.wait()
    assert codes == [0] * ranks, f"exit codes {codes}\n{launch.text}"
    return launch


def together(function: Any, ranks: int, *arguments: Any) -> None:
    """function(rank, *arguments) in each of `ranks` gloo processes. Raises AssertionError where one ends badly."""
    port = free_port()
    members = [SERVER.Process(target=_member, args=(function, rank, ranks, port, arguments)) for rank in range(ranks)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    assert [member.exitcode for member in members] == [0] * ranks


def _member(function: Any, rank: int, ranks: int, port: int, arguments: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- results


def last(tree: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(net, state) of the newest checkpoint, without what two equal runs differ in: place and time."""
    found = checkpoint.newest(Path(tree["output"]) / tree["name"] / "checkpoints")
    assert found is not None
    _, net, state = found
    del state["recipe"], state["progress"]["seconds"]
    return net, state


def figures(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without speed and time."""
    text = (Path(tree["output"]) / tree["name"] / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    pace = ("images_per_second", "seconds", "memory_gib")
    return [{key: value for key, value in line.items() if key not in pace} for line in lines]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places where two trees are not equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: keys" for _ in range(list(a) != list(b))]
        return found + [d for key in a if key in b for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        found = [f"{where}: length" for _ in range(len(a) != len(b))]
        return found + [
            d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{where}.{i}")
        ]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if hasattr(a, "dtype"):
        return [] if (a == b).all() else [where]
    return [] if a == b and type(a) is type(b) else [f"{where}: {a!r} and {b!r}"]


# ----------------------------------------------------------------------------------------------------------- faults


def _count(holder: Any, name: str, counter: list[int], act: Any) -> None:
    """Before each call of holder.name: counter += 1, act(count)."""
    original = getattr(holder, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counter[0] += 1
        act(counter[0])
        return original(*args, **kwargs)

    setattr(holder, name, counted)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_at_pass(number: int, n: int, rank: int | None = None) -> None:
    """The signal arrives (in one process, or in all) before forward pass n of this process; its group gets it too."""

    def act(count: int) -> None:
        if count == n and rank in (None, int(os.environ.get("RANK", 0))):
            os.killpg(os.getpid(), number)

    _count(step.TrainingStep, "forward_backward", [0], act)


def at_disk_operation(n: int, what: str) -> None:
    """Before file operation n of this process's checkpoints (write, hash, sync, rename, remove): "kill" or "full"."""
    if os.environ.get("RANK", "0") != "0":
        return
    counter = [0]

    def act(count: int) -> None:
        if count != n:
            return
        if what == "kill":
            _kill()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("sha256", "_sync"):
        _count(checkpoint, name, counter, act)
    _count(checkpoint.Path, "rename", counter, act)
    original = checkpoint.save_file

    def half(tensors: Any, path: Path) -> None:
        counter[0] += 1
        original(tensors, path)
        if counter[0] == n:
            os.truncate(path, path.stat().st_size // 2)
        act(counter[0])

    checkpoint.save_file = half
    original_rmtree = checkpoint.shutil.rmtree

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if what == "kill" and path.exists():
            counter[0] += 1
            if counter[0] == n:
                next(path.iterdir()).unlink()
                _kill()
        original_rmtree(path, *args, **kwargs)

    checkpoint.shutil.rmtree = rmtree


def poison(passes: list[int], what: str = "loss", rank: int = 0) -> None:
    """In these forward passes (counted in a process from 1) the loss, or only its gradient, is NaN, in one process."""
    counter, forward = [0], ResCom.forward

    def poisoned(self: Any, batch: Any) -> Any:
        outputs = forward(self, batch)
        counter[0] += 1
        if counter[0] in passes and int(os.environ.get("RANK", 0)) == rank:
            nan = float("nan")
            if what == "loss":
                outputs["loss"] = outputs["loss"] * nan
            else:
                outputs["logits"].register_hook(lambda gradient: gradient * nan)
        return outputs

    ResCom.forward = poisoned


def watch(folder: str) -> None:
    """Write, of every forward pass, the rows, and after every optimizer step, sums that identify queue, weights and
    buffers of this process: watch-RANK.jsonl."""
    path = Path(folder) / f"watch-{os.environ.get('RANK', 0)}.jsonl"
    forward, update = step.TrainingStep.forward_backward, step.TrainingStep.update
    rows: list[int] = []

    def noted(self: Any, batch: Any, last: bool) -> Any:
        rows.extend(batch["row"].tolist())
        return forward(self, batch, last)

    def watched(self: Any, finite: bool) -> bool:
        done = update(self, finite)
        kinds = {"queue": self.method.queue.state_dict(), "net": dict(self.net.named_parameters())}
        kinds["buffers"] = {name: buffer for name, buffer in self.net.named_buffers() if "running" in name}
        sums = {
            kind: {name: [t.double().sum().item(), t.double().norm().item()] for name, t in tensors.items()}
            for kind, tensors in kinds.items()
        }
        with path.open("a") as file:
            file.write(json.dumps({"rows": rows, "done": done, **sums}) + "\n")
        rows.clear()
        return done

    step.TrainingStep.forward_backward, step.TrainingStep.update = noted, watched


def slow(seconds: float) -> None:
    """Every forward pass takes at least this long."""
    _count(step.TrainingStep, "forward_backward", [0], lambda count: time.sleep(seconds))


def kill_a_worker(n: int, rank: int | None = None) -> None:
    """Before forward pass n of this process one of its loader's workers is killed, as where memory ran out."""

    def act(count: int) -> None:
        if count == n and rank in (None, int(os.environ.get("RANK", 0))):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    _count(step.TrainingStep, "forward_backward", [0], act)


def little_memory(views: int, rank: int | None = None) -> None:
    """In this process, or in all, the net's forward pass takes so many views and no more, as a GPU's memory would."""
    forward = Net.forward

    def limited(self: Any, images: torch.Tensor) -> Any:
        if len(images) > views and rank in (None, int(os.environ.get("RANK", 0))):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, images)

    Net.forward = limited  # type: ignore[method-assign]


def no_shared_disk() -> None:
    """All processes but the first see an empty disk."""
    if os.environ.get("RANK", "0") != "0":
        trainer.checkpoint.newest = lambda folder: None


def fsdp() -> None:
    """FSDP2 by accelerate's own code on CPU processes, where accelerate itself passes it over, with the settings of
    `accelerate launch` on GPUs."""
    launch = trainer.launch

    def launched(made: Any) -> Any:
        accelerator = launch(made)
        state = AcceleratorState()
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
        if made.train.precision != "no":
            state.fsdp_plugin.set_mixed_precision(made.train.precision)
        return accelerator

    trainer.launch = launched


FAULTS = {
    f.__name__: f
    for f in (
        signal_at_pass, at_disk_operation, poison, watch, slow, kill_a_worker, little_memory, no_shared_disk, fsdp,
    )
}  # fmt: skip
