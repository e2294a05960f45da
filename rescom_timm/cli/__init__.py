"""One module per subcommand, and what they share: parser, error lines, exit codes.

A module has `main(argv, prog) -> exit code`, and its docstring is the text of --help. Heavy imports follow argument
parsing; `parts` has what needs them from the first line. Not here: the work itself, which the packages below do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rescom_timm.errors import code_of
from rescom_timm.text import escape_controls, escaped_output

EXIT_CODES = (
    "exit codes: 0 ok, 1 failed, 2 usage error, 3 index check, index overlap or doctor found something,\n"
    "            130 stopped by Ctrl-C, 143 stopped by SIGTERM (a training has saved its state)"
)


class Parser(argparse.ArgumentParser):
    """Errors are one line, error[usage.arguments]: MESSAGE, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error[usage.arguments]: {escape_controls(message, lines=True)}\n")


def new_parser(about: str | None, prog: str | None, *examples: str) -> argparse.ArgumentParser:
    """A parser whose help shows ``about`` as it is and ends with the exit codes and examples."""
    return Parser(
        prog=prog,
        description=about,
        epilog=example(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def example(*lines: str) -> str:
    """The exit codes and these examples, for the end of a help text."""
    return "\n".join([EXIT_CODES, "", f"example{'s' * (len(lines) > 1)}:", *(f"  {line}" for line in lines)])


def renamed(old: str, new: str) -> None:
    """Warn on stderr that a subcommand or option has another name."""
    print(
        f"warning: rescom-timm {old} is now  rescom-timm {new}  (the old name works in this release)", file=sys.stderr
    )


def temperature(text: str) -> float | str:
    """The type of --temperature: a number above 0, or fitted."""
    if text == "fitted":
        return text
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def add_rules(
    parser: argparse.ArgumentParser, about: str = "decide so that at least this share of a class is found"
) -> None:
    """Add --recall CLASS=R, again for each class, and --costs: how classes are decided. `check_rules` follows."""
    parser.add_argument(
        "--recall", action="append", default=[], type=_recall, metavar="CLASS=R",
        help=f"{about}: defect=0.9; again for other classes",
    )  # fmt: skip
    parser.add_argument("--costs", metavar="FILE", help="decide by the least expected cost: a CSV or JSON table")


def check_rules(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Make a dict of --recall. Exits with a usage error for a class that is named twice, or two rules."""
    names = [name for name, _ in options.recall]
    options.recall = dict(options.recall)
    if len(options.recall) < len(names):
        parser.error(f"--recall: a class is named twice: {', '.join(names)}")
    if options.recall and options.costs:
        parser.error("--recall and --costs are two ways to decide: give one")


def _recall(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")  # a class may have = in its name
    try:
        least = float(number)
    except ValueError:
        least = float("nan")
    if not name or not equals or not 0 < least < 1:
        raise argparse.ArgumentTypeError(f"CLASS=R with R between 0 and 1, such as defect=0.9, not {text!r}")
    return name, least


@escaped_output()
def answer(
    work: Callable[[], int],
    trains: bool = False,
    writes: Sequence[str | Path | None] = (),
    folders: Sequence[str | Path | None] = (),
) -> int:
    """Run the work of a subcommand and return its exit code: what it returns, or 1 after an error line on stderr.

    Ctrl-C returns 130. SIGTERM exits with 143 and removes half-written files. trains: leave SIGTERM to the training,
    which saves its state. writes, folders: output files and folders, checked before the work starts.
    """
    print_loading()
    with _stoppable():
        from rescom_timm.engine.errors import FAILURES, message, with_advice
        from rescom_timm.io import check_writable

    mine = not trains and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminated) if mine else None
    try:
        with with_advice(""):
            for path in (*writes, *folders):
                if path:
                    check_writable(path, is_folder=path in folders)
            return work()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*FAILURES, ImportError, MemoryError) as error:
        _print_error(f"error[{code_of(error)}]: {message(error)}")
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def _print_error(line: str) -> None:
    """Print an error line; of several processes the first prints, and torchrun's report has the others' lines."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        plain = escape_controls(line, lines=True)
        about = {"py_callstack": plain, "timestamp": int(time.time())}
        with suppress(OSError):
            Path(report).write_text(json.dumps({"message": {"message": plain, "extraInfo": about}}))
    if not report or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def print_loading() -> None:
    """Say on stderr that imports take seconds; only in the first process, before them, and without --quiet."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0" and "--quiet" not in sys.argv:
        print("loading PyTorch, timm and datasets ...", file=sys.stderr, flush=True)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, as during imports, which may hide an exception of a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        os.write(2, b"stopped by Ctrl-C\n")
    os._exit(128 + number)


def _terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends at once, without cleaning up
    raise SystemExit(128 + number)
