"""What a fit has done so far, RUN/fit/fit.json: its command, plan, table and time. The same command goes on from it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rescom_timm.errors import InputError
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.io import read_json, write_json

FOLDER, FILE = "fit", "fit.json"
FREE = ("device",)
"""Options that may change when a fit goes on."""


class Record:
    """`values` is plain JSON; time runs from when the record is opened."""

    def __init__(self, run: Path, options: FitOptions, used: float = 0.0) -> None:
        """used: seconds before this, such as of imports. Raises InputError where the folder is of another command."""
        self.path = run / FOLDER / FILE
        self.values: dict[str, Any] = {
            "version": 1, "command": options.to_dict(), "seconds": 0.0, "finished": False,
            "paces": {}, "trained": {}, "dropped": [], "left_out": [],
        }  # fmt: skip
        if self.path.is_file():
            self.values = read_json(self.path)
            if odd := _different(self.values["command"], options):
                raise InputError(
                    "fit.other_run",
                    f"{run} was made by another command ({', '.join(odd)}): name another folder with -o",
                )
        self.before = float(self.values["seconds"]) + used
        self.started, self.left_out = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Time used so far, over all starts, without downloads."""
        return self.before + time.monotonic() - self.started - self.left_out

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """The time of the block, a download, is not counted."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.left_out += time.monotonic() - began

    def save(self, **values: object) -> None:
        """Write the record with these values in it."""
        self.values |= values | {"seconds": round(self.seconds, 3)}
        write_json(self.path, self.values)


def _different(command: Mapping[str, object], options: FitOptions) -> list[str]:
    """The options that differ from those of a record's command, as they were and are."""
    now = options.to_dict()
    odd = [key for key in now if key not in FREE and command.get(key) != now[key]]
    return [f"{key}: {command.get(key)!r} then, {now[key]!r} now" for key in odd]
