"""Codes of errors: one table, used by every raise, kept by pickling, printed by the command line."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from rescom_timm import errors
from rescom_timm.__main__ import main
from rescom_timm.data.decoding import BrokenImage
from rescom_timm.errors import CODES, CodedError, InputError, MissingFileError, MissingPackageError, code_of

CODE = r"[a-z]+\.[a-z_]+"
PACKAGE = Path(errors.__file__).parent


SOURCE = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def name_of(node: ast.expr) -> str:
    """c of c and of a.b.c."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def coded_classes() -> set[str]:
    """Names of CodedError and of every class below it, by the source."""
    classes = {
        node.name: {name_of(base) for base in node.bases}
        for tree in SOURCE.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"CodedError"}
    while more := {name for name, bases in classes.items() if bases & found} - found:
        found |= more
    return found


def choices(node: ast.expr) -> list[ast.expr]:
    """The values that an expression may have: those of both sides of `a if b else c` and of `a or b`."""
    match node:
        case ast.IfExp():
            return [*choices(node.body), *choices(node.orelse)]
        case ast.BoolOp():
            return [choice for value in node.values for choice in choices(value)]
    return [node]


def passes_a_code_on(node: ast.expr) -> bool:
    """error.code, code, code_of(error)"""
    if isinstance(node, ast.Call):
        return name_of(node.func).lstrip("_") in ("code", "code_of")
    return name_of(node) == "code"


def test_every_coded_error_is_made_with_a_code_of_the_table():
    kinds = coded_classes() - {BrokenImage.__name__}  # gives its code itself
    wrong = [
        f"{path}:{node.lineno}: {ast.unparse(node)[:80]}"
        for path, tree in SOURCE.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and name_of(node.func) in kinds
        for code in (choices(node.args[0]) if node.args else [node])
        if not (passes_a_code_on(code) or (isinstance(code, ast.Constant) and code.value in CODES))
    ]
    assert not wrong


def test_every_code_of_the_table_is_used():
    table = ast.unparse(next(node for node in SOURCE[Path("errors.py")].body if "CODES = {" in ast.unparse(node)))
    used = {
        node.value
        for path, tree in SOURCE.items()
        for statement in tree.body
        if not (path == Path("errors.py") and ast.unparse(statement) == table)
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert CODES.keys() <= used


def test_codes_are_area_and_kind():
    assert all(re.fullmatch(CODE, code) for code in CODES)
    assert len(set(CODES.values())) == len(CODES), "two codes for one thing"


@pytest.mark.parametrize("kind", [InputError, MissingFileError, MissingPackageError])
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("file.missing", "x is gone")))
    assert (type(error), error.code, str(error)) == (kind, "file.missing", "x is gone")


@pytest.mark.parametrize(
    ("error", "code"),
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
