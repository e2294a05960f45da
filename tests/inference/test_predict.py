import csv
import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from PIL import Image
from torch.testing import assert_close

import rescom_timm
from rescom_timm.api import Run, train_recipe
from rescom_timm.cli import predict as tool
from rescom_timm.config.loading import load_dict
from rescom_timm.data.config import DataConfig
from rescom_timm.data.sources import load
from rescom_timm.data.transforms import parse
from rescom_timm.engine.evaluate import five_crops
from rescom_timm.inference.export import export, export_run
from rescom_timm.inference.neighbours import Embeddings
from rescom_timm.inference.predict import Reader, embed, predictions
from rescom_timm.inference.predictions_table import write_csv
from rescom_timm.inference.pretrained import from_pretrained
from tests.engine.child import recipe
from tests.engine.made_up_run import COUNTS, NAMES, make_run, randomize
from tests.raises import raises


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("model") / "run", steps=(2,))
    return export_run(run, run / "model")


@pytest.fixture(scope="module")
def model(folder):
    return from_pretrained(folder)


def pixels(seed=0, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.PNG", "more/c.png"]):
        Image.fromarray(pixels(number)).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "more" / "broken.jpg").write_bytes(b"\xff\xd8 cut off")
    return root


def test_probabilities_are_the_nets(model):
    images = [pixels(seed) for seed in range(5)]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    expected = model.net.classify(x).softmax(dim=1).topk(3)
    model.net.train()
    for batch_size in (1, 2, 64):
        found = rescom_timm.predict(model, images, top_k=3, batch_size=batch_size)
        assert_close(torch.tensor([one.probabilities for one in found]), expected.values)
        assert [one.labels for one in found] == [[NAMES[k] for k in row] for row in expected.indices.tolist()]
        assert [one.image for one in found] == list("01234")
    assert model.net.training, "the caller's net stays as it is"
    model.net.eval()


@pytest.mark.parametrize(("channels_last", "strides"), [(True, (1, 3)), (False, (9, 1))])
def test_a_cpu_takes_a_few_images_at_a_time_in_the_recipes_memory_format(model, channels_last, strides):
    speed = replace(model.recipe.speed, channels_last=channels_last)
    reader = Reader(replace(model, recipe=replace(model.recipe, speed=speed)), [pixels(k) for k in range(40)])
    weight, seen = reader.net.encoder.conv1.weight, []
    assert (weight.stride()[1], weight.stride()[3]) == strides
    reader.net.classifier.register_forward_hook(lambda *found: seen.append(len(found[2])))
    (batch,) = reader.batches()
    assert seen == [16, 16, 8]
    alone = model.net.classify(torch.from_numpy(np.stack([pixels(k) for k in range(40)])).permute(0, 3, 1, 2))
    assert_close(batch.logits, alone)


def test_files_and_folders(folder, model, photos):
    found = rescom_timm.predict(folder, photos, top_k=9)
    assert [one.image for one in found] == [
        str(photos / name) for name in ("a.PNG", "b.png", "more/broken.jpg", "more/c.png")
    ]
    assert all(len(one.labels) == 4 and abs(sum(one.probabilities) - 1) < 1e-5 for one in found if not one.error)
    broken = found[2]
    assert not broken.labels and not broken.probabilities and "cannot read the image" in broken.error
    (one,) = rescom_timm.predict(model, str(photos / "b.png"), top_k=9)
    assert one == found[1]
    mixed = rescom_timm.predict(model, [photos / "more", Image.fromarray(pixels(0)), str(photos / "b.png")], top_k=9)
    assert [bool(one.error) for one in mixed] == [True, False, False, False]
    assert mixed[2].probabilities == mixed[3].probabilities == one.probabilities


def test_workers_change_nothing(model, photos):
    assert rescom_timm.predict(model, photos, workers=2, batch_size=2) == rescom_timm.predict(model, photos)


def test_files_are_read_one_batch_ahead(model, photos):
    reader = Reader(model, [photos / name for name in sorted(os.listdir(photos))], batch_size=1)
    assert reader.source.from_disk
    assert not Reader(model, [np.zeros((8, 8, 3), np.uint8)]).source.from_disk
    read, own = [], type(reader.source).__getitem__

    class Watched(type(reader.source)):
        def __getitem__(self, position):
            read.append(threading.get_ident())
            return own(self, position)

    reader.source.__class__ = Watched
    batches = reader.batches()
    assert next(batches).about[0]["image"].endswith(sorted(os.listdir(photos))[0])
    batches.close()  # with the second batch on its way
    assert len(read) <= 2 and threading.get_ident() not in read


def test_only_a_callers_net_is_copied(folder, model, photos):
    assert Reader(model, photos).net is not model.net
    reader = Reader(folder, photos)
    assert reader.net is reader.model.net


def test_images_of_another_size_are_brought_to_the_nets(model):
    found = rescom_timm.predict(model, [pixels(1, 40, 25), pixels(2, 5, 5), pixels(3)])
    assert not any(one.error for one in found)
    wide = Image.fromarray(pixels(1, 40, 25)).resize((8, 12), Image.Resampling.BILINEAR).crop((0, 2, 8, 10))
    assert found[0].probabilities == rescom_timm.predict(model, [wide])[0].probabilities


def test_the_split_of_a_data_set(tmp_path):
    data = load(DataConfig("digits"))
    net = rescom_timm.create_model("resnet20_cifar", 10)
    export(net, tmp_path, data.class_names, (3, 8, 8))
    found = rescom_timm.predict(tmp_path, data.test, batch_size=256, top_k=1)
    assert len(found) == 500 and [one.label for one in found[:20]] == [str(k) for k in data.test.labels[:20]]
    assert found[0].image.startswith("digit_")


def adjustment(model, prior):
    """What is added to the logits, (K,)."""
    return Reader(model, [pixels()], prior).shift


def test_a_prior_is_bayes_rule(model):
    """Against the posterior worked out from the uniform one: p(y|x) p'(y) / p(y), normalised."""
    images = [pixels(seed) for seed in range(4)]
    share = dict(zip(NAMES, [0.5, 0.25, 0.2, 0.05], strict=True))
    found = rescom_timm.predict(model, images, prior=[50, 25, 20, 5])
    for one, before in zip(found, rescom_timm.predict(model, images), strict=True):
        weighted = {name: p * share[name] for name, p in zip(before.labels, before.probabilities, strict=True)}
        total = sum(weighted.values())
        for name, probability in zip(one.labels, one.probabilities, strict=True):
            assert probability == pytest.approx(weighted[name] / total, rel=1e-4)
    assert_close(adjustment(model, None), torch.zeros(4))
    assert_close(adjustment(model, "uniform").softmax(0), torch.full((4,), 0.25))
    assert_close(adjustment(model, "train").softmax(0), torch.tensor(COUNTS) / sum(COUNTS))
    (never,) = rescom_timm.predict(model, images[:1], prior=torch.tensor([1, 1, 0, 1]))
    assert dict(zip(never.labels, never.probabilities, strict=True))["emu"] == 0


@pytest.mark.parametrize(
    "method",
    [
        {"name": "cross_entropy"},
        {"name": "focal"},
        {"name": "moco", "classification": "cross_entropy", "queue_size": 8},
    ],
    ids=lambda method: method["name"],
)
def test_of_a_model_of_plain_cross_entropy_the_training_prior_is_taken_off(tmp_path, method):
    run = make_run(tmp_path / "run", steps=(2,), method=method)
    biased = from_pretrained(run)
    log_train = (torch.tensor(COUNTS) / sum(COUNTS)).log()
    assert_close(adjustment(biased, "train"), torch.zeros(4), atol=1e-6, rtol=0)
    assert_close(adjustment(biased, "uniform").softmax(0), (-log_train).softmax(0))
    assert_close(adjustment(biased, None), torch.zeros(4))


def test_what_is_taken_off_is_what_was_drawn(tmp_path):
    """A draw of sqrt(N_k) leaves half of the prior, an even one none; MoCo beside Balanced Softmax none either."""
    plain = {"name": "cross_entropy"}
    half = from_pretrained(make_run(tmp_path / "half", steps=(2,), method=plain, loader={"sampler": "square_root"}))
    root = torch.tensor(COUNTS).sqrt()
    assert_close(adjustment(half, "uniform").softmax(0), (1 / root) / (1 / root).sum())
    for name, changes in {
        "even": {"method": plain, "loader": {"sampler": "class_balanced"}},
        "balanced": {"method": {"name": "moco", "queue_size": 8}},
    }.items():
        model = from_pretrained(make_run(tmp_path / name, steps=(2,), **changes))
        assert_close(adjustment(model, "uniform").softmax(0), torch.full((4,), 0.25))


@pytest.mark.parametrize("prior", [[1, 2, 3], [0, 0, 0, 0], [1, -1, 1, 1], [1, float("nan"), 1, 1], "even"])
def test_priors_that_cannot_be(model, prior):
    with raises("predict.prior", 4):
        rescom_timm.predict(model, [pixels()], prior=prior)


def test_what_cannot_be_predicted(model, tmp_path):
    with raises("file.missing", "nothing.png", kind=FileNotFoundError):
        rescom_timm.predict(model, tmp_path / "nothing.png")
    with raises("predict.images", tmp_path, ".png"):
        rescom_timm.predict(model, tmp_path)
    with raises("predict.images"):
        rescom_timm.predict(model, [])
    with raises("predict.images", "Split"):
        rescom_timm.predict(model, pixels())
    with raises("predict.value", "top_k", 0):
        rescom_timm.predict(model, [pixels()], top_k=0)
    with raises("file.missing", "no-model", kind=FileNotFoundError):
        rescom_timm.predict(tmp_path / "no-model", [pixels()])
    fresh = from_pretrained(make_run(tmp_path / "run", steps=(2,)), num_classes=3)
    assert rescom_timm.predict(fresh, [pixels()])[0].labels[0] in "012"
    with raises("predict.prior", "counts"):
        rescom_timm.predict(fresh, [pixels()], prior="train")


def test_predictions_come_one_after_the_other(model):
    found = predictions(Reader(model, [pixels(0)] * 1000, batch_size=1))
    assert next(found).image == "0" and next(found).image == "1"


def test_csv_and_tool(folder, photos, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    assert tool.main([str(folder), str(photos), "--top-k", "2", "-o", str(out)]) == 0
    assert "4 images, 1 unreadable" in capsys.readouterr().out
    rows = table(out)
    assert next(row["image"] for row in rows).endswith("a.PNG") and len(rows) == 4
    assert rows[2]["label_1"] == "" and "cannot read" in rows[2]["error"]
    assert float(rows[0]["probability_1"]) >= float(rows[0]["probability_2"]) and rows[0]["label_2"] in NAMES
    prior = tmp_path / "prior.txt"
    prior.write_text("0\n0\n1\n0\n")
    assert tool.main([str(folder), str(photos), "--prior", str(prior), "-o", str(out)]) == 0
    assert {row["label_1"] for row in table(out) if not row["error"]} == {"emu"}
    assert tool.main([str(folder), str(photos), "--prior", str(tmp_path / "none")]) == 1
    prior.write_text("a lot")
    assert tool.main([str(folder), str(photos), "--prior", str(prior)]) == 1
    assert tool.main([str(tmp_path / "nowhere"), str(photos)]) == 1
    with pytest.raises(SystemExit):
        tool.main([str(folder)])


def test_the_tool_on_a_data_set(tmp_path, capsys):
    net = rescom_timm.create_model("resnet20_cifar", 10)
    randomize(net, 3)
    export(net, tmp_path / "model", [str(k) for k in range(10)], (3, 8, 8))
    out = tmp_path / "labels.csv"
    assert tool.main([str(tmp_path / "model"), "--data", "digits", "--top-k", "1", "-o", str(out)]) == 0
    told = capsys.readouterr().out
    rows = table(out)
    right = 100 * sum(row["label_1"] == row["true_label"] for row in rows) / len(rows)
    assert f"top-1 {right:.2f} % of 500" in told


def test_the_tool_takes_the_split_that_it_is_told(tmp_path):
    data = load(DataConfig("digits"))
    splits = {"train": data.train, "test": data.test, "more": data.test}
    rows = {"train": range(40), "test": range(9), "more": range(20, 24)}
    DatasetDict({name: split.dataset.select(rows[name]) for name, split in splits.items()}).save_to_disk(
        tmp_path / "few"
    )
    export(rescom_timm.create_model("resnet20_cifar", 10), tmp_path / "model", data.class_names, (3, 8, 8))
    words = [str(tmp_path / "model"), "--data", str(tmp_path / "few"), "-o", str(tmp_path / "labels.csv")]
    for name, numbers in (("test", range(9)), ("more", range(20, 24))):
        assert tool.main([*words, "--split", name]) == 0
        expected = [data.test.dataset[number]["image"]["path"] for number in numbers]
        assert [row["image"] for row in table(tmp_path / "labels.csv")] == expected


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on the digits, with validation images."""
    tree = recipe(tmp_path_factory.mktemp("digits"), train__epochs=1, schedule__warmup_epochs=0)
    tree["views"]["eval"] = "upscale(12) | center_crop(8)"
    return train_recipe(load_dict(tree, "digits", ["data.validation=holdout(0.2)"]))


def test_embeddings_are_the_nets_and_keep_their_names(model, photos, tmp_path):
    found = embed(model, photos, batch_size=2)
    assert [name.rpartition("/")[2] for name in found.images] == ["a.PNG", "b.png", "c.png"], (
        "the broken one is left out"
    )
    x = torch.from_numpy(np.stack([pixels(1), pixels(0), pixels(2)])).permute(0, 3, 1, 2)
    with torch.no_grad():
        outputs = model.net(x)
    assert_close(found.features, outputs.features)
    assert_close(found.embeddings, outputs.embeddings)
    found.save(tmp_path / "e.safetensors")
    again = Embeddings.load(tmp_path / "e.safetensors")
    assert torch.equal(again.features, found.features) and torch.equal(again.embeddings, found.embeddings)
    assert (again.images, again.labels) == (found.images, ["", "", ""])


def test_the_nearest_are_those_of_the_greatest_cosine(model):
    images = [pixels(seed) for seed in range(20)]
    among = embed(model, images)
    found = rescom_timm.predict(model, [pixels(4), pixels(50)], among=among, nearest=3)
    assert found[0].nearest[0].similarity == pytest.approx(1, abs=1e-5)
    other = embed(model, [pixels(50)]).features[0].double()
    cosines = [float(one @ other / one.norm() / other.norm()) for one in among.features.double()]
    best = sorted(cosines, reverse=True)[:3]
    assert [one.similarity for one in found[1].nearest] == pytest.approx(best, abs=1e-5)
    assert [cosines[int(one.image)] for one in found[1].nearest] == pytest.approx(best, abs=1e-5)
    spread = Embeddings(torch.eye(4), torch.eye(4), list("abcd"), list("wxyz"))
    ((first, second),) = spread.nearest(torch.tensor([[0.1, 0.0, 2.0, 1.0]]), 2)
    assert (first.image, first.label, second.image, second.label) == ("c", "y", "d", "z")


def test_what_is_no_file_of_embeddings(model, tmp_path):
    with raises("file.missing", tmp_path / "none", kind=FileNotFoundError):
        Embeddings.load(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with raises("predict.embeddings", tmp_path / "text"):
        Embeddings.load(tmp_path / "text")
    other = Embeddings(torch.rand(3, 5), torch.rand(3, 2), ["a", "b", "c"], ["", "", ""])
    with raises("predict.embeddings", 5):
        rescom_timm.predict(model, [pixels()], among=other, nearest=1)
    replace(other, images=["a"]).save(tmp_path / "short")
    with raises("predict.embeddings", tmp_path / "short"):
        Embeddings.load(tmp_path / "short")
    with raises("predict.value", "nearest", "among"):
        rescom_timm.predict(model, [pixels()], nearest=1)
    with raises("predict.images"):
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"no image")
        embed(model, [broken])


def test_five_crops_stand_beside_the_single_one(digits):
    model = from_pretrained(digits)
    images = [pixels(seed, 20, 30) for seed in range(3)]
    found = rescom_timm.predict(model, images, five_crops=True)
    assert [(one.labels, one.probabilities) for one in found] == [
        (one.labels, one.probabilities) for one in rescom_timm.predict(model, images)
    ]
    for one, image in zip(found, images, strict=True):
        views = [parse(policy).augment(Image.fromarray(image)) for policy in five_crops("upscale(12) | center_crop(8)")]
        x = torch.stack([torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views])
        mean = model.net.classify(x).detach().mean(dim=0).softmax(dim=0)
        name, share = one.five_crops
        assert name == model.class_names[int(mean.argmax())] and share == pytest.approx(float(mean.max()), abs=1e-5)


def test_folders_and_lists_with_labels_are_scored_by_name(folder, model, tmp_path, capsys):
    """Class folders of which one is unknown to the model, in another order than its classes."""
    root, out = tmp_path / "photos", tmp_path / "labels.csv"
    names = ["zebra", *NAMES[::-1][:2]]
    lines = ["file,species"]
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(3):
            Image.fromarray(pixels(10 * i + j)).save(root / name / f"{j}.png")
            lines.append(f"{name}/{j}.png,{name}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    predicted = rescom_timm.predict(model, [pixels(10 * i + j) for i in range(3) for j in range(3)])
    right = sum(one.labels[0] == names[i // 3] for i, one in enumerate(predicted))
    for words in ([], ["--list", str(tmp_path / "list.csv")]):
        assert tool.main([str(folder), "--data", str(root), "-o", str(out), *words]) == 0
        told = capsys.readouterr().out
        assert f"top-1 {100 * right / 9:.2f} % of 9, mean of 3 classes" in told
        assert "3 are of classes that the model does not have, and count as wrong" in told
        assert [row["true_label"] for row in table(out)] == [name for name in sorted(names) for _ in range(3)] or words
    for name in names[1:]:
        (root / name).rename(root / f"not {name}")
    assert tool.main([str(folder), "--data", str(root), "-o", str(out)]) == 1
    assert "error[data.classes]: " in capsys.readouterr().err


def test_the_tool_gives_sets_neighbours_and_embeddings(digits, tmp_path, capsys):
    out, kept, among = tmp_path / "labels.csv", tmp_path / "kept.safetensors", tmp_path / "train.safetensors"
    words = [str(digits), "--data", "digits", "-o", str(out), "--top-k", "1", "--coverage", "0.8", "--five-crops"]
    words += ["--nearest", "2", "--among", str(among), "--embeddings", str(kept), "--batch-size", "250"]
    assert tool.main(words) == 0
    told, rows = capsys.readouterr().out, table(out)
    train = Run(digits).embeddings("train")
    assert Embeddings.load(among).images == train.images and len(train.images) == len(set(train.images))
    test = Embeddings.load(kept)
    assert len(rows) == len(test.images) == 500 and test.labels == [row["true_label"] for row in rows]
    near = train.nearest(test.features[:9], 2)
    assert [row["nearest_2"] for row in rows[:9]] == [found[1].image for found in near]
    assert [row["nearest_label_1"] for row in rows[:9]] == [found[0].label for found in near]
    inside = [json.loads(row["set"]) for row in rows]
    assert [int(row["set_size"]) for row in rows] == [len(one) for one in inside]
    assert all(row["label_1"] == one[0] for row, one in zip(rows, inside, strict=True))
    holds = 100 * sum(row["true_label"] in one for row, one in zip(rows, inside, strict=True)) / 500
    assert f"sets hold the class {holds:.2f} %" in told and "five crops" in told and "coverage 0.8 over all" in told
    sets = Run(digits).prediction_sets(0.8)
    found = Run(digits).predict([pixels()], sets=sets, among=train, nearest=1)
    assert len(found[0].nearest) == 1 and found[0].inside
    assert tool.main([*words, "--by-group"]) == 0
    assert "within each group: many on 26" in capsys.readouterr().out


def test_what_the_tool_needs_for_that(folder, photos, tmp_path, capsys):
    for words in (["--coverage", "0.9"], ["--nearest", "2"]):
        assert tool.main([str(folder), str(photos), *words]) == 1
        assert "error[run.missing]: " in capsys.readouterr().err
    for words in (["--by-group"], ["--among", "x"], ["--list", "x"]):
        with pytest.raises(SystemExit):
            tool.main([str(folder), str(photos), *words])


def test_write_csv_counts(tmp_path, model):
    found = rescom_timm.predict(model, [pixels()], top_k=1)
    assert write_csv(found, tmp_path / "x.csv", 3) == (1, 0)
    assert (tmp_path / "x.csv").read_text().count(",") == 2 * 8
