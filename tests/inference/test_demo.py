"""The demo: what it answers, and the page in a browser where one is there (nothing is installed)."""

import os
import re
import shutil
import sys
from base64 import b64decode
from dataclasses import replace
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rescom_timm.api import train
from rescom_timm.cli import demo as command
from rescom_timm.config.loading import load_dict
from rescom_timm.data.config import DataConfig
from rescom_timm.data.decoding import decode
from rescom_timm.data.sources import load
from rescom_timm.data.splits import Split
from rescom_timm.engine import logits
from rescom_timm.inference.demo import (
    OWN_NUMBERS,
    PRIORS,
    TrainingImages,
    answers,
    first_numbers,
    introduction,
    prior_of,
    titles,
)
from rescom_timm.inference.export import export, export_run
from rescom_timm.inference.predict import embed, predict
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.engine.child import free_port
from tests.engine.made_up_run import make_run
from tests.inference.page_server import served
from tests.inference.test_decisions import calibrated_scores

ROOT = Path(__file__).parents[2]
NAMES = ["<script>alert(1)</script>", "a & b", "=1+1", *map(str, range(3, 10))]
CROSS_ENTROPY = {"data": {"source": "digits"}, "method": {"name": "cross_entropy"}}
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
    paths = [tmp_path / "one.png", tmp_path / "<b>bold.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths[::2]):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return list(map(str, paths))


def picture(html):
    """The first image within."""
    return Image.open(BytesIO(b64decode(re.search('data:image/png;base64,(.*?)"', html)[1])))


def test_answers_are_those_of_predict_with_the_counts_and_escaped(model, files):
    told = answers(model, files[:2], next(iter(PRIORS)), [], 10)
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


def test_several_images_have_a_card_each(model, files):
    paths = [files[0], files[2], files[0]]
    _, *cards = answers(model, paths, next(iter(PRIORS)), [], 2).split('<div class="answer">')
    for card, path, ours in zip(cards, paths, predict(model, paths, top_k=2), strict=True):
        assert card.startswith(f"<h3>{Path(path).name}")
        labels, shares = zip(*re.findall(r"<tr><td>(.*?)</td><td>(.*?) %", card), strict=True)
        assert list(map(unescape, labels)) == ours.labels
        assert list(map(float, shares)) == pytest.approx([100 * p for p in ours.probabilities], abs=0.06)
        assert picture(card) == Image.open(path)


@pytest.mark.parametrize(
    ("choice", "numbers", "prior"),
    [
        ("as frequent as in training", [], "train"),
        ("all classes equally frequent", [], "uniform"),
        (OWN_NUMBERS, [9, "1", " 1.0", *["1"] * 7], [9.0, *[1.0] * 9]),
        (OWN_NUMBERS, ["0.5", *[0] * 8, "5e-1"], [0.5, *[0.0] * 8, 0.5]),
    ],
)
def test_the_prior_is_that_of_predict(model, files, choice, numbers, prior):
    numbers = list(zip(NAMES, numbers, strict=False))
    assert prior_of(choice, numbers) == prior
    shares = [float(s) for s in re.findall(r"<td>([\d.]+) %", answers(model, files[:1], choice, numbers, 3))]
    ours = predict(model, files[:1], top_k=3, prior=prior)[0].probabilities
    assert shares == pytest.approx([100 * p for p in ours], abs=0.06)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ([1, 2], "prior must be 10 counts"),
        ([0] * 10, "at least 0 and not all 0"),
        ([1, "<x>"], "a &amp; b: &lt;x&gt; is not a number of at least 0; write how frequent each class is"),
        ([1, 2, -1], "=1+1: -1 is not a number of at least 0"),
        (["nan"], "&lt;script&gt;alert(1)&lt;/script&gt;: nan is not a number"),
        (["inf"], "inf is not a number"),
        ([""], "nothing is not a number"),
        ([None], "nothing is not a number"),
    ],
)
def test_own_numbers_that_cannot_be_are_told_on_the_page(model, files, numbers, says):
    numbers = list(zip(NAMES, numbers, strict=False))
    told = answers(model, files, OWN_NUMBERS, numbers, 3)
    assert says in told and "<x>" not in told and "<script>" not in told
    assert answers(model, [], OWN_NUMBERS, numbers, 3) == "<p>Drop images above.</p>"


def test_own_numbers_start_from_the_counts_of_the_training(model):
    assert first_numbers(model) == [[name, count] for name, count in zip(NAMES, COUNTS, strict=True)]
    assert first_numbers(replace(model, counts=None)) == [[name, 1] for name in NAMES]


def test_nearest_training_images_are_those_of_the_largest_cosine(model, digits, files, tmp_path):
    training = TrainingImages(model, digits.train)
    images = [decode(digits.train.dataset[i]["image"], i) for i in range(len(digits.train.labels))]
    vectors = torch.nn.functional.normalize(embed(model, images).features, dim=1)
    images[17].save(tmp_path / "query.png")
    card, broken = answers(model, [str(tmp_path / "query.png"), files[1]], next(iter(PRIORS)), [], 3, training).split(
        "</figure></div></div>"
    )
    assert "nearest" not in broken
    found = [
        (picture(one).tobytes(), unescape(caption))
        for one, caption in re.findall("<figure.*?>(.*?)<figcaption>(.*?)</figcaption>", card)
    ]
    assert found[0] == (images[17].tobytes(), f"{NAMES[digits.train.labels[17]]} (1.00)")
    cosines = sorted((float(vector @ vectors[17]) for vector in vectors), reverse=True)[:5]
    assert [caption.rpartition(" (")[2] for _, caption in found] == [f"{cosine:.2f})" for cosine in cosines]
    names = {(one.tobytes(), NAMES[label]) for one, label in zip(images, digits.train.labels, strict=True)}
    assert all((pixels, caption.rpartition(" (")[0]) in names for pixels, caption in found)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A model whose run had validation images and that keeps an operating point."""
    run = make_run(tmp_path_factory.mktemp("judged") / "run", steps=(2,))
    keeper = logits.Keeper(800, 4)
    keeper.update(*calibrated_scores(torch.tensor([0.6, 0.25, 0.1, 0.05]), 800))
    keeper.write(logits.place(run, "validation-last"))
    return from_pretrained(export_run(run, run.parent / "model", recall={"fox": 0.75}))


def test_cards_show_sets_unsure_and_the_decision_at_the_kept_temperature(judged, files):
    paths = [files[0], files[2]]
    told = answers(judged, paths, next(iter(PRIORS)), [], 4)
    sets = judged.prediction_sets(0.9, "prevalence")
    found = predict(judged, paths, top_k=4, temperature="fitted", sets=sets, rule=judged.operating_point)
    _, *cards = told.split('<div class="answer">')
    for card, one in zip(cards, found, strict=True):
        assert [float(s) for s in re.findall(r"<td>([\d.]+) %", card)] == pytest.approx(
            [100 * p for p in one.probabilities], abs=0.06
        )
        assert f"<b>{one.decision}</b>" in card
        assert ("<b>unsure</b>" in card) == (len(one.inside) > 1) and ", ".join(one.inside) in card
    wide = replace(judged, sets={("prevalence", 0.9): replace(sets, thresholds=torch.ones(4))})
    assert answers(wide, paths, next(iter(PRIORS)), [], 4).count("unsure") == 2


def test_equal_file_names_are_told_apart(model, files, tmp_path):
    (tmp_path / "other").mkdir()
    again = shutil.copy(files[0], tmp_path / "other" / "one.png")
    assert titles([files[0], files[2], again]) == ["one.png (1 of 2)", "two.png", "one.png (2 of 2)"]
    told = answers(model, [files[0], again], next(iter(PRIORS)), [], 2)
    assert "<h3>one.png (1 of 2)</h3>" in told and "<h3>one.png (2 of 2)</h3>" in told


def test_the_page_names_its_model_and_explains(model, judged):
    told = introduction(judged, "me/<b>")
    assert (
        "me/&lt;b&gt;" in told
        and "rescom" in told
        and "equally frequent" in told
        and f"{judged.temperature:.3g}" in told
    )
    assert "800" in told and "&#39;fox&#39;" in told
    assert "as frequent as in training" in introduction(replace(judged, recipe=load_dict(CROSS_ENTROPY)), "x")
    assert "not calibrated" in introduction(model, "x") and "cannot say" in introduction(model, "x")


def test_own_images_are_marked_beside_the_nearest_on_the_map(model, digits):
    test = digits.test
    test = Split(test.name, test.dataset.select(range(40)), test.labels[:40], test.rows[:40])
    shown = command.ImageMap(model, digits, test)
    features = embed(model, test).features[int(shown.tsne.rows[7])]
    shown.features = shown.features[[7, 7, 7]]
    shown.tsne = replace(shown.tsne, points=shown.tsne.points[[7, 7, 7]], labels=shown.tsne.labels[[7, 7, 7]])
    axes = shown.figure({"mine.png": features}).axes[0]
    (note,) = axes.texts
    assert note.get_text() == "mine.png" and note.xy == pytest.approx(tuple(shown.tsne.points[0]))
    assert not shown.figure({}).axes[0].texts


def test_without_the_extra_the_verb_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command.main(["runs/none"]) == 1
    assert "pip install 'rescom-timm[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_in_a_browser(alone, files, tmp_path):
    """Drop images, choose a prior, write one: the page shows predict's answers. DEMO_PICTURE: its picture's file."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, which drives browsers, is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium")
    quick = ["train.epochs=1", "schedule.warmup_epochs=0", "net.backbone=resnet8_cifar", "speed.workers=0"]
    source = str(train("digits_lt", overrides=[*quick, f"output={tmp_path}"]).folder)
    port = free_port()
    words = [sys.executable, "-m", "rescom_timm", "demo", source, "--port", str(port)]
    with (
        served(words, port, tmp_path, os.environ | {"PYTHONPATH": str(ROOT)}) as address,
        driver.sync_playwright() as started,
    ):
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 1500})
        tab.goto(address)
        tab.set_input_files("input[type=file]", files[:1])
        tab.wait_for_selector(".answers td", timeout=60_000)

        def shown(act):
            """The cards' cells after this has changed them."""
            before = tab.locator(".answers").inner_text()
            act()
            changed = "old => document.querySelector('.answers').innerText != old"
            tab.wait_for_function(changed, arg=before, timeout=60_000)
            return tab.locator(".answers td").all_inner_texts()

        def expected(paths, prior):
            found = predict(source, paths, top_k=3, prior=prior)
            pairs = [pair for one in found for pair in zip(one.labels, one.probabilities, strict=True)]
            return [label for label, _ in pairs], [f"{100 * share:.1f} %" for _, share in pairs]

        cells = shown(lambda: tab.get_by_label("as frequent as in training").check())
        assert (cells[0::3], cells[1::3]) == expected(files[:1], "train")
        both = [files[0], files[2]]
        cells = shown(lambda: tab.set_input_files("input[type=file]", both[1:]))  # beside the first
        assert (cells[0::3], cells[1::3]) == expected(both, "train")
        assert tab.locator(".answer figure").count() == 10
        tab.get_by_label(OWN_NUMBERS, exact=True).check()
        second = tab.locator("[data-testid='cell-1-1']:visible")
        second.wait_for(timeout=60_000)
        counts = from_pretrained(source).counts.tolist()

        def write(text):
            second.dblclick()
            tab.keyboard.press("Control+A")
            tab.keyboard.type(text)
            tab.keyboard.press("Enter")

        cells = shown(lambda: write("100000"))
        assert (cells[0::3], cells[1::3]) == expected(both, [counts[0], 100000, *counts[2:]])
        write("many")
        tab.get_by_text("1: many is no number of at least 0").wait_for(timeout=60_000)
        if os.environ.get("DEMO_PICTURE"):
            tab.wait_for_timeout(3000)
            tab.screenshot(path=os.environ["DEMO_PICTURE"], full_page=True)
        browser.close()
