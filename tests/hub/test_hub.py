"""Pushing and fetching. The cases are in hub_cases.py: they need the environment of the Hub's client to be set before
it is imported, so all of them run once in a process of their own, and each is told here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rescom_timm.config.loading import load_dict
from rescom_timm.config.recipe import HubConfig, RecipeError
from rescom_timm.engine import checkpoint
from rescom_timm.hub_client import hub_id
from tests.hub.hub_server import HubServer

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "hub" / "hub_cases.py"


def names(slow: bool) -> list[str]:
    """The cases that are marked slow, or those that are not."""
    return [
        node.name
        for node in ast.parse(CASES.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if slow == any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
    ]


def outcomes(folder: Path, marked: str) -> dict[str, list[str]]:
    """Name of a case -> the texts of its failures."""
    report = folder / "report.xml"
    words = [sys.executable, "-m", "pytest", str(CASES), "-m", marked, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*words, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
        found.setdefault(case.get("name", "").split("[")[0], []).extend(
            f"{case.get('name')}\n{part.text}" for part in bad
        )
    assert found, done.stdout + done.stderr
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("hub"), "not slow")


@pytest.mark.parametrize("name", names(slow=False))
@pytest.mark.slow
def test_against_a_server(quick, name):
    assert name in quick, f"{name} did not run"
    assert not quick[name], "\n\n".join(quick[name])


@pytest.mark.slow
def test_against_a_server_slowly(tmp_path):
    found = outcomes(tmp_path, "slow")
    assert sorted(found) == sorted(names(slow=True))
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"repo": "rescom"}, "owner/name"),
        ({"repo": "me/-bad-"}, "no name of the Hub"),
        ({"repo": "me/a/b"}, "owner/name"),
        ({"benchmark": "imagenet"}, "owner/dataset#task"),
        ({"timeout_minutes": 0}, "above 0"),
    ],
)
def test_configs_that_cannot_be(config, says):
    with pytest.raises(ValueError, match=says):
        HubConfig(**config)


def test_the_section_of_a_recipe():
    data = {"source": "digits"}
    assert load_dict({"data": data, "hub": {"repo": "me/x", "strategy": "every_save"}}).hub.strategy == "every_save"
    with pytest.raises(RecipeError, match=r"best needs data\.validation"):
        load_dict({"data": data, "hub": {"repo": "me/x", "strategy": "best"}})
    with pytest.raises(RecipeError, match=r"unknown key hub\.token"):
        load_dict({"data": data, "hub": {"token": "hf_x"}})
    with pytest.raises(RecipeError, match=r"hub\.strategy"):
        load_dict({"data": data, "hub": {"strategy": "sometimes"}})


@pytest.mark.parametrize(
    ("source", "repo"),
    [
        ("me/rescom", "me/rescom"),
        ("hf://me/rescom@v1", "me/rescom@v1"),
        ("hf-hub:me/rescom", "me/rescom"),
        ("rescom", None),
        ("runs/a/b", None),
        ("./me/x", None),
        ("../x", None),
        ("/me/x", None),
        (Path("me/rescom"), None),
    ],
)
def test_what_is_a_repository(source, repo):
    assert hub_id(source) == repo


@pytest.mark.slow
def test_a_training_is_pushed_and_goes_on_on_another_machine(tmp_path):
    """tools/train.py pushes each checkpoint; from the one after epoch 2 another folder comes to the same end."""
    token = "hf_TheSecretOfMe"

    def train(*words, home):
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
        env |= {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        tool = [sys.executable, "tools/train.py", *words]
        done = subprocess.run(tool, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert token not in done.stdout + done.stderr
        return done.stdout

    with HubServer({token: {"me"}}) as server:
        words = ["recipes/digits_lt.yaml", f"output={tmp_path / 'here'}", "train.epochs=4", "schedule.warmup_epochs=1"]
        words += ["checkpoint.every=2", "checkpoint.keep=9", "hub.repo=me/digits", "hub.strategy=all_checkpoints"]
        told = train(*words, home=tmp_path / "home")
        repo = server.repos["me/digits"]
        assert f"{server.url}/me/digits/commit/{repo.commits[-1][0]}" in told
        saved = [path.name for path in checkpoint.listed(tmp_path / "here" / "digits_lt" / "checkpoints")]
        assert {name.split("/")[1] for name in repo.files if name.startswith("checkpoints/")} == set(saved)
        halfway = next(sha for sha, files in repo.commits[1:] if f"checkpoints/{saved[-1]}/state.json" not in files)
        assert json.loads(repo.at(halfway)[1]["rescom.json"])["checkpoint"] == saved[0]
        address = f"hf://me/digits@{halfway}"
        train("--resume", address, f"output={tmp_path / 'there'}", "hub.repo=null", home=tmp_path / "other")
    here, there = (tmp_path / name / "digits_lt" / "checkpoints" / saved[-1] for name in ("here", "there"))
    assert (here / "net.safetensors").read_bytes() == (there / "net.safetensors").read_bytes()
    for path in (tmp_path / "here").rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path
