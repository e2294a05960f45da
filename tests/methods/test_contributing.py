"""The example of CONTRIBUTING.md, "Add a method", followed in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import rescom_timm
from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load, load_dict
from rescom_timm.methods import METHODS, MethodConfig

assert rescom_timm.__file__.startswith({folder!r})
recipe = load("digits_lt", ["+my_loss", "net.backbone=resnet8_cifar", "train.batch_size=16"])
assert (recipe.method.name, recipe.method.gamma) == ("my_loss", 1.0), "of the preset, for this benchmark"
assert load("cifar10_lt_if100_r32", ["+my_loss"]).method.gamma == 2.0
assert load_dict(recipe.to_dict()) == recipe and isinstance(recipe.method, MethodConfig)
train_recipe(recipe, dry_run=True)
"""


def test_the_example_is_a_method(tmp_path):
    """One file, one row with its import, one preset: it is chosen by +NAME, checked, and trains."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Add a method") : text.index("## Add a data set")]
    (file, table), (preset,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rescom_timm", tmp_path / "rescom_timm", ignore=ignored)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "rescom_timm/methods/my_loss.py").write_text(file)
    (tmp_path / "recipes/methods/my_loss.yaml").write_text(preset)
    methods = tmp_path / "rescom_timm/methods/__init__.py"
    imported, row = table.splitlines()[0], table.splitlines()[-2]
    start = "from rescom_timm.methods.prototypes import"
    before = methods.read_text()
    methods.write_text(before.replace(start, f"{imported}\n{start}").replace('    "rsg": (', f'{row}\n    "rsg": ('))
    assert len(methods.read_text().splitlines()) == len(before.splitlines()) + 2
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM.format(folder=str(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "dry run" in done.stdout, done.stdout + done.stderr
