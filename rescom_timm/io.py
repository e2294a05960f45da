"""Atomic writes and bounded reads of files.

A reader sees the old file or the whole new one, whenever a process is killed or a disk is full. Files that are read are
untrusted: their size and depth are bounded, and each problem is an error of one line.
"""

from __future__ import annotations

import csv
import errno
import functools
import glob
import hashlib
import inspect
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rescom_timm.errors import CodedError, InputError

MAX_RECIPE = 2**20
"""Bytes of the largest YAML file that is read."""
MAX_JSON = 2**28
"""Bytes of the largest JSON file of a run, an export or a checkpoint that is read."""
MAX_DEPTH = 50
"""Sections within sections of a YAML file; a recipe has five."""
MAX_NUMBER = 1000
"""Characters of a number in a YAML file. The time to read one grows with the square of them."""


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, renamed to `path` when the block succeeds, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name[:80])
    beside = path.with_name(f".{path.name[:80]}.{_writer(os.getpid())}{uuid.uuid4().hex[:16]}")
    _writing.add(beside)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
        _writing.discard(beside)


_writing: set[Path] = set()
"""Temporary paths in use by the threads of this process."""


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of killed writers from a folder, of the file `name` or of all files.

    Those whose process on this machine has ended, and those older than a day.
    """
    for left in folder.glob(f".{glob.escape(name)}.*" if name else ".*"):
        ending = re.fullmatch(r"\..+\.([0-9a-f]{8})([0-9a-f]{8})[0-9a-f]{16}", left.name)
        if ending is None or (name and len(left.name) != len(name) + 34):
            continue
        with suppress(OSError):
            here, process = ending[1] == _writer(0)[:8], int(ending[2], 16)
            gone = here and (left not in _writing if process == os.getpid() else not psutil.pid_exists(process))
            if left.is_file() and (gone or time.time() - left.stat().st_mtime > 86_400):
                left.unlink()


def _writer(process: int) -> str:
    """This machine and one of its processes, in 16 hexadecimal digits."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8] + f"{process:08x}"


@contextmanager
def file_lock(path: str | Path, timeout: float = -1) -> Iterator[bool]:
    """Hold the lock file during the block; wait for it up to `timeout` seconds (below 0: without limit).

    Yields whether the lock is held: a disk without file locks (NFS without lockd, some network and FUSE disks) gives a
    warning, and the block runs without a lock. Raises filelock.Timeout if another process holds it.
    """
    soft = "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters  # a marker file, which a kill leaves
    options: dict[str, Any] = {"fallback_to_soft": False} if soft else {}
    lock = FileLock(path, **options)
    try:
        lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        _warn_no_locks(str(Path(path).resolve().parent))
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a disk without file locks."""


@functools.cache
def _warn_no_locks(folder: str) -> None:
    warnings.warn(
        f"the disk of {folder} has no file locks: make sure that no second process writes there", stacklevel=4
    )


def check_writable(path: str | Path, is_folder: bool = False) -> None:
    """Check that a file (or with is_folder a folder) can be written, before the work whose result it holds.

    Missing folders are no error: they are made later. Raises OSError, which names `path`.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir() and not is_folder:
        raise IsADirectoryError(errno.EISDIR, "cannot write the file: a folder has its name", str(path))
    folder = path if path.is_dir() else next(one for one in path.parents if os.path.lexists(one))
    with errors_named(path), tempfile.TemporaryFile(dir=folder):
        pass


def write_text(path: str | Path, text: str | Iterable[str]) -> None:
    """Write text (or pieces of it) as UTF-8, atomically. Raises OSError, which names `path`."""
    with errors_named(path), atomic_path(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines([text] if isinstance(text, str) else text)


def write_json(path: str | Path, value: object, indent: int | None = 1) -> None:
    """Write plain values as JSON, atomically. Raises OSError, which names `path`."""
    write_text(path, json.dumps(value, indent=indent))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically, with the umask's permissions (safetensors ignores the umask).

    Raises OSError, which names `path`.
    """
    with errors_named(path), atomic_path(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, beside, metadata)
        except SafetensorError as error:  # also for a full disk
            number = re.search(r"\(os error (\d+)\)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error)) from error
        beside.chmod(mode)


@contextmanager
def atomic_folder(path: str | Path, own: Sequence[str]) -> Iterator[Path]:
    """An empty folder beside `path` to write the files `own` to.

    When the block succeeds it replaces `path` and keeps all other files of `path`; else it is removed and `path` stays
    as it was.

    Leftovers of killed processes are removed, or restored if the process was killed between the two renames. A folder
    that cannot be renamed, such as a mount point, gets the files one by one. Raises OSError.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "cannot make the folder: a file has its name", str(path))
    fixed = path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))
    if not fixed:
        path.parent.mkdir(parents=True, exist_ok=True)
    stem = (path if fixed else path.parent) / f".{path.name[:80]}"
    _clear_leftovers(stem, path)
    new, old = (stem.with_name(f"{stem.name}.{uuid.uuid4().hex}.{end}") for end in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if fixed:
            for name in own:
                if (new / name).exists():
                    os.replace(new / name, path / name)
                else:
                    (path / name).unlink(missing_ok=True)
            return
        if path.exists():
            for entry in path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.copytree(entry, new / entry.name, symlinks=True)
                elif entry.name not in own:
                    shutil.copy2(entry, new / entry.name, follow_symlinks=False)
            new.chmod(path.stat().st_mode)
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _clear_leftovers(stem: Path, path: Path) -> None:
    for left in stem.parent.glob(f"{glob.escape(stem.name)}.*"):
        ending = re.fullmatch(r"\.[0-9a-f]{32}\.(new|old)", left.name.removeprefix(stem.name))
        if ending and ending[1] == "old" and not path.exists():
            left.rename(path)
        elif ending:
            shutil.rmtree(left, ignore_errors=True)


def write_csv(path: str | Path, columns: Mapping[str, Iterable[object]]) -> None:
    """Write columns of one length as CSV (`write_rows`), atomically; None is an empty cell.

    A name that is not UTF-8 keeps its bytes. Raises OSError, which names `path`.
    """
    with (
        errors_named(path),
        atomic_path(path) as beside,
        beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        write_rows(file, [list(columns), *zip(*columns.values(), strict=True)])


def write_rows(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV.

    Text that a spreadsheet would run as a formula (not a number, and =, +, -, @, a tab or a carriage return first) gets
    an apostrophe before it.
    """
    writer = csv.writer(file)
    for row in rows:
        writer.writerow([_harmless(cell) if isinstance(cell, str) else cell for cell in row])


def _harmless(cell: str) -> str:
    try:
        float(cell)
    except ValueError:
        return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
    return cell


@contextmanager
def errors_named(path: str | Path) -> Iterator[None]:
    """Re-raise an OSError of the block with `path`, instead of a temporary name or none."""
    try:
        yield
    except CodedError:
        raise
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The value of a JSON file, which must be of this kind: an object by default.

    Raises FileNotFoundError, or InputError (file.format, file.size, file.kind), which names the file.
    """
    path = Path(path)
    text = read_text(path, MAX_JSON)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError("file.format", f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise InputError("file.format", f"{path}: the JSON is nested too deep") from None
    if not isinstance(value, kind):
        found = type(value).__name__
        message = f"{path} holds {found}, not {kind.__name__}: it was not written by rescom_timm"
        raise InputError("file.format", message)
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file; an empty file is an empty mapping.

    Raises FileNotFoundError, or InputError (file.format, file.size, file.kind), which names the file; aliases and keys
    given twice are errors.
    """
    path = Path(path)
    text = read_text(path, MAX_RECIPE)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise InputError("file.format", f"{path}: not a YAML file: {error}") from None
    if not isinstance(value, dict | None):
        raise InputError("file.format", f"{path}: a recipe must be a mapping of keys, not {type(value).__name__}")
    return value or {}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises InputError (file.format), in one line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise InputError("file.format", "nested too deep") from None
    except yaml.YAMLError as error:
        raise InputError("file.format", " ".join(str(error).split())) from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML, of a value that is not of its !!tag
        raise InputError("file.format", f"a value does not fit its tag: {error}") from None


def read_text(path: str | Path, most: int = MAX_JSON, errors: str = "strict") -> str:
    """The text of a regular UTF-8 file of at most `most` bytes.

    errors: as of open. Raises FileNotFoundError, or InputError (file.format, file.size, file.kind), which names the
    file.
    """
    path = Path(path)
    size = regular_size(path)
    if size > most:
        raise InputError(
            "file.size", f"{path} is not read: it has {size / 2**20:,.0f} MiB; at most {most / 2**20:,.0f} are read"
        )
    with path.open("rb") as file:
        content = file.read(most)  # files of /proc have no size and no end
    try:
        return content.decode("utf-8", errors).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError("file.format", f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def regular_size(path: str | Path) -> int:
    """Bytes of a regular file.

    Raises FileNotFoundError, or InputError (file.kind) for a folder, a pipe or a device: the last two may have no end.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise InputError("file.kind", f"{path} is not a regular file: name a file")
    return about.st_size


def sha256(path: str | Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal. Raises as regular_size does."""
    regular_size(path)
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_links(folder: str | Path, within: Sequence[str] = ()) -> None:
    """Refuse a folder with a symlink to outside of it: writing or uploading would reach other files.

    Checks its entries and everything in its subfolders `within`. Raises InputError (file.link).
    """
    root = os.path.realpath(folder)
    entries = [entry.path for entry in os.scandir(root)] if os.path.isdir(root) else []
    for path in entries:
        _refuse_link(path, root)
    for path, folders, files in (found for name in within for found in os.walk(os.path.join(root, name))):
        for name in (*folders, *files):
            _refuse_link(os.path.join(path, name), root)


def _refuse_link(path: str, root: str) -> None:
    if os.path.islink(path) and not os.path.realpath(path).startswith(os.path.join(root, "")):
        raise InputError(
            "file.link",
            f"{path} is a symlink outside {root}; refusing to write or upload through it: replace it with its target "
            "or remove it",
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where users expect it.

    1e-4 is a number (1.1 wants 1.0e-4), only true and false are booleans (1.1 also
    reads no, off, yes and on, and train.precision may be `no`). A key given twice is an error, and so are aliases, with
    which a short file grows to gigabytes.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: aliases (*{event.anchor}) are not read: write the value out"
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if isinstance(name, list | dict):
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {name!r} is no name of a key")
        seen: set[Any] = set()
        twice = {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: given twice: {', '.join(map(str, twice))}")
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    if len(node.value) > MAX_NUMBER:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a number of {len(node.value):,} digits")
    return loader.construct_yaml_int(node) if node.tag.endswith(":int") else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
