"""Downloads that resume, are verified and unpacked:  rescom-timm get.

Each file is downloaded to `.get/NAME` beside its destination, verified, unpacked below `.get/NAME.unpacked` and moved
into place; the downloaded archive is removed then. An interrupted command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import get_session
from huggingface_hub.file_download import http_get
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from rescom_timm.data.benchmarks import BENCHMARKS, Benchmark, Download, human
from rescom_timm.data.config import DataConfig
from rescom_timm.data.index import Index
from rescom_timm.data.progress import bars_shown
from rescom_timm.data.tables import open_table
from rescom_timm.errors import InputError, MissingFileError, UnreachableError
from rescom_timm.io import file_lock, write_json
from rescom_timm.text import counted

WORK = ".get"
"""Folder for what is not complete yet."""


@dataclass(frozen=True)
class Step:
    """What is to be done for one file. source: where it is taken from; None: it is there already."""

    file: Download
    folder: Path
    source: str | Path | None

    @property
    def size(self) -> int:
        """Bytes of the file: of the one that is here, else about those of the published one."""
        return _size(self.source) if isinstance(self.source, Path) else self.file.size

    @property
    def needs(self) -> int:
        """Bytes that have to be free, about."""
        if self.source is None:
            return 0
        kept = 0 if isinstance(self.source, Path) else self.size - _size(self.folder / WORK / self.file.name)
        return max(kept, 0) + (self.file.on_disk(self.size) if self.file.is_archive else 0)


def plan(name: str, to: str | Path = ".", archives: Sequence[str | Path] = ()) -> list[Step]:
    """What `get` would do for each file of a benchmark.

    name: a key of BENCHMARKS. to: the folder that holds, or will hold, data/ and lists/. archives: files that are here
    already, by their original names.
    Raises InputError for another name and for archives that the benchmark does not have, MissingFileError for archives
    that do not exist.
    """
    benchmark, to = _benchmark(name), Path(to).expanduser()
    here = _at_hand(name, archives)
    steps = []
    for file in benchmark.files:
        folder = to / file.folder
        there = (folder / file.makes).exists()
        steps.append(Step(file, folder, None if there else here.get(file.name, file.url)))
    return steps


def _at_hand(name: str, archives: Sequence[str | Path]) -> dict[str, Path]:
    """The archives that are here already by their names. Raises as `plan`."""
    here = {Path(archive).name: Path(archive).expanduser() for archive in archives}
    names = [file.name for file in _benchmark(name).files]
    for own, path in here.items():
        if own not in names:
            known = ", ".join(names) or "none: it comes from the Hub"
            raise InputError("get.archive", f"--from {path}: {name} has no file of that name; it has {known}")
        if not path.is_file():
            raise MissingFileError("file.missing", f"--from {path}: there is no such file")
    return here


def get(
    name: str,
    to: str | Path = ".",
    archives: Sequence[str | Path] = (),
    check: bool = True,
    say: Callable[[str], object] = print,
) -> None:
    """Fetch the data of a shipped recipe: images, annotations and lists, and check the training list's numbers.

    Arguments as for `plan`. check: verify digests, and rows and classes of the training list. What is there is not
    fetched again; another `get` in the same folder is waited for.
    Raises as `plan` does, InputError for a file with another digest, too little space or a list with other numbers, and
    UnreachableError where a server does not answer or refuses.
    """
    to, benchmark = Path(to).expanduser(), _benchmark(name)
    _at_hand(name, archives)
    to.mkdir(parents=True, exist_ok=True)
    with file_lock(to / f".get_{name}.lock"):
        steps = plan(name, to, archives)  # with the lock: another process may have been at work
        check_space(steps, to)
        if benchmark.hub and not Path(HF_DATASETS_CACHE, benchmark.hub.replace("/", "___")).is_dir():
            hint = "set HF_HOME to another disk"
            _refuse_full(HF_DATASETS_CACHE, 2 * benchmark.hub_size, "files and a copy to read", hint)
        for step in steps:
            if step.source is None:
                say(f"{step.folder / step.file.makes} is there")
                continue
            _fetch(step, check)
            say(f"{step.folder / step.file.makes}: done")
        for split in benchmark.hub_splits:
            images = counted(_from_hub(benchmark.hub, split), "image")
            say(f"{benchmark.hub} {split}: {images} in the cache of Hugging Face")
        if benchmark.train:
            _check_list(to / benchmark.train, benchmark, check, say)


def check_space(steps: Sequence[Step], to: str | Path) -> None:
    """Raises InputError where the disk has not enough room for archives and unpacked images."""
    needed = sum(step.needs for step in steps)
    _refuse_full(to, needed, "archives and unpacked images", "name another disk with --to")


def _refuse_full(folder: str | Path, needed: int, what: str, hint: str) -> None:
    if needed > (free := free_space(folder)):
        raise InputError(
            "get.space",
            f"{folder} has {human(free)} free and about {human(needed)} are needed ({what}): free disk space, "
            f"or {hint}",
        )


def free_space(folder: str | Path) -> int:
    """Bytes free on the disk of a folder that may not exist yet."""
    place = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(there for there in (place, *place.parents) if there.exists())).free


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise InputError("get.name", f"no data set {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _from_hub(name: str, split: str) -> int:
    """Fetch a split into the cache; returns its number of images."""
    try:
        return len(open_table(DataConfig(name), None, split).dataset)
    except MissingFileError as error:
        if error.code != "hub.not_found":
            raise
        raise MissingFileError(
            "hub.not_found",
            f"{name} is not open to you: accept its terms at https://huggingface.co/datasets/{name} and log in with  "
            "hf auth login  (or set HF_TOKEN), then run the command again",
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch(step: Step, check: bool) -> None:
    file, work = step.file, step.folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    source = step.source if isinstance(step.source, Path) else work / file.name
    if source != step.source:
        _download(str(step.source), source)
    if check and not _is_verified(source, file):
        if source != step.source:
            source.unlink()
        raise InputError(
            "get.checksum",
            f"{source} is not the published {file.name} (its checksum differs): download it again, or use it as it is "
            "with --no-check",
        )
    if file.is_archive:
        _unpack(source, step.folder, work / f"{file.name}.unpacked", file.makes)
    elif source != step.source:
        os.replace(source, step.folder / file.makes)
    else:
        shutil.copyfile(source, work / file.makes)
        os.replace(work / file.makes, step.folder / file.makes)
    if source != step.source:
        source.unlink(missing_ok=True)
        (work / f"{file.name}.verified").unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()


def _download(url: str, path: Path) -> None:
    """Resumes; the bytes that are there are kept when it fails."""
    plain = {"Accept-Encoding": "identity"}
    try:
        with open(path, "ab") as file:
            size = get_session().head(url, headers=plain, follow_redirects=True).headers.get("Content-Length")
            if file.tell() and size == str(file.tell()):
                return
            http_get(url, file, resume_size=file.tell(), headers=plain, displayed_filename=path.name)
    except OSError as error:
        if error.errno is not None:
            raise  # of the disk
        raise _unreachable(url, error) from error
    except Exception as error:  # of the client's HTTP library, which changes from version to version
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> UnreachableError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UnreachableError(
        "get.unreachable",
        f"{url} could not be downloaded ({reason}): the same command goes on where it stopped; a file that you have is "
        "taken with --from FILE",
    )


def _is_verified(path: Path, file: Download) -> bool:
    """Whether a file has its published digest. `.verified` beside it records that, so that it is read once."""
    mark = path.with_name(f"{path.name}.verified")
    state = path.stat()
    known = {"size": state.st_size, "time": state.st_mtime_ns, "digest": file.digest}
    if mark.is_file() and json.loads(mark.read_text()) == known:
        return True
    kind, _, wanted = file.digest.partition(":")
    digest = hashlib.md5(usedforsecurity=False) if kind == "md5" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {state.st_size}\0".encode())
    with open(path, "rb") as content, _bar(f"verifying {path.name}", state.st_size) as bar:
        while block := content.read(2**20):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != wanted:
        return False
    if path.parent.name == WORK:
        write_json(mark, known)
    return True


def _unpack(archive: Path, folder: Path, work: Path, makes: str) -> None:
    """Members that are there already, in full, are passed over: an interrupted unpacking goes on."""
    with open(archive, "rb") as raw, _bar(f"unpacking {archive.name}", archive.stat().st_size) as bar:
        mode: Literal["r|gz", "r|"] = "r|gz" if archive.name.endswith(".gz") else "r|"
        try:
            with tarfile.open(fileobj=CallbackIOWrapper(bar.update, raw), mode=mode) as tar:  # type: ignore[call-overload]
                for member in tar:
                    if not (member.isfile() and _size(work / member.name) == member.size):
                        tar.extract(member, work, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise InputError("get.archive", f"{archive} cannot be unpacked ({error}): download it again") from error
    if not (work / makes).exists():
        raise InputError("get.archive", f"{archive} holds no {makes}: it is not the published archive")
    for entry in work.iterdir():
        if entry.name != makes and not (folder / entry.name).exists():
            os.replace(entry, folder / entry.name)
    os.replace(work / makes, folder / makes)  # last: its presence says that all is there
    shutil.rmtree(work)


def _bar(about: str, total: int) -> tqdm:
    return tqdm(total=total, desc=about, unit="B", unit_scale=True, leave=False, disable=not bars_shown())


def _check_list(path: Path, benchmark: Benchmark, check: bool, say: Callable[[str], object]) -> None:
    index = Index.load(path)
    rows, classes = len(index.labels), index.num_classes
    found = f"{counted(rows, 'training image')} of {counted(classes, 'class')}"
    say(f"{path}: {found}")
    if check and (rows, classes) != (benchmark.rows, benchmark.classes):
        raise InputError(
            "get.list",
            f"{path} has {found}, and {benchmark.rows:,} of {benchmark.classes:,} are "
            "published: remove it and run the command again",
        )
