"""Every import points down the packages listed in rescom_timm/__init__.py; README and CI agree."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rescom_timm"
ORDER = (
    "errors", "io", "hub_client", "text", "class_names", "metrics", "paired", "distributed", "losses", "contrastive",
    "data", "models", "methods", "config", "engine", "hub_download", "inference", "hub", "analysis", "fitting", "api",
    "cli", "__main__",
)  # fmt: skip
"""Packages and modules of rescom_timm, the lowest first; rescom_timm/__init__.py lists them from the top."""
BOTTOM = {"errors", "io", "hub_client", "text", "class_names"}
NARROWER: dict[str, set[str]] = {
    **{name: {"errors"} for name in (*BOTTOM, "metrics", "distributed")},
    "paired": {"metrics"},
    "losses": {"errors", "distributed"},
    "contrastive": {"errors", "losses", "distributed"},
    "data": BOTTOM | {"metrics"},
    "models": {"errors", "io", "hub_client", "class_names"},
    "methods": {"errors", "class_names", "distributed", "losses", "contrastive", "models"},
    "config": BOTTOM | {"metrics", "data", "models", "methods"},
}
LAYERS = {name: NARROWER.get(name, set(ORDER[:place])) for place, name in enumerate(ORDER)}
LAYERS |= {"commands": {"cli"}, "contrast": {"contrastive", "losses", "distributed"}}  # names of 0.2.0
"""What a package may import besides itself."""

# peft and transformers only where LoRA or text features are asked for
THIRD_PARTY = {
    "contrastive": {"torch"},
    "losses": {"torch"},
    "models": {"torch", "timm", "safetensors", "peft", "transformers"},
}
"""Packages that people use alone, and all that those may need."""


def package(module: str) -> str:
    """rescom_timm.contrastive.pairs -> contrastive; rescom_timm -> ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of the module"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "rescom_timm" else {module}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        top = module.split(".")[0]
        if top == "rescom_timm":
            assert package(module) in LAYERS[own] | {own}, f"{own} must not import {module}"
        elif own in THIRD_PARTY and top not in sys.stdlib_module_names:
            assert top in THIRD_PARTY[own], f"{own} may import {THIRD_PARTY[own]} only, not {module}"


def test_no_file_imports_itself_over_others():
    """Within a package too."""
    modules = {f"rescom_timm.{path.relative_to(PACKAGE).with_suffix('')}".replace("/", "."): path for path in FILES}
    below = {name: whole_names(path) & modules.keys() for name, path in modules.items()}
    order = TopologicalSorter(below)
    order.prepare()  # raises CycleError, which names the files


def whole_names(path: Path) -> set[str]:
    """Of what a file imports: modules, and names in them, one of which may be a module."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {name for node in nodes for name in (node.module or "", *(f"{node.module}.{a.name}" for a in node.names))}


LONGEST = 450
"""Lines of a file that holds one idea."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST, "does it hold two ideas?"


ANY_LEFT = {"io.parse_yaml", "io.read_json", "io.read_yaml"}
"""Public signatures that say Any, as those of json and yaml: the values of a file before they are checked."""


def test_no_public_signature_says_any():
    """`object`, a protocol, a TypedDict or a dataclass says what a caller may pass and gets."""
    found = set()
    for path in FILES:
        module = str(path.relative_to(PACKAGE).with_suffix(""))
        found |= {f"{module}.{name}" for name in of_any(ast.parse(path.read_text()))}
    assert found == ANY_LEFT


def of_any(tree: ast.AST, owner: str = "") -> set[str]:
    """Public functions and methods of public classes with typing.Any in their signatures."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found |= of_any(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            parts = [node.args, *([node.returns] if node.returns else [])]
            if any(isinstance(one, ast.Name) and one.id == "Any" for part in parts for one in ast.walk(part)):
                found.add(owner + node.name)
    return found


def test_every_package_is_listed():
    packages = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert packages == set(LAYERS)
    plan = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""
    assert all(name in plan for name in LAYERS), "the docstring of rescom_timm lists the packages"


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    command = next(line for line in (ROOT / ".ci/run").read_text().splitlines() if "pytest" in line).strip()
    assert f"\n{command}\n" in readme


def test_ci_leaves_the_clone_as_it_is(tmp_path):
    """.ci/run copies the tracked files, changed ones as they are now, and runs the tests there, with the data beside
    the clone: no .venv of the clone is removed, and what git does not track is not seen."""
    clone, bin_ = tmp_path / "clone", tmp_path / "bin"
    for name, content in {
        ".ci/run": (ROOT / ".ci/run").read_text(),
        "a b/x.py": "old",
        "gone.py": "",
        ".venv/mine": "",
    }.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(content)
    bin_.mkdir()
    (bin_ / "python3").write_text(
        f"#!/bin/bash\nfind . -type f > {tmp_path}/seen\necho $RESCOM_TEST_DATA > {tmp_path}/data\n"
        f"cat 'a b/x.py' > {tmp_path}/x\nexit 7\n"
    )
    for script in (bin_ / "python3", clone / ".ci/run"):
        script.chmod(0o755)
    (clone / ".gitignore").write_text(".venv/\n")
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=clone, check=True)
    (clone / "a b/x.py").write_text("new")
    (clone / "untracked.py").touch()
    (clone / "gone.py").unlink()
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    environment.pop("RESCOM_TEST_DATA", None)
    result = subprocess.run([str(clone / ".ci/run")], env=environment, capture_output=True, text=True)
    assert result.returncode == 7, result.stderr
    assert set((tmp_path / "seen").read_text().split("\n")) == {"./.ci/run", "./a b/x.py", "./.gitignore", ""}
    assert (tmp_path / "x").read_text() == "new" and (tmp_path / "data").read_text() == f"{tmp_path}/shared\n"
    assert (clone / ".venv/mine").is_file() and not list(tmp_path.glob("tmp*")), "the copy is removed"


def distribution(name):
    """Its name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


OWN = {"rescom_timm", "trackio"}
"""What is imported and not declared: ourselves, and a tracker that a recipe names."""


def test_what_is_imported_is_declared():
    """As a dependency or an extra of pyproject.toml, not only by way of another package. Trackers are the user's."""
    text = (ROOT / "pyproject.toml").read_text()
    declared = {distribution(name) for name in re.findall(r'"([\w.-]+)', text)}
    known = packages_distributions()
    for path in FILES:
        for top in {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names) - OWN:
            names = set(map(distribution, known.get(top, [top])))
            assert names & declared, f"{path}: {top} is not declared in pyproject.toml"
