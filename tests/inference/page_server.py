"""A page of the demo, served by a process of its own for as long as a test looks at it."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(words: Sequence[str], port: int, folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """words: the command, run in `folder`. Gives the page's address as soon as it answers; raises AssertionError, with
    what the process said, where it does not."""
    log, address, end = folder / "page.log", f"http://127.0.0.1:{port}", time.monotonic() + 120
    with log.open("w") as file:
        server = subprocess.Popen(words, cwd=folder, stdout=file, stderr=file, env=environment)
    try:
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(20)
