"""What the READMEs show is run as it stands, and what they name is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import rescom_timm
from rescom_timm.__main__ import SUBCOMMANDS
from rescom_timm.cli.index import ACTIONS
from rescom_timm.config.loading import find, load, load_dict

ROOT = Path(__file__).parents[1]
GUIDES = (*ROOT.glob("recipes/*.md"), *ROOT.glob("tools/*.md"), *ROOT.glob("rescom_timm/**/README.md"))
PAGES = sorted([*ROOT.glob("*.md"), *GUIDES])
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.S)


PYTHON = [
    pytest.param(code, id=f"{page}-{number}")
    for page in TEXTS
    if page not in ("CONTRIBUTING.md", "CHANGELOG.md")
    for number, code in enumerate(blocks("python", page))
    if '"runs/' not in code and "my_photos" not in code and "local-dir:runs/" not in code and "load_dataset" not in code
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code, alone, tmp_path):
    alone.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "loss" in names:
        assert isinstance(names["loss"], torch.Tensor) and names["loss"].isfinite()
    if "embeddings" in names:
        assert [tuple(names[name].shape) for name in ("features", "logits", "embeddings")] == [
            (8, 512),
            (8, 100),
            (8, 128),
        ]
    if "run" in names:
        assert names["run"].evaluate()["top1"] > 0 and not names["model"].training


def test_both_kinds_of_blocks_were_found():
    assert len(PYTHON) == 3


COMMANDS = [
    pytest.param(line, id=line.partition("#")[0].strip())
    for page in TEXTS
    if page not in ("RESULTS.md",)
    for block in blocks("bash", page)
    for line in block.splitlines()
    if "tools/" in line or "rescom" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_name_subcommands_tools_recipes_and_keys_that_exist(line):
    words = [word.partition("=")[2] if word.startswith("ACCEL") else word for word in shlex.split(line, comments=True)]
    if tools := [word for word in words if word.startswith("tools/")]:
        assert (ROOT / tools[0]).is_file()
        verb, rest = Path(tools[0]).stem, words[words.index(tools[0]) + 1 :]
    elif "rescom_timm" in words:
        verb, *rest = words[words.index("rescom_timm") + 1 :]
    elif words[0] == "rescom-timm":
        verb, *rest = words[1:]
    else:
        return  # pip install 'rescom-timm[...]'
    assert verb in SUBCOMMANDS or tools
    assert verb != "index" or rest[0] in ACTIONS
    if verb == "train":
        recipe, *keys = [word for word in rest if not word.startswith("-")]
        run = re.fullmatch(r"runs/(\w+)/recipe\.yaml", recipe)  # of a run of the recipe of that name
        load(find(run[1] if run else recipe), [key for key in keys if "=" in key or key[0] == "+"])


def test_there_are_many_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_page_is_two_clicks_away():
    linked = set(re.findall(r"\]\(([^)#]+)\)", TEXTS["README.md"]))
    assert set(TEXTS) - {"README.md", "SECURITY.md"} <= linked  # GitHub shows SECURITY.md in a tab of its own


@pytest.mark.parametrize("page", TEXTS)
def test_every_recipe_that_a_page_names_exists(page):
    if page == "CHANGELOG.md":  # names of earlier releases
        return
    for name, presets in re.findall(r"`((?:digits|cifar|imagenet|places|inat)\w+)((?: \+\w+)*)`", TEXTS[page]):
        assert load(name, presets.split()).name


def test_the_table_of_subcommands_is_that_of_the_command():
    first = TEXTS["tools/README.md"].partition("```")[0]  # tables of columns follow
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \|", first, re.M)
    assert dict(rows) == {name: about for name, (_, about) in SUBCOMMANDS.items()}


def test_the_architecture_names_each_package():
    picture = TEXTS["README.md"].partition("## Architecture")[2].split("```")[1]
    packages = {
        path.name
        for path in (ROOT / "rescom_timm").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    named = {word.rstrip("/") for word in re.findall(r"^  (\S+)", picture, re.M)}
    assert named == packages - {"__init__.py", "__main__.py"}


def test_the_examples_of_contributing_are_what_is_checked():
    preset = next(block for block in blocks("yaml", "CONTRIBUTING.md") if block.startswith("# My loss"))
    assert "\n# Source " in preset and set(yaml.safe_load(preset)) == {"method", "when"}
    data = next(block for block in blocks("yaml", "CONTRIBUTING.md") if block.startswith("data:"))
    assert load_dict(yaml.safe_load(data)).net.backbone == "resnet50"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert citation["version"] == version == rescom_timm.__version__
    assert f"\n## {version} - 20" in TEXTS["CHANGELOG.md"] and "__version__" in dir(rescom_timm)
    assert citation["preferred-citation"]["url"].endswith("2203.11506")
