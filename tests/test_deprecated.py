"""Names of 0.2.0 that others use: they work for one release, with a notice."""

import subprocess
import sys
from importlib import import_module

import pytest

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
