"""Files are written whole or not at all, and what a stranger wrote is read within bounds."""

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rescom_timm import io as files
from tests.raises import raises

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine levels of nine aliases: 387 million values from 400 bytes."""


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    files.write_text(path, ["old", "\n"])

    def pieces():
        yield "new"
        raise OSError(28, "No space left on device")

    with raises("file.failed", "No space left on device", "file.txt", kind=OSError):
        files.write_text(path, pieces())
    assert path.read_text() == "old\n" and os.listdir(path.parent) == ["file.txt"]


def test_tensors_have_the_rights_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).view(2, 3).t()}, {"format": "pt"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_tensors_that_cannot_be_written_are_an_oserror_that_names_the_file(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with raises("file.failed", "No space left on device", "a.safetensors", kind=OSError):
        files.write_tensors(tmp_path / "a.safetensors", {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "naming"),
    [
        (LAUGHS, ["*a"]),
        ("base: &x 1\nname: *x\n", ["line 2", "*x"]),
        ("a: " + "[" * 3000 + "]" * 3000, ["line 1", 50]),
        ("a: " + "{b: " * 60 + "1" + "}" * 60, [50]),
        ("a: " + "9" * 5000, ["5,000"]),
        ("a: 2026-13-45", []),
        ("? [a, b]\n: 1\n", ["a", "b"]),
        ("a: !!python/object/apply:os.system [true]", ["os.system"]),
        ("a: 1\na: 2\n", ["line 1", "a"]),
        ("[1]", ["list"]),
        ("x" * (files.MAX_RECIPE + 1), ["1 MiB"]),
    ],
    ids=["laughs", "alias", "deep-list", "deep-map", "digits", "date", "key", "tag", "twice", "list", "large"],
)
def test_untrusted_yaml_is_bounded(tmp_path, text, naming):
    (tmp_path / "recipe.yaml").write_text(text)
    with raises("file.size" if len(text) > files.MAX_RECIPE else "file.format", tmp_path / "recipe.yaml", *naming):
        files.read_yaml(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000 + b"]" * 100_000, b'{"a": ', b"[1]", b"\xff\xfe", b"1" * 5000],
    ids=["deep", "torn", "list", "bytes", "digits"],
)
def test_untrusted_json_is_bounded(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with raises("file.format", tmp_path / "a.json"):
        files.read_json(tmp_path / "a.json")


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 10)
    files.write_json(tmp_path / "a.json", {"a": 1}, indent=None)
    assert files.read_json(tmp_path / "a.json") == {"a": 1} == json.loads((tmp_path / "a.json").read_text())
    files.write_json(tmp_path / "a.json", {"a": 1000})
    with raises("file.size", "a.json"):
        files.read_json(tmp_path / "a.json")


OWN = ("a", "b", "c")


def fill(folder, version):
    """An export of ours: a and b always, c in the first version only."""
    with files.atomic_folder(folder, OWN) as new:
        for name in OWN[: 3 if version == 1 else 2]:
            files.write_text(new / name, f"{name}{version}")


def content(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


FIRST, SECOND = {"a": "a1", "b": "b1", "c": "c1"}, {"a": "a2", "b": "b2"}
FOREIGN = {"README.md": "mine"}


def test_a_folder_is_replaced_whole_and_keeps_what_is_not_ours(tmp_path):
    folder = tmp_path / "model"
    fill(folder, 1)
    assert content(folder) == FIRST
    (folder / "README.md").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes/x").write_text("y")
    fill(folder, 2)
    assert content(folder) == SECOND | FOREIGN
    assert (folder / "notes/x").read_text() == "y"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_renamed_gets_the_files_one_by_one(tmp_path, monkeypatch):
    folder = tmp_path / "mounted"
    fill(folder, 1)
    (folder / "README.md").write_text("mine")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(folder))
    fill(folder, 2)
    assert content(folder) == SECOND | FOREIGN
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "a", "b"]


def test_a_file_where_a_folder_belongs_is_told(tmp_path):
    (tmp_path / "model").write_text("in the way")
    with raises("file.exists", "model", kind=FileExistsError):
        fill(tmp_path / "model", 1)
    assert (tmp_path / "model").read_text() == "in the way"


DISK = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.chmod",
    "shutil.copy2",
    "shutil.copyfile",
    "shutil.copymode",
    "shutil.copystat",
)
"""Events of the disk that may fail; shutil.rmtree does not matter, and os.remove only cleans."""
AT: list[int] = []
"""How many such events are let through before one of them fails; empty: all."""


def fail(event, arguments):
    if AT and event in DISK and (event != "open" or "w" in str(arguments[1])):
        AT[0] -= 1
        if AT[0] == -1:
            raise OSError(28, "No space left on device")


def test_a_folder_is_the_old_or_the_new_whatever_fails(tmp_path):
    sys.addaudithook(fail)  # stays, for it cannot be taken away, and does nothing
    folder, number, met = tmp_path / "model", 0, True
    while met:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        fill(folder, 1)
        (folder / "README.md").write_text("mine")
        AT[:] = [number]
        expected = SECOND | FOREIGN
        try:
            fill(folder, 2)
        except OSError:
            expected = FIRST | FOREIGN
        met = AT[0] < 0
        AT.clear()
        assert content(folder) == expected, number
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        number += 1
    assert number > 8, "each of them failed once"


KILLED = """
import os, signal, sys
from tests.test_io import DISK, fill
left = [int(sys.argv[2])]
def kill(event, arguments):
    if event in (*DISK, "os.remove", "os.rmdir", "shutil.rmtree"):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
fill(sys.argv[1], 2)
"""


@pytest.mark.slow
def test_a_folder_is_the_old_or_the_new_wherever_it_was_killed(tmp_path):
    folder, number, code = tmp_path / "model", 0, -9
    while code == -9:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        fill(folder, 1)
        (folder / "README.md").write_text("mine")
        command = [sys.executable, "-c", KILLED, str(folder), str(number)]
        code = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode
        if folder.exists():
            assert content(folder) in (FIRST | FOREIGN, SECOND | FOREIGN), number
        fill(folder, 2)
        assert content(folder) == SECOND | FOREIGN, f"{number}: what others put there is there again"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        number += 1
    assert code == 0 and number > 8


def test_cells_are_no_formulas(tmp_path):
    cells = ["=1+1", "+cmd", "-x", "@SUM(A1)", "\tx", "-1.5", "+2", "plain", "a=b", -3, 0.5, ""]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        files.write_rows(file, [cells])
    with (tmp_path / "x.csv").open(newline="") as file:
        (read,) = csv.reader(file)
    assert read == ["'=1+1", "'+cmd", "'-x", "'@SUM(A1)", "'\tx", "-1.5", "+2", "plain", "a=b", "-3", "0.5", ""]
