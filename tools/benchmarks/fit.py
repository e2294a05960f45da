"""`fit`: how well `rescom-timm fit` keeps its minutes.

    python tools/benchmark.py fit my_photos --minutes 2 5 --size 64 --backbone resnet18.a1_in1k

Wall clock of the command, from the start of its process, as a share of --minutes, also where fit refuses them as too
few. Each fit has a new folder and an empty cache of features.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import keep, machine
from rescom_timm.errors import InputError
from rescom_timm.io import read_json

PASSED = ("size", "backbone", "weights-file")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="as of rescom-timm fit")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0, 5.0])
    for name in PASSED:
        parser.add_argument(f"--{name}", help="as of rescom-timm fit")
    parser.add_argument("-o", "--json", help="a file, or a folder that gets a dated one")
    parser.set_defaults(device="cpu")


def run(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name.replace("-", "_")) for name in PASSED}
    words = [word for name, value in given.items() if value for word in (f"--{name}", value)]
    record = {**machine(options.device), "rows": [one(options.source, m, words) for m in options.minutes]}
    keep(options, "fit", record)
    return 0


def one(source: str, minutes: float, words: list[str]) -> dict[str, Any]:
    """Fit once. Raises InputError with the last line of stderr of a failed fit."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rescom_timm", "fit", source, "--minutes", str(minutes), "-o", f"{folder}/run"]
        load, began = os.getloadavg()[0], time.monotonic()
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        child = subprocess.run([*command, *words], capture_output=True, text=True, env=environment)
        share = (time.monotonic() - began) / 60 / minutes
        row: dict[str, Any] = {"minutes": minutes, "used": round(share, 3), "load": round(load, 1)}
        error = (child.stderr.strip().splitlines() or [""])[-1]
        if child.returncode == 0:
            found = read_json(Path(folder) / "run/fit/fit.json")
            row |= {name: found[name] for name in ("plan", "trained", "left_out", "chosen")}
        elif "error[fit.minutes]" in error:
            row |= {"refused": error}
        else:
            raise InputError("system.failed", f"fit: {error}")
    print(row, flush=True)
    return row
