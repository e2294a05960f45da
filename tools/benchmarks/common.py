"""What the parts share: clocks, counts, peaks, the machine, results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rescom_timm.io import write_text

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler prints each start and stop


def common_arguments(parser: argparse.ArgumentParser, repetitions: int, device: str = "cpu, cuda") -> None:
    """What every part that takes turns is asked."""
    parser.add_argument("--repetitions", type=positive, default=repetitions)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help=device)
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")


def positive(word: str) -> int:
    """A number of the command line that must be at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def clocked(step: Callable[[], object], device: str) -> float:
    """Milliseconds of one step."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    step()
    return 1e3 * (clock() - begun)


class _Calls(TorchDispatchMode):
    """Counts calls that compute (not views, not allocations) and those that give data to the host."""

    to_host = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero", "item")
    allocate = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.number = self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.number += not (func.is_view or name in self.allocate)
        self.synchronisations += name in self.to_host
        return func(*args, **(kwargs or {}))


def calls(step: Callable[[], object], device: str) -> tuple[int, int]:
    """(launches, host synchronisations) of a step; on a CPU the calls of torch that would launch or synchronise."""
    if device != "cuda":
        with _Calls() as counted:
            step()
        return counted.number, counted.synchronisations
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        step()
        torch.cuda.synchronize()
    launched = sum(
        event.count for event in profiler.key_averages() if "LaunchKernel" in event.key or "GraphLaunch" in event.key
    )
    return launched, sum("synchroniz" in str(one.message) for one in heard)


def peak(step: Callable[[], object], device: str) -> int:
    """Bytes that a step holds at its peak above what is held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def bytes_in(folder: Path) -> int:
    """Of the files of a folder that may be written to, in which files and folders come and go."""
    held = 0
    for place, _, names in os.walk(folder):  # os.walk skips a removed folder
        for name in names:
            with suppress(FileNotFoundError):
                held += os.stat(f"{place}/{name}").st_size
    return held


def machine(device: str) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "allocator": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
    }


def heading(about: dict[str, Any]) -> str:
    """The heading of a table: where it was measured."""
    return (
        f"# {about['device']}, {about['threads']} thread(s) of {about['cores']} cores, load {about['load']}, "
        f"torch {about['torch']}"
    )


def keep(options: argparse.Namespace, what: str, record: dict[str, Any]) -> None:
    """Write the record to --json. what: the name of the part, for a dated file."""
    if not options.json:
        return
    path = Path(options.json)
    if options.json.endswith("/") or path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path = path / f"{record['date']}-{what.replace('/', '-')}-{options.device}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


def kept(overrides: list[str]) -> list[str]:
    """The key=value overrides for a record, without paths of this machine."""
    return [word for word in overrides if not word.startswith("data.source=")]
