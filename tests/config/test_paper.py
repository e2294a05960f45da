"""The paper's tables and figures in recipes/README.md: each command is one that its verb takes, over whole recipes."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmark
from benchmarks import ensembles
from rescom_timm import api
from rescom_timm.__main__ import main
from rescom_timm.analysis import plots, run_files
from rescom_timm.cli import robustness
from rescom_timm.cli.parts.sweep import cells
from rescom_timm.config.loading import find, load
from rescom_timm.models.net import check_backbone

PAGE = (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
SECTION = PAGE.partition("## The paper's tables and figures")[2].partition("## All of them")[0]
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| `((?:rescom-timm|python tools/benchmark.py) [^`]+)` \|$", SECTION, re.M)


def commands(verb):
    """The words after each command's verb."""
    split = [shlex.split(command.replace("python ", ""))[1:] for _, command in ROWS]
    return [pytest.param(words[1:], id=" ".join(words)) for words in split if words[0] == verb]


def run_of(name):
    """The recipe that a run's folder is named after."""
    return find(Path(name).name)


def test_every_row_is_read():
    assert len(ROWS) == SECTION.count("\n| ") - 1, "but for the table's head"
    named = {row for row, _ in ROWS}
    assert named >= {"Tables 1, 2", *(f"Table {n}" for n in range(3, 7)), "Fig. 3", "Fig. 5", "Fig. 6", "main results"}
    assert sum(len(commands(verb)) for verb in ("train", "sweep", "plot", "robustness", "inference")) == len(ROWS)


@pytest.mark.parametrize("words", commands("train"))
def test_what_is_trained_is_a_recipe(words, capsys):
    assert main(["train", *words, "--print"]) == 0
    told = capsys.readouterr().out
    for word in (word for word in words[1:] if word[0] != "+"):
        key, _, value = word.partition("=")
        assert f"{key}: {value}\n" in told and run_of(value)


@pytest.mark.parametrize("words", commands("sweep"))
def test_every_cell_of_a_grid_is_a_recipe_or_says_what_does_not_fit(words, tmp_path):
    assert words[-2:] == ["--seeds", "0"]
    recipes = [word for word in words[:-2] if "=" not in word and word[0] != "+"]
    presets = [[name.removeprefix("+") for name in word.split(",")] for word in words[:-2] if word[0] == "+"]
    grid = {key: values.split(",") for key, _, values in (word.partition("=") for word in words if "=" in word)}
    found = cells(recipes, grid, [0], presets)
    loaded, refused = [], []
    for cell in found:
        try:
            loaded.append(cell.load(tmp_path))
        except ValueError as error:
            refused.append(str(error))
    assert len({recipe.name for recipe in loaded}) == len(loaded) >= len(found) / 2
    assert all("method" in told for told in refused)


@pytest.mark.parametrize("words", commands("plot"))
def test_figures_are_named_as_they_are_called(words, monkeypatch, capsys):
    seen = []

    def open_runs(runs):
        seen.extend(runs)
        raise ValueError("seen")

    monkeypatch.setattr(run_files, "open_runs", open_runs)
    monkeypatch.setattr(api, "Run", lambda path: SimpleNamespace(folder=path))
    assert main(["plot", *words]) == 1 and "]: seen" in capsys.readouterr().err
    assert all(load(run_of(run)).name for run in seen) and len(seen) == 1
    assert set(words[words.index("--only") + 1].split(",")) <= set(plots.NAMES)


@pytest.mark.parametrize("words", commands("robustness"))
def test_robustness_takes_its_words(words, monkeypatch):
    seen = []
    monkeypatch.setattr(robustness, "run", lambda options: seen.append(options) or 0)
    assert main(["robustness", *words]) == 0
    assert run_of(seen[0].run) and seen[0].baseline == "alexnet" and not seen[0].overrides


@pytest.mark.parametrize("words", commands("inference"))
def test_inference_takes_its_words(words, monkeypatch):
    seen = []

    def measure(backbone, experts, **options):
        check_backbone(backbone)
        seen.append((experts, options["batch_size"]))
        raise ValueError("seen")

    monkeypatch.setattr(ensembles, "measure", measure)
    assert benchmark.main(["inference", *words]) == 1 and seen == [([2, 3, 4], 64)]
