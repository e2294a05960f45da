"""Codes of errors: one table, used by every raise, kept by pickling, printed by the command line."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from rescom_timm import errors
from rescom_timm.__main__ import main
from rescom_timm.errors import CODES, CodedError, InputError, MissingFileError, MissingPackageError, code_of

CODE = r"[a-z]+\.[a-z_]+"
PACKAGE = Path(errors.__file__).parent


def coded_classes() -> set[str]:
    """Names of CodedError and of every class below it, by the source."""
    classes = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    found = {"CodedError"}
    while more := {name for name, bases in classes.items() if bases & found} - found:
        found |= more
    return found


def codes_in_source() -> dict[str, list[str]]:
    """code -> the places that raise with it."""
    classes, found = coded_classes(), dict[str, list[str]]()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes and node.args:
                first = node.args[0]
                for part in (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        found.setdefault(part.value, []).append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return found


def test_every_raised_code_is_in_the_table():
    unknown = {
        code: places for code, places in codes_in_source().items() if re.fullmatch(CODE, code) and code not in CODES
    }
    assert not unknown


def test_codes_are_area_and_kind():
    assert all(re.fullmatch(CODE, code) for code in CODES)
    assert len(set(CODES.values())) == len(CODES), "two codes for one thing"


@pytest.mark.parametrize("kind", [InputError, MissingFileError, MissingPackageError])
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("file.missing", "x is gone")))
    assert (type(error), error.code, str(error)) == (kind, "file.missing", "x is gone")


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("recipe.value", "x"), "recipe.value"),
        (FileNotFoundError(2, "x"), "file.missing"),
        (PermissionError(13, "x"), "file.permission"),
        (OSError(28, "x"), "file.failed"),
        (MemoryError(), "system.memory"),
        (ModuleNotFoundError("x"), "system.package"),
        (ValueError("x"), "system.failed"),
    ],
)
def test_code_of(error, code):
    assert code_of(error) == code


def test_builtin_classes_are_kept():
    assert issubclass(InputError, ValueError) and issubclass(MissingFileError, FileNotFoundError)
    assert issubclass(MissingPackageError, ImportError) and issubclass(InputError, CodedError)


def test_command_line_prints_the_code(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path / "nothing")]) == 1
    assert re.match(r"error\[[a-z]+\.[a-z_]+\]: ", capsys.readouterr().err.splitlines()[-1])


def test_usage_errors_have_a_code(capsys):
    assert main(["nothing"]) == 2
    assert "error[usage.arguments]: " in capsys.readouterr().err
