"""One verb a file; each is asked for its parser first, and imports what does the work when its words are read, so that
help comes at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType


def new_parser(about: str | None, prog: str | None, *examples: str) -> argparse.ArgumentParser:
    """A parser that tells ``about`` as it is written, and ends with examples of the verb."""
    return argparse.ArgumentParser(
        prog=prog,
        description=about,
        epilog=example(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def example(*lines: str) -> str:
    return "\n".join([f"example{'s' * (len(lines) > 1)}:", *(f"  {line}" for line in lines)])


def answer(work: Callable[[], int], failed: int = 1, named: bool = True, trains: bool = False) -> int:
    """The exit code of a verb: what its work returns, or `failed` after one line on stderr that says why.

    named: the line begins with the kind of error. Ctrl-C ends it with 130; SIGTERM with 143, and its children and files
    half written go with it. trains: SIGTERM is left to the training, which saves its state before it ends.
    """
    from rescom_timm.training.errors import FAILURES, one_line, with_advice

    mine = not trains and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminated) if mine else None
    try:
        with with_advice(""):
            return work()
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*FAILURES, ImportError, MemoryError) as error:
        print(one_line(error) if named else f"error: {error}", file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
