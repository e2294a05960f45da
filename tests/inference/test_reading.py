"""A photograph is read as training read it, wherever the trained model meets it."""

import json
import re
import warnings
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import rescom_timm
from rescom_timm.analysis.doctor_page import as_text
from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from rescom_timm.data.config import LoaderConfig
from rescom_timm.data.decoding import ReadConfig, decode
from rescom_timm.data.doctor import examine, findings
from rescom_timm.data.sources import load
from rescom_timm.engine.evaluate import evaluate_run
from rescom_timm.inference.demo import PRIORS, TrainingImages, answers
from rescom_timm.inference.export import export, export_run
from rescom_timm.inference.predict import embed
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.inference.program import about
from rescom_timm.io import sha256
from rescom_timm.models.net import ProjectorConfig, create_model
from rescom_timm.text.pages import render
from tests.data.test_decoding import png, saved, turned
from tests.raises import raises

TAGS = (1, 3, 6, 8)
POLICY = "resize(10) | center_crop(8)"


def picture(seed: int) -> Image.Image:
    """Longer than wide, and no two sides of it alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 14, 3), dtype=np.uint8))


def model(folder: Path, reading: ReadConfig | None) -> Path:
    torch.manual_seed(0)
    net = create_model("resnet8_cifar", 3, projector=ProjectorConfig(8, 4), mean=(0.5,) * 3, std=(0.1,) * 3)
    return export(net, folder, ["a", "b", "c"], (3, 8, 8), counts=[9, 6, 3], eval_policy=POLICY, reading=reading)


def details(folder: Path, **changes: object) -> None:
    """rescom.json is another; None takes a key away."""
    tree = {**json.loads((folder / "rescom.json").read_text()), **changes}
    (folder / "rescom.json").write_text(
        json.dumps({key: value for key, value in tree.items() if changes.get(key, 0) is not None})
    )
    hashes = json.loads((folder / "hashes.json").read_text())
    (folder / "hashes.json").write_text(json.dumps({**hashes, "rescom.json": sha256(folder / "rescom.json")}))


@pytest.fixture
def files(tmp_path):
    """The same picture upright and as a camera held otherwise stores it."""
    for tag in TAGS:
        (tmp_path / f"{tag}.png").write_bytes(turned(picture(0), tag))
    return [str(tmp_path / f"{tag}.png") for tag in TAGS]


def alike(found):
    return [one.labels == found[0].labels and one.probabilities == found[0].probabilities for one in found]


def test_predictions_are_those_of_the_upright_photograph(tmp_path, files):
    trained = from_pretrained(model(tmp_path / "model", ReadConfig(exif=True)))
    assert trained.reading == ReadConfig(exif=True) and about(trained)["reading"]["exif"] is True
    found = rescom_timm.predict(trained, files, five_crops=True)
    assert alike(found) == [True] * 4 and len({one.five_crops for one in found}) == 1
    assert alike(rescom_timm.predict(trained, [Image.open(file) for file in files])) == [True] * 4
    features = embed(trained, files).features
    assert torch.equal(features, features[:1].expand_as(features))
    cards = answers(trained, files, next(iter(PRIORS)), [], 3).split('<div class="answer">')[1:]
    shown = [Image.open(BytesIO(b64decode(re.search('base64,(.*?)"', one)[1]))).size for one in cards]
    assert shown == [(14, 20)] * 4 and len({re.sub("<h3>.*?</h3>|</div>", "", one) for one in cards}) == 1


def test_exports_that_say_nothing_read_as_before(tmp_path, files):
    stored = rescom_timm.predict(model(tmp_path / "stored", None), files)
    assert not any(alike(stored)[1:])
    details(model(tmp_path / "old", ReadConfig(exif=True, white_level=4095)), reading=None)
    assert rescom_timm.predict(tmp_path / "old", files) == stored
    for reading in ({"exif": "yes"}, {"white_level": 0}, {"gamma": 2.2}, "upright"):
        details(tmp_path / "old", reading=reading)
        with raises("recipe.value", "white_level", kind=ValueError):
            from_pretrained(tmp_path / "old")


def test_images_of_12_bits_are_predicted_as_those_of_8(tmp_path):
    gray = np.asarray(picture(3).convert("L"))
    twelve = Image.fromarray(np.round(gray.astype(float) * 4095 / 255).astype(np.uint16))
    (tmp_path / "8.png").write_bytes(saved(Image.fromarray(gray)))
    for kind in ("png", "tif"):
        twelve.save(tmp_path / f"12.{kind}")
    images = [str(tmp_path / name) for name in ("8.png", "12.png", "12.tif")]
    for white, same in ((4095, True), (None, False)):
        found = rescom_timm.predict(model(tmp_path / f"model{white}", ReadConfig(white_level=white)), images)
        expected = pytest.approx(found[0].probabilities, abs=0.02)
        assert [one.probabilities == expected for one in found[1:]] == [same, same]
    (tmp_path / "colour.png").write_bytes(png(2, 16, b"\0" + bytes(12)))
    [refused] = rescom_timm.predict(tmp_path / "model4095", [str(tmp_path / "colour.png")])
    assert "white_level is for gray" in refused.error


# ------------------------------------------------------------------------------------------------- a run and its data


def photographs(root: Path, tags: tuple[int, ...] = TAGS) -> None:
    """Lists of 24 pictures of two classes, and the pictures, of which the k-th has the k-th tag in turn."""
    root.mkdir()
    lines = []
    for k in range(24):
        (root / f"{k}.png").write_bytes(turned(picture(k), tags[k % len(tags)]))
        lines.append(f"{k}.png {k % 3 // 2}\n")
    (root / "train.txt").write_text("".join(lines[:16]))
    (root / "test.txt").write_text("".join(lines[16:]))


def recipe_of(root: Path, output: Path, **loader: object) -> dict:
    return {
        "name": root.name,
        "output": str(output),
        "data": {"source": str(root), "index": str(root / "train.txt"), "test_index": str(root / "test.txt")},
        "views": {"train": POLICY, "eval": POLICY, "mean": [0.5] * 3, "std": [0.1] * 3},
        "net": {"backbone": "resnet8_cifar", "projector": {"hidden": 8, "dim": 4}},
        "method": {"name": "cross_entropy"},
        "schedule": {"warmup_epochs": 0},
        "train": {"epochs": 1, "batch_size": 8},
        "loader": loader,
        "speed": {"workers": 0},
        "track": {"log_with": []},
    }


def test_a_run_reads_turned_photographs_as_upright_ones(tmp_path, alone):
    runs = {}
    for name, tags in (("upright", (1,)), ("turned", TAGS)):
        photographs(tmp_path / name, tags)
        tree = recipe_of(tmp_path / name, tmp_path / "runs", exif=True)
        runs[name] = train_recipe(load_dict(tree))
    numbers = {}
    for name, run in runs.items():
        crops = evaluate_run(run, crops=True)[2].record()
        numbers[name] = sha256(run / "model/model.safetensors"), evaluate_run(run)[2].record(), crops
    assert numbers["turned"] == numbers["upright"]
    assert json.loads((runs["turned"] / "model/rescom.json").read_text())["reading"]["exif"] is True
    ours, data = from_pretrained(runs["turned"]), load(load_dict(recipe_of(tmp_path / "turned", tmp_path)).data)
    upright = [str(tmp_path / "upright" / f"{k}.png") for k in range(16, 24)]
    for images in (data.test, [file.replace("upright", "turned") for file in upright]):
        shares = [one.probabilities for one in rescom_timm.predict(ours, images)]
        assert shares == [one.probabilities for one in rescom_timm.predict(ours, upright)]
    training = TrainingImages(ours, data.train)
    assert all(training.image(name).size == (14, 20) for name in training.embeddings.images)

    # The run's own recipe may allow larger images; that of a copy of its model may not, nor do models without the key.
    assert from_pretrained(runs["turned"]).reading.max_pixels is None
    recipe = runs["turned"] / "model/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_pixels: null", "max_pixels: 99"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was changed
        assert from_pretrained(runs["turned"]).reading.max_pixels == 99
        assert from_pretrained(runs["turned"] / "model").reading.max_pixels is None
        details(runs["turned"] / "model", reading=None)
        with pytest.warns(UserWarning, match="loader.exif=true"):
            assert from_pretrained(runs["turned"]).reading.exif is False
    again = export_run(runs["turned"], tmp_path / "again")
    assert from_pretrained(again).reading.exif is True


def test_the_doctor_counts_turned_photographs_and_shows_them_as_training_does(tmp_path):
    photographs(tmp_path / "turned")
    data = load(load_dict(recipe_of(tmp_path / "turned", tmp_path)).data)
    splits = {"train": data.train, "test": data.test}
    for exif, advice in ((False, "loader.exif=true turns them upright"), (True, "they are turned upright")):
        images = examine(splits, reading=ReadConfig(exif=exif))
        [found] = [one for one in findings(images, ["a", "b"], data.counts) if one.key == "turned"]
        assert found.count == 18 and advice in found.advice
        assert "Images with an EXIF orientation tag: 18" in as_text(images, [found], ["a", "b"])
        assert {decode(images.stored(i), i, images.reading).size == (14, 20) for [i] in found.groups} == {True, exif}


@pytest.mark.parametrize(("bits", "kind"), [(12, "PNG"), (12, "TIFF"), (10, "PNG"), (14, "PNG")])
def test_the_doctor_names_the_white_level_of_16_bit_images_that_hold_fewer(tmp_path, bits, kind):
    photographs(tmp_path / "photos", (1,))
    for k in range(20):
        levels = np.asarray(picture(k).convert("L")).astype(np.uint16) << (bits - 8)
        (tmp_path / "photos" / f"{k}.png").write_bytes(saved(Image.fromarray(levels), kind))
    (tmp_path / "photos" / "20.png").write_bytes(saved(Image.fromarray(np.full((20, 14), 7, np.uint16)), kind))
    data = load(load_dict(recipe_of(tmp_path / "photos", tmp_path)).data)
    splits = {"train": data.train, "test": data.test}
    found = {one.key: one for one in findings(examine(splits), ["a", "b"], data.counts)}
    most = 2**bits - 1
    assert found["dim"].count == 20 and f"below {most + 1:,} ({bits}-bit data)" in found["dim"].title
    assert f"loader.white_level={most}" in found["dim"].advice
    assert found["flat"].groups == [[20]], "one level is one level"
    assert not {"exact_leak", "exact_twice", "exact_label"} & found.keys()
    read = examine(splits, reading=ReadConfig(white_level=most))
    assert "dim" not in {one.key for one in findings(read, ["a", "b"], data.counts)}


# ------------------------------------------------------------------------------------------------------ other programs


@pytest.mark.parametrize("exif", [True, False])
def test_a_card_says_what_other_readers_see_otherwise(exif):
    reading = ReadConfig(exif, 4095 if exif else None)
    text = render("card.md", section="pixels", reading=reading)
    assert ("PIL.ImageOps.exif_transpose(image)" in text) == exif and (
        "as it is stored, as in training" in text
    ) != exif
    assert ("0..4095" in text) == exif and ("0..65535" in text) != exif
    old = render("card.md", section="pixels", reading=ReadConfig())
    assert "as it is stored" in old and "0..65535" in old


def test_init_writes_exif_and_the_benchmarks_do_not(tmp_path):
    from rescom_timm.config.own_data import propose
    from rescom_timm.data.config import DataConfig

    config = DataConfig("digits")
    assert yaml.safe_load(propose(load(config), config).text("digits"))["loader"] == {"exif": True}
    for recipe in (Path(rescom_timm.__file__).parents[1] / "recipes").glob("*.yaml"):
        assert "exif" not in recipe.read_text() and not LoaderConfig().reading.exif
