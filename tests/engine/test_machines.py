"""Beyond one process, by the real commands: what training/README.md says of torchrun, restarts and SLURM."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rescom_timm.engine import checkpoint
from rescom_timm.engine import launch as launching
from rescom_timm.engine.stop_signals import StopSignals
from tests.engine.child import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "rescom_timm/engine/README.md").read_text()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
KEYS = ["name=run", "schedule.warmup_epochs=0", "speed.workers=0", "net.backbone=resnet8_cifar", "--resume"]


def start(words, **environment):
    own = {name: value for name, value in os.environ.items() if name not in launching.STARTED}
    own |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**own, **environment}
    )


def until(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def saved(tmp_path):
    return checkpoint.newest(tmp_path / "run" / "checkpoints")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_the_warning_of_slurm_asks_to_stop_and_is_given_back():
    before = signal.getsignal(signal.SIGUSR1)
    signals = StopSignals()
    signals.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.requested
    signals.close()
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.slow
def test_two_nodes_meet_and_train_one_run(tmp_path):
    port = free_port()
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "1", "--nproc_per_node", "1"]
    train = ["-m", "rescom_timm", "train", "digits_lt", f"output={tmp_path}", "train.epochs=1", *KEYS]
    nodes = [start([*TORCHRUN, "--nnodes", "2", *meet, *train]) for _ in range(2)]
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    state = saved(tmp_path)[2]
    assert state["processes"] == 2 and len(state["ranks"]) == 2 and state["progress"]["epoch"] == 1
    assert sum(text.count("run folder: ") for text in texts) == 1


@pytest.mark.slow
def test_after_a_killed_worker_the_same_command_goes_on(tmp_path):
    train = ["-m", "rescom_timm", "train", "digits_lt", f"output={tmp_path}", "train.epochs=6", "checkpoint.every=1"]
    once = shlex.join([*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--shutdown_timeout", "2", *train, *KEYS])
    process = start(["bash", "-c", f"for try in 1 2; do {once} && break; done"])
    until(lambda: saved(tmp_path), process)
    started = [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]
    workers = [
        one for one in started if "rescom_timm" in one.cmdline() and "torch.distributed.run" not in one.cmdline()
    ]
    assert len(workers) == 2
    workers[1].kill()
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert re.search(r"run folder: .*run, resumed from step-", text), text
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(epochs)) == list(range(1, 7)) and saved(tmp_path)[2]["progress"]["epoch"] == 6


SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(int(os.environ["SLURM_NTASKS"]))
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
open(os.environ["SRUN_PID"], "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["warned", "pre-empted"])
def test_the_slurm_script_saves_is_requeued_and_goes_on(tmp_path, number):
    """srun and scontrol are stand-ins."""
    script = tmp_path / "job.sh"
    script.write_text(re.search(r"```sh\n(#!/bin/bash\n.*?)```", PAGE, re.S)[1].replace("29500", str(free_port())))
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RECIPE": " ".join(["digits_lt", f"output={tmp_path}", "train.epochs=8", "checkpoint.every=1", *KEYS[:-1]]),
        "SLURM_JOB_NODELIST": "one", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "REQUEUED": str(tmp_path / "requeued"),
        "SRUN_PID": str(tmp_path / "srun.pid"),
    }  # fmt: skip
    process = start(["bash", str(script)], **job)
    until(lambda: saved(tmp_path), process)
    os.kill(int((tmp_path / "srun.pid").read_text()), number)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and "all is saved in" in text, text
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    stopped = saved(tmp_path)[2]["progress"]["step"]
    process = start(["bash", str(script)], **job)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"resumed from step-{stopped:08d}" in text, text
    assert saved(tmp_path)[2]["progress"]["epoch"] == 8
