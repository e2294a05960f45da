"""SIGTERM, Ctrl-C and, as SLURM warns jobs with, SIGUSR1: a run is asked to stop, saves its state and ends.

A second SIGTERM or Ctrl-C ends it at once, whatever it hangs in. Where the first finds it waiting for a batch of a
loader that is stuck, the wait ends too.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rescom_timm.engine.errors import Stopped

WARNING = tuple(getattr(signal, name) for name in ["SIGUSR1"] if hasattr(signal, name))  # Windows has none
ENDS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*ENDS, *WARNING)
ECHO = 1.0
"""Seconds for which a signal is the first one's echo: a launcher passes on what its whole group got."""
STUCK = 5.0
"""Seconds after which one wait for a batch counts as stuck, once the run is asked to stop."""
UNSAVED = 12
"""Times as long where the state could not be saved then."""


class LoaderStuck(Stopped):
    """The run was asked to stop while it waited for a batch that does not come."""


class StopSignals:
    """Notes that a signal asked the run to stop, from `listen` to `close`."""

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[signal.Signals, Any] = {}
        self.stuck = False
        self.unsaved = False
        """Whether a stop within a wait for a batch could not save the state: between two optimizer steps, say."""
        self.ends: tuple[socket.socket, socket.socket] | None = None
        self.wakeup = -1

    def listen(self) -> None:
        """Install the handlers, in the main thread only."""
        if threading.current_thread() is not threading.main_thread():  # no other may set handlers
            return
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Python runs a handler between two steps of its main thread; this thread hears a signal while that one hangs.
        self.ends = socket.socketpair()
        for end in self.ends:
            end.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.ends[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self.ends[0], threading.get_ident()), daemon=True).start()

    def close(self) -> None:
        """The handlers as they were before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
        if self.ends is not None:
            signal.set_wakeup_fd(self.wakeup)
            self.ends[1].close()  # ends the thread
            self.ends = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested and os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping as soon as the state is saved (a second Ctrl-C or SIGTERM ends at once)\n")
        self.requested = True
        self.stuck = self.stuck and _wait(frame) is not None
        if self.stuck:
            raise LoaderStuck("asked to stop while waiting for a batch that does not come: continue with --resume")

    @contextmanager
    def unstuck(self, stopped: Callable[[], Stopped]) -> Iterator[None]:
        """A stop that finds the loader of the block stuck is reported by `stopped`, which saves what can be saved."""
        try:
            yield
        except LoaderStuck as error:
            raise stopped() from error

    def _watch(self, signals: socket.socket, main: int) -> None:
        asked, first, wait, since = False, None, None, 0.0
        while True:
            select.select([signals], [], [], STUCK / 10 if asked else None)
            try:
                numbers = signals.recv(64)
                if not numbers:
                    break
            except BlockingIOError:
                numbers = b""
            now = time.monotonic()
            for number in numbers:
                asked = asked or number in SIGNALS
                if number in ENDS:
                    first = first or now
                    if now - first > ECHO:
                        _end(number)
            found = _wait(sys._current_frames().get(main)) if asked else None
            if found is not wait:
                wait, since = found, now
            if wait is not None and now - since >= STUCK * (UNSAVED if self.unsaved else 1) and WARNING:
                self.stuck, since = True, now
                signal.pthread_kill(main, WARNING[0])
        signals.close()


def _wait(frame: FrameType | None) -> FrameType | None:
    """The call in which a thread waits for the next batch of a torch DataLoader; None where it does something else."""
    while frame is not None:
        if frame.f_code.co_name == "_next_data" and frame.f_code.co_filename.endswith("dataloader.py"):
            return frame
        frame = frame.f_back
    return None


def _end(number: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, b"stopped at once by a second signal: continue with --resume, from the last checkpoint\n")
    os._exit(128 + number)


def in_own_process_group(worker: int) -> None:
    """Give a loader's worker a process group of its own.

    A signal to the group of its parent (Ctrl-C, or SIGTERM from torchrun) then asks the parent to stop and does not
    kill its workers. Workers ignore SLURM's warning, which every process of a job gets.
    """
    signal.set_wakeup_fd(-1)  # forked from the trainer, whose it is
    for number in WARNING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
