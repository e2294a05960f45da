"""Train the embedded digits for a long time, killed and resumed at random:  python tools/soak.py --minutes 8

Watches memory and open files of the run, looks for processes left over by a killed one, and at the end for epochs that
are missing or told twice. Ends with status 1 where one of them is wrong. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WARM_UP = 20
"""Epochs of a launch before its memory is taken for the start: allocators and caches fill."""


@dataclass
class Launch:
    """One life of the run: what was seen of it, about once a second."""

    epochs: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """Resident MiB of the process itself."""
    files: list[int] = field(default_factory=list)
    ended_by: str = "itself"
    code: int = 0
    left_over: int = 0

    def growth(self) -> float | None:
        """MiB from after the warm-up to the end, medians of a fifth of the samples; None of a short life."""
        warm = [m for e, m in zip(self.epochs, self.memory, strict=True) if e >= self.epochs[0] + WARM_UP]
        fifth = len(warm) // 5
        return statistics.median(warm[-fifth:]) - statistics.median(warm[:fifth]) if fifth else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--life", type=float, default=60, help="mean seconds between kills")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a folder to keep; a temporary one by default")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of `live`, which ends the run
    with tempfile.TemporaryDirectory() as temporary:
        return soak(arguments, arguments.output or Path(temporary))


def soak(arguments: argparse.Namespace, output: Path) -> int:
    dice, end = random.Random(arguments.seed), time.monotonic() + 60 * arguments.minutes
    launches: list[Launch] = []
    while time.monotonic() < end:
        life = dice.uniform(0.3, 1.7) * arguments.life
        kind = dice.choice(SIGNALS)
        launches.append(live(output, arguments.workers, min(life, max(end - time.monotonic(), 5)), kind))
        told = launches[-1]
        print(
            f"launch {len(launches)}: epoch {told.epochs[0] if told.epochs else '-'} to {done(output)}, ended by "
            f"{told.ended_by} with {told.code}; memory {told.memory[-1] if told.memory else 0:.0f} MiB, "
            f"{told.files[-1] if told.files else 0} files; left over: {told.left_over} processes",
            flush=True,
        )
        if told.ended_by == "itself":
            print((output / "soak.txt").read_text()[-3000:])
            break
    return report(launches, output)


def live(output: Path, workers: int, seconds: float, kind: signal.Signals) -> Launch:
    """Start or resume the run, and send it the signal after so many seconds of training."""
    words = [
        "recipes/digits_lt.yaml", "name=soak", f"output={output}", "train.epochs=100000", "schedule.name=constant",
        "schedule.warmup_epochs=0", "data.validation=holdout(0.2)", "evaluation.every=10", "checkpoint.every=1",
        f"speed.workers={workers}", "--resume",
    ]  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    told = Launch()
    with (output / "soak.txt").open("ab") as text:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "train.py"), *words], cwd=ROOT, stdout=text, stderr=text,
            start_new_session=True, env={**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        before, began = done(output), 0.0
        while process.poll() is None and not (began and time.monotonic() - began > seconds):
            time.sleep(1)
            epoch = done(output)
            if epoch > before:
                began = began or time.monotonic()
                try:
                    told.memory.append(resident(process.pid))
                    told.files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
                    told.epochs.append(epoch)
                except FileNotFoundError:
                    break
        if process.poll() is None:
            told.ended_by = kind.name
            os.killpg(process.pid, kind)
        told.code = process.wait(timeout=120)
    finally:
        if process.poll() is None:  # this process was asked to stop, and the run with it
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
    for _ in range(20):  # a loader's workers look for their parent every five seconds
        told.left_over = len(session(process.pid))
        if not told.left_over:
            break
        time.sleep(1)
    return told


def report(launches: list[Launch], output: Path) -> int:
    lines = [json.loads(line) for line in (output / "soak" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["epoch"] for line in lines if "train/loss" in line]
    ways = {kind: sum(told.ended_by == kind for told in launches) for kind in sorted({t.ended_by for t in launches})}
    growths = [growth for told in launches if (growth := told.growth()) is not None]
    longest = max(launches, key=lambda told: len(told.epochs))
    checkpoints = sorted(path.name for path in (output / "soak" / "checkpoints").iterdir())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    print(f"{len(launches)} launches, ended by {ways}; {len(epochs)} epochs, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    print(f"memory grew in a launch by {[round(growth, 1) for growth in growths]} MiB (medians, after warm-up)")
    print(
        f"longest launch: epochs {longest.epochs[0]} to {longest.epochs[-1]}, {min(longest.memory):.0f} to "
        f"{max(longest.memory):.0f} MiB, {min(longest.files)} to {max(longest.files)} open files"
    )
    print(f"left over: {sum(told.left_over for told in launches)} processes; checkpoints: {checkpoints}")
    wrong = [
        said
        for said, bad in {
            "an epoch is missing or told twice": epochs != list(range(1, len(epochs) + 1)),
            "a run ended by itself": "itself" in ways,
            "processes were left over": any(told.left_over for told in launches),
            "memory grew by more than 30 MiB in a launch": any(growth > 30 for growth in growths),
            "open files grew": any(max(t.files[-5:]) > max(t.files[:20]) + 5 for t in launches if len(t.files) > 25),
            "files of a checkpoint were left over": any(name.startswith(".") for name in checkpoints)
            and launches[-1].ended_by != "SIGKILL",
        }.items()
        if bad
    ]
    print("wrong: " + "; ".join(wrong) if wrong else "all is well")
    return 1 if wrong else 0


def done(output: Path) -> int:
    """Epochs told in metrics.jsonl."""
    path = output / "soak" / "metrics.jsonl"
    return path.read_text().count('"train/loss"') if path.exists() else 0


def resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise FileNotFoundError


def session(leader: int) -> list[int]:
    """Living processes of the session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
