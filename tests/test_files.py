"""Files are written whole or not at all, and what a stranger wrote is read within bounds."""

import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rescom_timm import files

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

    with pytest.raises(OSError, match="No space left on device.*file.txt"):
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
    with pytest.raises(OSError, match="No space left on device.*a.safetensors"):
        files.write_tensors(tmp_path / "a.safetensors", {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, r"aliases \(\*a\) are not read: write the value out"),
        ("base: &x 1\nname: *x\n", "line 2: aliases"),
        ("a: " + "[" * 3000 + "]" * 3000, "line 1: nested deeper than 50 levels"),
        ("a: " + "{b: " * 60 + "1" + "}" * 60, "nested deeper than 50 levels"),
        ("a: " + "9" * 5000, "not a YAML file"),
        ("a: 2026-13-45", "not a YAML file"),
        ("? [a, b]\n: 1\n", "is no name of a key"),
        ("a: !!python/object/apply:os.system [true]", "not a YAML file"),
        ("a: 1\na: 2\n", "given twice: a"),
        ("[1]", "a recipe is a mapping of keys, not list"),
        ("x" * (files.MAX_RECIPE + 1), "is not read: it has 1 MiB; at most 1 are read"),
    ],
    ids=["laughs", "alias", "deep-list", "deep-map", "digits", "date", "key", "tag", "twice", "list", "large"],
)
def test_yaml_of_a_stranger_is_bounded_and_told_in_a_line(tmp_path, text, expected):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        files.read_yaml(tmp_path / "recipe.yaml")
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep|is not JSON"),
        (b'{"a": ', "is not JSON"),
        (b"[1]", "holds list, not dict"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"1" * 5000, "is not JSON"),
    ],
    ids=["deep", "torn", "list", "bytes", "digits"],
)
def test_json_of_a_stranger_is_bounded_and_told_in_a_line(tmp_path, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        files.read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 10)
    files.write_json(tmp_path / "a.json", {"a": 1}, indent=None)
    assert files.read_json(tmp_path / "a.json") == {"a": 1} == json.loads((tmp_path / "a.json").read_text())
    files.write_json(tmp_path / "a.json", {"a": 1000})
    with pytest.raises(ValueError, match="is not read"):
        files.read_json(tmp_path / "a.json")
