"""rescom-timm pack: the same images in fewer and smaller files."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rescom_timm.__main__ import main
from rescom_timm.config.loading import load as load_recipe
from rescom_timm.data import pack as packing
from rescom_timm.data.config import DataConfig
from rescom_timm.data.decoding import ReadConfig, decode
from rescom_timm.data.pack import PackConfig, pack
from rescom_timm.data.sources import load
from tests.raises import raises


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Classes of 9 and 6 photographs of 40 x 24 pixels, and a small PNG in each."""
    dice, root = np.random.default_rng(0), tmp_path / "photos"
    for name, number in (("cat", 9), ("dog", 6)):
        (root / name).mkdir(parents=True)
        for k in range(number):
            Image.fromarray(dice.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(root / name / f"{k}.jpg")
        Image.fromarray(dice.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / "small.png")
    return root


@pytest.fixture
def recipe(photos: Path) -> Path:
    path = photos.parent / "own.yaml"
    assert main(["init", str(photos), "-o", str(path)]) == 0
    return path


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.suffix in (".arrow", ".parquet", ".json")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_recipe_over_the_copy_reads_the_same_rows(recipe, tmp_path, form):
    folder = tmp_path / "packed"
    assert main(["pack", str(recipe), "-o", str(folder), "--size", "12", "--format", form]) == 0
    before, after = load(load_recipe(recipe).data), load(load_recipe(folder / "recipe.yaml").data)
    assert after.class_names == before.class_names == ["cat", "dog"]
    for name in ("train", "validation", "test"):
        first, second = getattr(before, name), getattr(after, name)
        assert second.labels.tolist() == first.labels.tolist()
        for one, two in zip(first.dataset["image"], second.dataset["image"], strict=True):
            if one["path"].endswith("small.png"):
                assert two["bytes"] == Path(one["path"]).read_bytes(), "a small image is stored as it is"
            else:
                assert Image.open(io.BytesIO(two["bytes"])).size == (20, 12)
    assert load_recipe(folder / "recipe.yaml").net == load_recipe(recipe).net
    assert main(["init", str(folder), "-o", str(tmp_path / "again.yaml")]) == 0
    assert load_recipe(tmp_path / "again.yaml").data.validation == "split(validation)"


def test_pixels_are_those_of_one_resizing(recipe, tmp_path):
    data = load(load_recipe(recipe).data)
    pack(data, tmp_path / "packed", PackConfig(size=12, quality=90), say=str)
    stored = load(DataConfig(str(tmp_path / "packed"))).train.dataset[0]["image"]
    plain = decode(data.train.dataset[0]["image"]).resize((20, 12), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    plain.save(file, "JPEG", quality=90)
    assert stored["bytes"] == file.getvalue()


def test_orientation_is_applied_once(tmp_path):
    root = tmp_path / "p"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        image = Image.new("RGB", (40, 20))
        exif = image.getexif()
        exif[0x0112] = 6
        for k in range(5):
            image.save(root / name / f"{k}.jpg", exif=exif)
    assert main(["pack", str(root), "-o", str(tmp_path / "packed"), "--size", "10"]) == 0
    stored = load(DataConfig(str(tmp_path / "packed"))).train.dataset[0]["image"]
    assert decode(stored, reading=ReadConfig(exif=True)).size == decode(stored).size == (10, 20)


def test_the_same_again_gives_the_same_bytes_and_keeps_what_is_whole(recipe, tmp_path, monkeypatch):
    data, config = load(load_recipe(recipe).data), PackConfig(size=12, per_shard=4)
    pack(data, tmp_path / "one", config, workers=2, say=str)
    calls = []
    write = packing._write

    def failing(dataset, path, arrow):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(dataset, path, arrow)

    monkeypatch.setattr(packing, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(data, tmp_path / "two", config, say=str)
    pack(data, tmp_path / "two", config, say=str)
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    files = [name for name in one if name.endswith(".arrow")]
    assert one == two and len(files) > 3 and len(calls) == len(files) + 1, "two files were kept, the third made again"
    damaged = tmp_path / "two" / files[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    pack(data, tmp_path / "two", config, say=str)
    assert digests(tmp_path / "two") == one, "a damaged file is made again"


def test_bad_input(recipe, photos, tmp_path, capsys):
    data = load(load_recipe(recipe).data)
    pack(data, tmp_path / "packed", PackConfig(size=12), say=str)
    with raises("pack.other", tmp_path / "packed"):
        pack(data, tmp_path / "packed", PackConfig(size=16))
    with raises("pack.other", photos):
        pack(data, photos)
    for values in ({"size": 0}, {"quality": 101}, {"format": "zip"}):
        with raises("pack.value"):
            PackConfig(**values)
    (photos / "cat" / "0.jpg").write_bytes(b"junk")
    assert main(["pack", str(photos), "-o", str(tmp_path / "new")]) == 1
    assert "error[" in (error := capsys.readouterr().err) and "0.jpg" in error
