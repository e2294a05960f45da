"""The console command: its subcommands, their old names, and wrong ones."""

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rescom_timm.__main__ import SUBCOMMANDS, main
from rescom_timm.analysis import plots
from rescom_timm.cli import index, plot
from rescom_timm.config.loading import presets, shipped
from tests.raises import exits

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_names_the_subcommand_as_it_is_called(name, capsys):
    with exits(0):
        main([name, "--help"])
    told = capsys.readouterr().out
    assert told.startswith(f"usage: rescom-timm {name} ")
    about = import_module(f"rescom_timm.cli.{SUBCOMMANDS[name][0]}").__doc__
    assert f"rescom-timm {name}" in about, "its docstring shows how it is called"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_ends_with_an_example(name, capsys):
    with exits(0):
        main([name, "--help"])
    lines = capsys.readouterr().out.rstrip().splitlines()
    start = next(i for i, line in enumerate(lines) if line in ("example:", "examples:"))
    assert lines[start + 1 :] and all(line.startswith(f"  rescom-timm {name} ") for line in lines[start + 1 :])


def test_help_imports_neither_torch_nor_timm():
    code = f"""
import sys
from rescom_timm.__main__ import main
for words in ([], *([name] for name in {list(SUBCOMMANDS)})):
    try:
        main([*words, "--help"])
    except SystemExit:
        pass
assert not {{"torch", "timm", "datasets", "numpy"}} & sys.modules.keys(), "help waits for them"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SUBCOMMANDS) + 1


def test_mistakes_are_reported_before_the_slow_imports(tmp_path):
    """A wrong key, preset, recipe or data folder, and the list of recipes, in one process; only torch is imported."""
    mistakes = {
        "inat18_r50 optimizer.lrr=.1": "recipe.unknown_key",
        "cifar10_lt_if100_r32 net.backbone=x train.epoch=3": "recipe.unknown_key",
        "digits_lt +ldm": "recipe.unknown_preset",
        "digits": "recipe.missing",
        "inat18_r50": "data.missing",
        "inat18_r50 data.source=. data.index=none.txt": "file.missing",
    }
    code = f"""
import sys
from rescom_timm.__main__ import main
for words in {list(mistakes)}:
    assert main(["train", *words.split()]) == 1
for words in ("", "--show inat18_r50 +ldam seed=3"):
    assert main(["recipes", *words.split()]) == 0
slow = {{"timm", "torchvision", "datasets", "pandas", "matplotlib", "rescom_timm.engine.trainer"}} & sys.modules.keys()
assert not slow, slow
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"error\[(.*?)\]", done.stderr) == list(mistakes.values())


def test_help_lists_every_plot_and_every_action_of_index(capsys):
    assert plot.NAMES == plots.NAMES
    assert index.ACTIONS.keys() == index.EXAMPLES.keys()
    for action in index.ACTIONS:
        with exits(0):
            main(["index", action, "--help"])
        text = capsys.readouterr().out
        assert text.startswith(f"usage: rescom-timm index {action} ") and f"  rescom-timm index {action} " in text


def test_the_cifar_resnets_are_in_timm_where_that_is_imported_first():
    """Where rescom_timm is: test_the_package_is_quick_to_import."""
    code = "import timm, rescom_timm; assert timm.is_model('resnet32_cifar')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_subcommand():
    files = {path.stem for path in (ROOT / "rescom_timm/cli").glob("*.py")} - {"__init__"}
    assert files == {file for file, _ in SUBCOMMANDS.values()}
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == {"train", "benchmark", "lite0"}


@pytest.mark.parametrize("words", [["benchmark", "head"], ["inference", "resnet50"]])
def test_what_left_the_package_says_where_it_went(words, capsys):
    assert main(words) == 2
    assert f"python tools/benchmark.py {words[0].replace('benchmark', 'PART')}" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["help"], 0)])
def test_help_lists_every_subcommand(words, code, capsys):
    assert main(words) == code
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in SUBCOMMANDS)


def test_a_wrong_subcommand_is_answered_with_the_nearest(capsys):
    assert main(["trian", "digits_lt"]) == 2
    assert "no subcommand 'trian'; did you mean  rescom-timm train?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["evaluate"], ["doctor"], ["push"]])
def test_only_what_is_required_is_asked_for(words, capsys):
    with exits(2):
        main(words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error[") and "key=value" not in error


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "run", "p", "-o", "{bad}"],
        ["predict", "run", "p", "--embeddings", "{bad}"],
        ["doctor", "digits_lt", "-o", "{bad}"],
        ["plot", "run", "-o", "{bad}"],
        ["export", "run", "-o", "{bad}"],
        ["export", "run", "--format", "onnx", "-o", "{bad}"],
        ["export", "run", "--format", "torch", "-o", "{bad}"],
        ["index", "make", "digits", "exponential(10)", "-o", "{bad}"],
        ["init", "p", "-o", "{bad}"],
        ["class-features", "names.txt", "--model", "m", "-o", "{bad}"],
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys, words):
    """The run, images and model named do not exist, which the work itself would find first."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert main([word.format(bad="file/below") for word in words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error[") and "file/below" in error and Path("file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_first_imports_ends_at_once_without_a_traceback(number):
    code = (
        "import os, sys, types\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'rescom_timm.engine.errors':\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from rescom_timm.cli import answer\n"
        "answer(lambda: print('worked'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + number and "worked" not in done.stdout
    assert (
        len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [("onnx", "export RUN --format onnx"), ("val", "evaluate RUN"), ("run", "train RECIPE"), ("Serve", "demo RUN")],
)
def test_subcommands_of_other_libraries_are_answered_with_ours(name, meant, capsys):
    assert main([name, "runs/x"]) == 2
    assert f"did you mean  rescom-timm {meant}" in capsys.readouterr().err
    assert meant.split()[0] in SUBCOMMANDS and name.lower() not in SUBCOMMANDS


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert capsys.readouterr().out.split() == ["rescom-timm", version.split('"')[1]]


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [path.stem for path in shipped()] + [f"+{name}" for name in presets()]
    assert [line.split()[0] for line in lines] == names and len(lines) > 50
    assert all(len(line.split()) > 1 for line in lines), "each says what it is"
    assert main(["recipes", "digits_lt"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes/digits_lt.yaml").read_text()
    assert main(["recipes", "digits_lr"]) == 1
    assert "did you mean digits_l" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback():
    done = subprocess.run(
        f"{sys.executable} -m rescom_timm recipes | head -1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_tool_answers_as_its_subcommand(tmp_path, capsys):
    words = [str(tmp_path / "none.yaml"), "--print"]
    tool = [sys.executable, str(ROOT / "tools/train.py"), *words]
    told = subprocess.run(tool, capture_output=True, text=True, cwd=ROOT)
    assert main(["train", *words]) == told.returncode == 1
    error = capsys.readouterr().err
    assert error == told.stderr.splitlines(keepends=True)[-1]
    assert error.startswith("error[") and words[0] in error


def test_the_launchers_report_has_the_line_of_each_process(monkeypatch, tmp_path, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESCOM_DATA", raising=False)
    for rank, lines in (("0", 1), ("1", 0)):
        report = tmp_path / f"{rank}.json"
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
        assert main(["doctor", "inat18_r50"]) == 1
        failure = ProcessFailure(int(rank), 1, 1, str(report))
        assert failure.message["message"].startswith("error[data.missing]: ./data/inat2018")
        assert capsys.readouterr().err.count("error[") == lines
