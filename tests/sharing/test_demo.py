"""The demo: what it answers, and the page in a browser where one is there (nothing is installed)."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from rescom_timm.commands import demo as command
from rescom_timm.data.decoding import decode
from rescom_timm.data.sources import load
from rescom_timm.data.splits import DataConfig
from rescom_timm.nets.net import ProjectorConfig, create_model
from rescom_timm.run import train
from rescom_timm.sharing.demo import OWN_NUMBERS, PRIORS, TrainingImages, answers, features, prior_of
from rescom_timm.sharing.export import export
from rescom_timm.sharing.predict import predict
from rescom_timm.sharing.pretrained import from_pretrained
from tests.training.child import free_port

ROOT = Path(__file__).parents[2]
NAMES = ["<script>alert(1)</script>", "a & b", "=1+1", *map(str, range(3, 10))]
COUNTS = [128, 80, 50, 32, 20, 13, 8, 5, 3, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = create_model("resnet8_cifar", 10, projector=ProjectorConfig(8, 4), mean=(0.5,) * 3, std=(0.3,) * 3)
    return from_pretrained(export(net, tmp_path_factory.mktemp("demo") / "model", NAMES, (3, 8, 8), counts=COUNTS))


@pytest.fixture(scope="module")
def digits():
    return load(DataConfig("digits", index="exponential(20)"))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "<b>bold.png").write_bytes(b"no image")
    paths = [tmp_path / "one.png", tmp_path / "<b>bold.png"]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(paths[0])
    return list(map(str, paths))


def test_answers_are_those_of_predict_with_the_counts_and_escaped(model, files):
    told = answers(model, files, next(iter(PRIORS)), "", 10)
    ours = predict(model, [files[0]], top_k=10)[0]
    cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?) %</td><td>(.*?)</td></tr>", told)
    counts = dict(zip(NAMES, COUNTS, strict=True))
    assert [(float(share), int(count)) for _, share, count in cells] == [
        (pytest.approx(100 * p, abs=0.06), counts[label])
        for label, p in zip(ours.labels, ours.probabilities, strict=True)
    ]
    assert "<script>" not in told and "&lt;script&gt;alert(1)&lt;/script&gt;" in told and "a &amp; b" in told
    assert "<b>bold" not in told and "&lt;b&gt;bold.png</h3><p><b>cannot be read: " in told
    assert told.count("data:image/png;base64,") == 1


@pytest.mark.parametrize(
    ("choice", "numbers", "prior"),
    [
        ("as frequent as in training", "", "train"),
        ("all classes equally frequent", "", "uniform"),
        (OWN_NUMBERS, "9, 1 1;1\n1 1 1 1 1 1", [9.0, *[1.0] * 9]),
    ],
)
def test_the_prior_is_that_of_predict(model, files, choice, numbers, prior):
    assert prior_of(choice, numbers) == prior
    shares = [float(s) for s in re.findall(r"<td>([\d.]+) %", answers(model, files[:1], choice, numbers, 3))]
    ours = predict(model, files[:1], top_k=3, prior=prior)[0].probabilities
    assert shares == pytest.approx([100 * p for p in ours], abs=0.06)


@pytest.mark.parametrize(
    ("numbers", "says"), [("1, 2", "prior must be 10 counts"), ("1 <x>", "own numbers are one number a class")]
)
def test_own_numbers_that_cannot_be_are_told_on_the_page(model, files, numbers, says):
    assert says in answers(model, files, OWN_NUMBERS, numbers, 3)
    assert answers(model, [], OWN_NUMBERS, numbers, 3) == "<p>Drop images above.</p>"


def test_nearest_training_images_are_those_of_the_largest_cosine(model, digits, files, tmp_path):
    training = TrainingImages(model, digits.train)
    vectors, positions = features(model, digits.train, batch_size=50)
    assert_close(vectors, training.vectors)
    assert positions == list(range(len(digits.train.labels)))
    assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    own = digits.train.dataset[17]["image"]
    image = decode(own, 17)
    image.save(tmp_path / "query.png")
    found = training.nearest(str(tmp_path / "query.png"), 4)
    assert np.array_equal(found[0][0], image) and found[0][1] == f"{NAMES[digits.train.labels[17]]} (1.00)"
    cosines = sorted((float(vector @ vectors[17]) for vector in vectors), reverse=True)[:4]
    assert [caption.rpartition(" (")[2] for _, caption in found] == [f"{cosine:.2f})" for cosine in cosines]
    images = [decode(digits.train.dataset[i]["image"], i).tobytes() for i in range(len(vectors))]
    names = {(pixels, NAMES[label]) for pixels, label in zip(images, digits.train.labels, strict=True)}
    assert all((one.tobytes(), caption.rpartition(" (")[0]) in names for one, caption in found)
    assert training.nearest(files[1]) == []


def test_without_the_extra_the_verb_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command.main(["runs/none"]) == 1
    assert "pip install 'rescom-timm[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_in_a_browser(alone, files, tmp_path):
    """Drop an image, choose a prior: the page shows predict's answers. DEMO_PICTURE: where a picture of it is kept."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, which drives browsers, is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium")
    quick = ["train.epochs=1", "schedule.warmup_epochs=0", "net.backbone=resnet8_cifar", "speed.workers=0"]
    source = str(train("digits_lt", overrides=[*quick, f"output={tmp_path}"]).folder)
    port = free_port()
    words = [sys.executable, "-m", "rescom_timm", "demo", source, "--port", str(port)]
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (tmp_path / "log.txt").read_text()
                time.sleep(0.3)
        with driver.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1100, "height": 1500})
            tab.goto(address)
            tab.set_input_files("input[type=file]", files[:1])
            tab.wait_for_selector(".answers td", timeout=60_000)
            before = tab.locator(".answers").inner_text()
            tab.get_by_label("as frequent as in training").check()
            changed = "old => document.querySelector('.answers').innerText != old"
            tab.wait_for_function(changed, arg=before, timeout=60_000)
            cells = tab.locator(".answers td").all_inner_texts()
            ours = predict(source, files[:1], top_k=3, prior="train")[0]
            assert cells[0::3] == ours.labels
            assert cells[1::3] == [f"{100 * share:.1f} %" for share in ours.probabilities]
            if os.environ.get("DEMO_PICTURE"):
                tab.wait_for_timeout(3000)
                tab.screenshot(path=os.environ["DEMO_PICTURE"], full_page=True)
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
