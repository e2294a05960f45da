"""Names of 0.2.0 that others use: they work for one release, with a notice."""

import subprocess
import sys
from importlib import import_module

import pytest

from rescom_timm.__main__ import RENAMED, SUBCOMMANDS, main
from rescom_timm.api import Run
from tests.raises import exits

NAMES = {
    "losses": ("balanced_softmax", "class_weights", "supcon", "paco", "focal", "ldam", "robust_centroids"),
    "pairs": ("Pairs", "against_queue", "in_batch"),
    "queue": ("ClassBalancedQueue", "FifoQueue", "Queue", "ReversedQueue", "gather", "processes"),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_of_contrast_are_those_of_the_new_packages(module):
    sys.modules.pop("rescom_timm.contrast", None)
    with pytest.warns(DeprecationWarning, match="contrastive"):
        import_module("rescom_timm.contrast")
    old = import_module(f"rescom_timm.contrast.{module}")
    new = [import_module(f"rescom_timm.{name}") for name in (
        "losses", "contrastive.supcon", "contrastive.pairs", "contrastive.queue", "distributed")]  # fmt: skip
    for name in NAMES[module]:
        assert getattr(old, name) is next(getattr(one, name) for one in new if hasattr(one, name))


def test_the_page_of_spaces_that_020_pushed():
    """Their app.py imports it from here."""
    from rescom_timm.cli.demo import page
    from rescom_timm.commands.demo import page as old

    assert old is page


def test_the_command_of_020():
    done = subprocess.run([sys.executable, "-m", "rescom_timm", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("rescom-timm ")


@pytest.mark.parametrize("old", RENAMED)
def test_subcommands_of_020_are_the_new_ones_with_a_notice(old, capsys):
    assert old not in SUBCOMMANDS and RENAMED[old].split()[0] in SUBCOMMANDS
    with exits(0):
        main([old, "--help"])
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: rescom-timm {RENAMED[old]} ")
    assert printed.err.startswith("warning: ") and f"rescom-timm {RENAMED[old]}" in printed.err


def test_an_old_subcommand_takes_its_arguments_and_gives_its_exit_code(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x/1.jpg 0\n")
    assert main(["overlap", str(tmp_path / "a.txt"), str(tmp_path / "a.txt")]) == 3
    assert "x/1.jpg" in capsys.readouterr().out


def test_the_options_of_push_that_export_has_now(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(Run, "__init__", lambda self, folder: None)
    monkeypatch.setattr(Run, "export", lambda self, *given: calls.append(given) or given[0])
    out = [tmp_path / name for name in ("out", "m.onnx", "m.pt2")]
    options = ["--export", str(out[0]), "--onnx", str(out[1]), "--torch-export", str(out[2])]
    assert main(["push", "run", "hub.license=mit", "--weights", "ema", *options]) == 0
    assert calls == [
        (out[0], "timm", "ema", ["hub.license=mit"], {}, None),
        (out[1], "onnx", "ema", [], {}, None),
        (out[2], "torch", "ema", [], {}, None),
    ]
    assert capsys.readouterr().err.count("warning: ") == 3
