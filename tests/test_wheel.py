"""The package as pip installs it, away from the clone: it builds, its description is sound, and it trains."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from html import unescape
from importlib.metadata import PathDistribution, version
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from rescom_timm.inference.predict import predict
from tests.engine.child import free_port
from tests.engine.made_up_run import make_run
from tests.hub.hub_server import HubServer
from tests.inference.page_server import served

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

    run.folder, run.site, run.environment = away, site, environment
    return run


def test_the_wheel_holds_every_module_recipe_template_and_its_types(dist):
    (wheel,) = dist.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rescom_timm").rglob("*.py")}
    recipes = {f"rescom_timm/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
    templates = {f"rescom_timm/text/{name}" for name in ("card.md", "report.html", "doctor.html", "demo.html")}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rescom_timm/text").iterdir() if path.is_file()}
    assert modules | recipes | templates | there | {"rescom_timm/py.typed"} <= held
    strange = {name for name in held if not name.startswith(("rescom_timm/", "rescom_timm-"))}
    assert not strange, "only the package is installed"


def test_its_description_is_what_an_index_of_packages_takes(dist):
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("told", LAUNCHERS)
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


@pytest.mark.slow
def test_a_pushed_space_runs(installed, tmp_path):
    """Its files alone, with what its requirements.txt names, in an empty folder: the answers are predict's."""
    client = pytest.importorskip("gradio_client", reason="the extra demo is not installed")
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    run, space, port = make_run(tmp_path / "run"), tmp_path / "space", free_port()
    space.mkdir()
    with HubServer({"hf_me": {"me"}}) as hub:
        hub_client = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        installed.environment |= hub_client
        done = installed("rescom-timm", "push", str(run), "--repo", "me/tiny", "--space", "me/tiny-demo")
        assert done.returncode == 0, done.stderr
        for name, content in hub.repos["spaces/me/tiny-demo"].files.items():
            (space / name).write_bytes(content)
        (needed,) = map(Requirement, (space / "requirements.txt").read_text().split())
        assert (needed.name, needed.extras) == ("rescom-timm", {"demo"})
        (wheel,) = installed.site.glob("rescom_timm-*.dist-info")
        for extra in map(Requirement, PathDistribution(wheel).requires):
            if extra.marker is None or extra.marker.evaluate({"extra": "demo"}):
                assert extra.specifier.contains(version(extra.name)), extra
        own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "0"}
        with served([sys.executable, "app.py"], port, space, installed.environment | own) as address:
            images = [tmp_path / "one.png", tmp_path / "two.png"]
            for seed, path in enumerate(images):
                pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(path)
            page = client.Client(address, verbose=False)
            numbers = {"headers": ["class", "how frequent"], "data": [["cat", 1], ["dog", 2], ["emu", 3], ["fox", 4]]}
            files = [client.handle_file(str(path)) for path in images]
            told = page.predict(files, "my own numbers", numbers, 4, api_name="/show")
        cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?) %</td>", told)
        pairs = [
            pair
            for one in predict(run, images, top_k=4, prior=[1, 2, 3, 4])
            for pair in zip(one.labels, one.probabilities, strict=True)
        ]
        assert [unescape(label) for label, _ in cells] == [label for label, _ in pairs]
        assert [float(share) for _, share in cells] == pytest.approx([100 * share for _, share in pairs], abs=0.06)
