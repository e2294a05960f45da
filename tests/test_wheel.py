"""The package as pip installs it, away from the clone: it builds, its description is sound, and it trains."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("rescom_timm", "recipes", "pyproject.toml", "README.md", "LICENSE")
QUICK = ["train.epochs=1", "schedule.warmup_epochs=0", "speed.workers=0", "evaluation.every=1"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the source distribution and the wheel, both built from a copy."""
    folder = tmp_path_factory.mktemp("build")
    for name in PARTS:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """What runs a command of the installed wheel, in an empty folder: words -> the finished process."""
    site, away = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("away")
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}

    def run(*words):
        words = [str(site / "bin" / "rescom-timm"), *words[1:]] if words[0] == "rescom-timm" else words
        return subprocess.run(words, cwd=away, env=environment, capture_output=True, text=True)

    run.folder, run.site = away, site
    return run


def test_the_wheel_holds_every_module_every_recipe_and_its_types(dist):
    (wheel,) = dist.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rescom_timm").rglob("*.py")}
    recipes = {f"rescom_timm/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert modules | recipes | {"rescom_timm/py.typed"} <= held
    strange = {name for name in held if not name.startswith(("rescom_timm/", "rescom_timm-"))}
    assert not strange, "only the package is installed"


def test_its_description_is_what_an_index_of_packages_takes(dist):
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


def test_the_digits_are_trained_from_the_wheel(installed):
    done = installed("rescom-timm", "train", "digits_lt", *QUICK)
    assert done.returncode == 0, done.stderr
    assert (installed.folder / "runs/digits_lt/model/config.json").is_file()
    environment = (installed.folder / "runs/digits_lt/environment.json").read_text()
    assert '"command": "rescom-timm train digits_lt ' in environment


LAUNCHERS = {
    "accelerate launch --num_processes 1": [
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ],
    "torchrun --nproc_per_node 2": ["torch.distributed.run", "--nproc_per_node", "2"],  # accelerate's own way wants MPI
}


@pytest.mark.parametrize("told", [pytest.param(list(LAUNCHERS)[0], marks=pytest.mark.slow), list(LAUNCHERS)[1]])
def test_launchers_train_it_without_a_clone(installed, told):
    name = told.split()[0]
    words = ["-m", "rescom_timm", "train", "digits_lt", f"name={name}", "train.batch_size=32", *QUICK]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no"] if name == "accelerate" else []
    done = installed(sys.executable, "-m", *LAUNCHERS[told], *options, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    environment = (installed.folder / f"runs/{name}/environment.json").read_text()
    assert (
        f'"processes": {told.split()[-1]}' in environment and f'"command": "{told} -m rescom_timm train' in environment
    )


@pytest.mark.slow
def test_python_trains_it_too(installed):
    code = (
        "import rescom_timm\n"
        f"assert rescom_timm.__file__.startswith({str(installed.site)!r})\n"
        f"run = rescom_timm.train('digits_lt', overrides={QUICK!r}, name='python')\n"
        "print(sorted(run.evaluate())[:2], run.folder)\n"
    )
    done = installed(sys.executable, "-c", code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "['ece', 'few'] runs/python", done.stderr
