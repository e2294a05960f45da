"""Errors that a user can meet. Each has a stable code, `area.kind`.

The command line prints `error[area.kind]: message`. Messages may change from release to release, codes do not; code and
tests match codes. Raise a class of this module (or a subclass elsewhere) with a code of CODES:

    raise InputError("index.label", f"{path}: line {n}: label {label!r} is not a whole number from 0")

A code names what the user has to mend, not the place that noticed it: two checks with the same remedy share a code.
"""

from __future__ import annotations

CODES = {
    # the command line and the system
    "usage.arguments": "arguments that a subcommand does not take",
    "file.missing": "a file or folder does not exist",
    "file.exists": "a file or folder exists and is not overwritten",
    "file.permission": "a file may not be read or written",
    "file.failed": "the disk, its connection or the system refused a file",
    "system.memory": "the memory is full",
    "system.package": "an optional package is not installed",
    "system.failed": "an error without a code of its own",
}
"""Every code and what is wrong, by area."""


class CodedError(Exception):
    """Base class. `code` is one of CODES."""

    def __init__(self, code: str, message: str | None = None) -> None:
        if message is None:  # until every raise has its code
            code, message = "system.failed", code
        BaseException.__init__(self, code, message)  # OSError's would take the two for a number and its text
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class InputError(CodedError, ValueError):
    """A value, a file or data that cannot be used."""


class MissingFileError(CodedError, FileNotFoundError):
    """A file or folder does not exist."""


class MissingPackageError(CodedError, ImportError):
    """An optional package is not installed; the message has the command that installs it."""


_BUILT_IN: tuple[tuple[type[BaseException], str], ...] = (
    (FileNotFoundError, "file.missing"),
    (FileExistsError, "file.exists"),
    (PermissionError, "file.permission"),
    (OSError, "file.failed"),
    (MemoryError, "system.memory"),
    (ImportError, "system.package"),
)


def code_of(error: BaseException) -> str:
    """The code of any exception: its own, else one by its built-in class."""
    if isinstance(error, CodedError):
        return error.code
    return next((code for kind, code in _BUILT_IN if isinstance(error, kind)), "system.failed")
