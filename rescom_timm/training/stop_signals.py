"""SIGTERM, Ctrl-C and, as SLURM warns jobs with, SIGUSR1: a run is asked to stop, saves its state and ends."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

WARNING = tuple(getattr(signal, name) for name in ["SIGUSR1"] if hasattr(signal, name))  # Windows has none
SIGNALS = (signal.SIGTERM, signal.SIGINT, *WARNING)


class StopSignals:
    """Notes that a signal asked the run to stop, from `listen` to `close`."""

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self) -> None:
        """The handlers as they were before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once


def in_own_process_group(worker: int) -> None:
    """Puts a loader's worker into a process group of its own, so that a signal to the group of its parent (Ctrl-C, or
    torchrun, which passes SIGTERM to the whole group) asks the parent to stop and does not kill its workers. Workers go
    on after SLURM's warning, which every process of a job gets."""
    for number in WARNING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
