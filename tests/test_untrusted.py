"""What an untrusted repository, run's folder or data set may do: use memory and disk within bounds, no more.

rescom_timm/inference/README.md lists the guarantees ("Security model for untrusted files"), each with its test.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import warnings
from pathlib import Path

import datasets
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.analysis.writing import write_figures
from rescom_timm.config.loading import load, load_dict, load_fetched
from rescom_timm.config.recipe import RecipeError
from rescom_timm.config.secrets import secret_in, without_secrets
from rescom_timm.data import tables
from rescom_timm.data.config import DataConfig
from rescom_timm.data.decoding import BrokenImage, decode, look
from rescom_timm.data.index import Index
from rescom_timm.data.sources import load as load_data
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import build_net, load_weights
from rescom_timm.engine.errors import RunError, one_line
from rescom_timm.engine.evaluate import open_checkpoint
from rescom_timm.engine.log import environment, lines
from rescom_timm.engine.run_folder import FOLDERS, locked
from rescom_timm.errors import InputError
from rescom_timm.hub.push import push_run
from rescom_timm.hub.staging import staged
from rescom_timm.hub_download import HubError
from rescom_timm.inference.export import export_run
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.io import read_json, read_text, read_yaml, refuse_links, sha256
from rescom_timm.methods import create_method
from rescom_timm.models.bounds import budget
from rescom_timm.models.classifiers import read_class_features
from rescom_timm.models.net import NetConfig, create_model
from rescom_timm.models.text_features import text_features
from tests.engine.made_up_run import NAMES, make_run, recipe
from tests.raises import raises

TOKEN = "hf_" + "Secret0fMine" * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, with an export of it in RUN/model."""
    run = make_run(tmp_path_factory.mktemp("made") / "run")
    export_run(run, run / "model")
    return run


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


def refit(folder):
    """Hashes made to fit, as a stranger writes them."""
    hashes = read_json(folder / "hashes.json")
    (folder / "hashes.json").write_text(json.dumps({name: sha256(folder / name) for name in hashes}))


def change(path, **parts):
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


# ------------------------------------------------------------------------------------------------- no end and no bound


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_read(run, tmp_path, kind):
    """A pipe is waited for, /dev/zero has no end: both hang or fill the memory of who opens them."""

    def put(path):
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return path

    odd = put(tmp_path / "odd.json")
    for read in (read_json, read_yaml, read_text, sha256, lines):
        with raises("file.kind", odd):
            read(odd)
    for read in (decode, look):
        with raises("image.unreadable", odd, kind=BrokenImage):
            read({"bytes": None, "path": str(odd)})
    for name in (*checkpoint.FILES, "hashes.json"):
        step = shutil.copytree(run / "checkpoints" / "step-00000004", tmp_path / name)
        put(step / name)
        with raises("checkpoint.damaged", name):
            checkpoint.load(step)
    for name in ("rescom.json", "hashes.json", "model.safetensors"):
        folder = shutil.copytree(run / "model", tmp_path / f"{name}-model")
        put(folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError):
                from_pretrained(folder)


def test_hashes_name_no_other_file(run):
    """/dev/zero would be hashed for ever, and ../../x says whether a stranger's guess at a private file is right."""
    hashes = read_json(run / "model" / "hashes.json")
    (run / "model" / "hashes.json").write_text(json.dumps({**hashes, "/dev/zero": "x", "../../x": "y"}))
    assert from_pretrained(run / "model").class_names == NAMES
    (run / "model" / "hashes.json").write_text(
        json.dumps({k: v for k, v in hashes.items() if k != "model.safetensors"})
    )
    with raises("model.damaged", "model.safetensors"):
        from_pretrained(run / "model")


@pytest.mark.parametrize(
    ("parts", "expected", "naming"),
    [
        (
            {"class_names": ["x"] * 10**6, "counts": None},
            "model.details",
            "weights",
        ),
        ({"projector": {"hidden": 60_000, "dim": 60_000}}, "model.details", "weights"),
        ({"backbone": "vit_base_patch16_224", "options": {"embed_dim": 30_000, "num_heads": 8}}, "net.size", "weights"),
        ({"backbone": "vit_base_patch16_224", "options": {"depth": 10**6}}, "net.options", "depth=1000000 "),
        ({"backbone": "vit_base_patch16_224", "options": {"img_size": 60_000}}, "net.size", "weights"),
        ({"backbone": "resnet50", "options": {"layers": [10**6] * 4}}, "net.options", "layers=1000000 "),
        ({"backbone": "resnet50", "options": {"layers": [1] * 2000}}, "net.options", "1,000 values"),
        (
            {"backbone": "resnet50", "options": {"block_args": {"x": {"y": [10**9]}}}},
            "net.options",
            "block_args.x.y=1000000000 ",
        ),
        ({"backbone": "resnet50", "options": {"stem_width": 1e12}}, "net.options", "stem_width=1000000000000.0 "),
        ({"backbone": "vit_base_patch16_224", "options": {"device": "cpu"}}, "net.options", "'device'"),
        ({"backbone": "vit_base_patch16_224", "options": {"dtype": "float64"}}, "net.options", "'dtype'"),
        ({"backbone": "hf-hub:me/anything"}, "model.details", "timm.list_models"),
        ({"backbone": "local-dir:/tmp"}, "model.details", "timm.list_models"),
        ({"class_names": ["a", 2, "c", "d"]}, "model.details", "class_names in rescom.json"),
        ({"class_names": []}, "model.details", "class_names in rescom.json"),
        ({"counts": [1, 2, 3, -4]}, "model.details", "counts in rescom.json"),
        ({"counts": [1, 2]}, "model.details", "counts in rescom.json"),
        ({"eval_policy": "blow(9)"}, "recipe.views", "blow"),
        ({"input_size": [3, 8, 10**9]}, "model.details", "input_size in rescom.json"),
        ({"tuning": {"name": "lora", "rank": 10**9}}, "recipe.value", "rank"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_export_that_lies_is_refused_before_it_fills_the_memory(run, parts, expected, naming):
    change(run / "model" / "rescom.json", **parts)
    refit(run / "model")
    with raises(expected, naming):
        from_pretrained(run / "model")


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet50", {"stem_width": 64}),
        ("vit_base_patch16_224", {"device": "cpu"}),
    ],
)
def test_no_weights_are_made_to_check_options(run, backbone, options, monkeypatch):
    """Of the net that is named, of its class to know its options, and of one that its options place elsewhere."""
    change(run / "model" / "rescom.json", backbone=backbone, options=options)
    refit(run / "model")
    made = made_outside_meta(monkeypatch)
    with raises("model.details" if backbone == "resnet50" else "net.options", kind=ValueError):
        from_pretrained(run / "model")
    assert sum(made) < 2**20


def made_outside_meta(monkeypatch):
    """Numbers of each parameter that is made from now on and takes memory."""
    made, register = [], torch.nn.Module.register_parameter

    def count(self, name, value):
        if value is not None and value.device.type != "meta":
            made.append(value.numel())
        register(self, name, value)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", count)
    return made


def test_a_folder_places_no_net_outside_the_bounds(tmp_path, monkeypatch):
    """timm reads model_args of a folder's config.json as options of its net."""
    made = made_outside_meta(monkeypatch)
    for arguments in ({"device": "cpu"}, {"img_size": 65_000, "embed_dim": 3000}, {"depth": [10**9]}):
        config = {"architecture": "vit_base_patch16_224", "num_classes": 3, "model_args": arguments}
        config["pretrained_cfg"] = {"input_size": [3, 224, 224]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError) as caught:
            create_model(f"local-dir:{tmp_path}", 3)
        assert caught.value.code in ("net.size", "net.options")
    assert sum(made) < 2**20


@pytest.mark.parametrize("fresh", [False, True])
def test_a_method_builds_no_more_than_the_files_hold(run, fresh):
    method = {"name": "experts", "experts": 1000, "fresh": fresh}
    config = load_dict({"data": {"source": "digits"}, "method": method}).method
    net = create_model("resnet8_cifar", 4)
    with raises("net.size"), budget(4 * 10**5):
        create_method(net, torch.tensor([5, 4, 3, 2]), config)
    tree = yaml.safe_load((run / "model" / "recipe.yaml").read_text())
    (run / "model" / "recipe.yaml").write_text(yaml.safe_dump(tree | {"method": method}))
    refit(run / "model")
    with pytest.raises(InputError):
        from_pretrained(run / "model")


def test_a_recipe_that_asks_for_a_large_queue_is_refused(run):
    tree = yaml.safe_load((run / "model" / "recipe.yaml").read_text())
    tree["method"]["queue"]["per_class"] = 4 * 10**9
    (run / "model" / "recipe.yaml").write_text(yaml.safe_dump(tree))
    refit(run / "model")
    with raises("train.memory", "method.queue.per_class"):
        from_pretrained(run / "model")
    for method in ({"name": "experts", "experts": 10**6}, {"name": "causal_norm", "heads": 10**6}):
        with raises("method.value", "1,000", kind=RecipeError):
            load_dict({"data": {"source": "digits"}, "method": method})


@pytest.mark.parametrize(
    ("text", "expected", "naming"),
    [
        ("seed: " + "1:" * 60_000 + "1", "recipe.file", "120,001"),
        ("seed: 0x" + "f" * 900, "recipe.value", "seed"),
        ("seed: !!int x", "recipe.file", "recipe.yaml"),
        ("seed: !!float ''", "recipe.file", "recipe.yaml"),
        ("[]: 1", "recipe.file", "[]"),
        ("{}: 1", "recipe.file", "{}"),
        ("track: {1: 2}", "recipe.unknown_key", "track.1"),
        ("name: CON", "recipe.value", "'CON'"),
        ("name: nul.txt", "recipe.value", "'nul.txt'"),
        ("name: 'C:evil'", "recipe.value", "'C:evil'"),
    ],
)
def test_values_that_were_found_by_fuzzing(tmp_path, text, expected, naming):
    (tmp_path / "recipe.yaml").write_text(f"data: {{source: digits}}\n{text}\n")
    with raises(expected, naming):
        load(tmp_path / "recipe.yaml")


def test_a_word_of_any_depth_is_refused():
    with raises("recipe.override", 50):
        load_dict({"data": {"source": "digits"}}, "recipe", ["a." * 2000 + "b=1"])
    with pytest.warns(UserWarning, match=r"track\.1=2"):  # keys of YAML are not always text
        load_fetched_tree({"data": {"source": "digits"}, "track": {1: 2}})


def load_fetched_tree(tree):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(tree))
        return load_fetched(Path(folder) / "recipe.yaml")


def test_an_evaluation_of_any_number_of_classes_is_not_drawn(run):
    from rescom_timm.io import write_tensors

    (run / "evaluation").mkdir()
    labels = torch.tensor([0, 10**12])
    write_tensors(
        run / "evaluation" / "test-last.safetensors",
        {"labels": labels, "predicted": labels.clone(), "confidence": torch.ones(2)},
    )
    with pytest.raises(ValueError, match="classes"):
        RunFolder(run).evaluation()


def test_a_parquet_file_may_not_say_any_number_of_rows(tmp_path, monkeypatch):
    import pandas as pd

    from rescom_timm.data import bounds
    from rescom_timm.data.index import read

    pd.DataFrame({"path": ["a", "b"], "label": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(bounds, "MAX_ROWS", 1)
    (problem,) = read(tmp_path / "a.parquet")[1]
    assert "parquet" in problem and "2 rows" in problem and "at most 1 " in problem


# ------------------------------------------------------------------------------------------------------- no code is run


def test_an_image_that_is_a_program_is_not_run(monkeypatch, tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    monkeypatch.setattr(subprocess, "check_call", lambda *words, **_: started.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "EPS")
    (tmp_path / "x.jpg").write_bytes(content.getvalue())
    for value in (content.getvalue(), {"bytes": None, "path": str(tmp_path / "x.jpg")}):
        for read in (decode, look):
            with raises("image.unreadable", kind=BrokenImage):
                read(value)
    assert not started
    with pytest.raises((OSError, TypeError)):  # and with Pillow alone it would be
        Image.open(io.BytesIO(content.getvalue())).load()
    assert started


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "ICO"])
def test_images_are_read(kind):
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(content, kind)
    red, green, _ = decode(content.getvalue()).getpixel((8, 8))
    assert red > 190 and green < 30


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    "write",
    [lambda value, path: torch.save({"x": value}, path), lambda value, path: path.write_bytes(pickle.dumps(value))],
)
def test_weights_of_a_file_are_unpickled_as_tensors_alone(tmp_path, write):
    """net.weights_file is timm's to read, and so is a folder behind local-dir:."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(Payload(tmp_path / "owned"), folder / "pytorch_model.bin")
    config = {"architecture": "resnet20_cifar", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 8, 8]}}
    (folder / "config.json").write_text(json.dumps(config))
    for net in (
        NetConfig("resnet20_cifar", pretrained=True, weights_file=str(folder / "pytorch_model.bin")),
        NetConfig(f"local-dir:{folder}", pretrained=True),
    ):
        with raises("net.weights", "net.pretrained"):
            build_net(net, recipe().views, 3)
    with raises("train.from", "pytorch_model.bin"):
        load_weights(create_model("resnet20_cifar", 3), folder / "pytorch_model.bin")
    assert not (tmp_path / "owned").exists()


def test_a_backbone_of_a_folder_is_of_timms_registry(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "os.system", "num_classes": 3}))
    with raises("net.backbone", "os.system"):
        build_net(NetConfig(f"local-dir:{tmp_path}"), recipe().views, 3)


def test_no_code_of_a_text_model_is_run(tmp_path):
    pytest.importorskip("transformers")
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    with raises("net.text", tmp_path):
        text_features(["cat"], str(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_no_code_of_a_data_set_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / "birds.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    (folder / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises((ValueError, OSError)) as told:
        load_data(DataConfig(str(folder)), tmp_path / "index")
    assert str(told.value).strip() and not (tmp_path / "owned").exists()


# -------------------------------------------------------------------------------- nothing outside the folder is touched


def tree_of(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", [".lock", "evaluation", "checkpoints/step-00000009", "hub", "metrics.jsonl", "figures"]
)
def test_nothing_is_written_through_a_link_out_of_a_run(run, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    target = outside / "precious" if "." in name else outside
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    before = tree_of(outside)
    with raises("file.link", run / name), locked(run):
        pass
    with raises("file.link", run / name):
        push_run(run, ["hub.repo=me/mine"])
    with raises("file.link", run / name):
        list(write_figures([RunFolder(run)], ["curves"]))
    assert tree_of(outside) == before


def test_links_within_a_run_and_to_a_run_are_followed(run, tmp_path):
    (run / "latest").symlink_to("checkpoints/step-00000004")
    (run / "checkpoints" / "newest").symlink_to("step-00000004")
    (tmp_path / "link").symlink_to(run)
    with locked(tmp_path / "link"):
        refuse_links(run, FOLDERS)


def test_a_private_file_is_not_pushed_through_a_link(run, tmp_path):
    (tmp_path / "id_rsa").write_text("private")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "test-last.json").symlink_to(tmp_path / "id_rsa")
    with raises("file.link", "test-last.json"):
        push_run(run, ["hub.repo=me/mine"])
    assert not staged(run)


@pytest.mark.parametrize("name", ["../../secret", "/etc", "step-1/../../x", "step-", 7])
def test_a_state_names_no_folder_elsewhere(run, name):
    step = run / "checkpoints" / "step-00000004"
    text = (step / "state.json").read_text().replace('"step-00000002"', json.dumps(name))
    (step / "state.json").write_text(text)
    refit(step)
    for read in (lambda: checkpoint.load(step), lambda: open_checkpoint(run, "step-00000004", "top1")):
        with raises("checkpoint.damaged", "best_checkpoint"):
            read()


def test_a_state_without_what_a_run_has_is_told(run):
    step = run / "checkpoints" / "step-00000004"
    (step / "state.json").write_text('{"$dict": []}')
    refit(step)
    with raises("checkpoint.damaged", "'recipe'"):
        export_run(run, run / "other", "last")
    with raises("checkpoint.damaged", "'progress'"):
        open_checkpoint(run, "last", "top1")


def test_what_waits_in_a_strangers_run_goes_nowhere_else(run):
    """A staged push of a folder that was downloaded would be the stranger's, with the token of who pushes."""
    waiting = run / "hub" / "step-00000009-end"
    waiting.mkdir(parents=True)
    request = {"repo": "me/production", "private": False, "export": "best", "checkpoints": False, "keep": True}
    (waiting / "push.json").write_text(json.dumps(request))
    with raises("hub.occupied", "me/production", "me/mine", kind=HubError):
        push_run(run, ["hub.repo=me/mine"])
    (waiting / "push.json").write_text("{")
    with raises("file.format", "push.json", kind=HubError):
        push_run(run, ["hub.repo=me/mine"])


@pytest.mark.parametrize("path", ["../private/0.png", "a/../../private/0.png"])
def test_a_list_names_no_image_outside_its_folder(tmp_path, path):
    for folder in ("root/a", "private"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    for name, text in (("list.txt", f"{path} 0\na/0.png 1\n"), ("list.csv", f"path,label\n{path},0\na/0.png,1\n")):
        (tmp_path / name).write_text(text)
        lists = {"index": str(tmp_path / name), "test_index": str(tmp_path / name)}
        with raises("data.outside", name):
            load_data(DataConfig(str(tmp_path / "root"), **lists))


def test_a_table_of_the_hub_names_no_file_of_this_machine(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "private.png")}] * 2, "label": [0, 1]}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    made = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(tables, "_open", lambda *_: made)
    with raises("data.outside", "them/birds train", "2 rows"):
        load_data(DataConfig("them/birds", test="holdout(0.5)"))


@pytest.mark.parametrize(
    "word",
    [
        "data.source=/home/me/photos",
        "data.source=~/photos",
        "data.source=../photos",
        "data.index=lists/train.txt",
        "data.test_index=lists/test.txt",
        "data.validation=index(lists/val.txt)",
        "net.backbone=local-dir:/runs/x/model",
        "net.weights_file=/weights.pth",
        "net.classifier.file=/c.safetensors",
        "from=runs/first",
        "method.teacher=/runs/t",
    ],
)
def test_of_a_fetched_recipe_no_file_of_this_machine_is_read_unless_it_is_said(tmp_path, word):
    more = ["net.pretrained=true"] if "weights" in word or "local-dir" in word else []
    more += ["net.classifier.init=file"] if "classifier" in word else []
    more += ["method.name=dive"] if "teacher" in word else []
    tree = {"data": {"source": "digits"}, "method": {"name": "cross_entropy"}}
    made = load_dict(tree, "recipe", [*more, word])
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    with raises("recipe.local_file", word):
        load_fetched(tmp_path / "recipe.yaml")
    assert load_fetched(tmp_path / "recipe.yaml", [word]) == made


@pytest.mark.parametrize(
    "word", ["data.source=them/birds", "data.index=exponential(100)", "method.teacher=them/teacher"]
)
def test_what_a_fetched_recipe_names_on_the_hub_is_followed(tmp_path, word, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["method.name=dive"] if "teacher" in word else []
    made = load_dict({"data": {"source": "digits"}, "method": {"name": "cross_entropy"}}, "recipe", [*more, word])
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    assert load_fetched(tmp_path / "recipe.yaml") == made
    if "exponential" not in word:  # a folder of that name is here, and would be taken
        (tmp_path / word.partition("=")[2]).mkdir(parents=True)
        with raises("recipe.local_file"):
            load_fetched(tmp_path / "recipe.yaml")


# ------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "word",
    [
        "track.name={}",
        "track.project={}",
        "track.tags=[a, {}]",
        "hub.license={}",
        "data.source=https://me:{}@host/x",
        "output=/x/{}",
    ],
)
def test_a_token_in_a_recipe_reaches_nothing(tmp_path, monkeypatch, word):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "recipe.yaml").write_text("data: {source: digits}\n")
    with raises("recipe.secret") as told:
        load(tmp_path / "recipe.yaml", [word.format(TOKEN)])
    assert TOKEN not in str(told.value)
    from rescom_timm import train

    with raises("recipe.secret"):
        train({"data": {"source": "digits"}}, overrides=[f"output={tmp_path}/runs", f"track.name={TOKEN}"])
    assert not (tmp_path / "runs").exists()


def test_no_message_and_no_record_tells_a_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setattr("sys.argv", ["rescom-timm", "train", "x", f"hub.private={TOKEN}", "a=0123456789abcdef"])
    assert environment()["command"] == "rescom-timm train x hub.private=*** a=***"
    with pytest.raises(RecipeError) as told:
        load_dict({"data": {"source": "digits"}}, "recipe", [f"hub.private={TOKEN}"])
    for text in (
        str(told.value),
        str(RunError("run.missing", f"x {TOKEN}")),
        str(HubError("hub.token", f"x {TOKEN}")),
        one_line(OSError(f"https://me:0123456789abcdef@host {TOKEN}")),
    ):
        assert "***" in text and TOKEN not in text and "0123456789abcdef" not in text


def test_what_is_a_secret(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh12")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false123")
    assert secret_in("x abcdefgh12 y") == "the value of SOME_TOKEN"
    assert secret_in(f"a {TOKEN}") == "a token of the Hub"
    assert secret_in("https://me:password@host/x") == "a password in an address"
    for harmless in ("abc", "false123", "hf_hub_download", "hf://me/x", "https://host/a:b@c", "~/x", "a@b:c"):
        assert secret_in(harmless) is None and without_secrets(harmless) == harmless


# --------------------------------------------------------------------------------------------- found by fuzzing


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "i.txt",
            "# rescom_timm index: 1\n# rows: ²\n# classes: 1\n# class 0: 1\n# row label\n0 0\n",
            "is not a whole number",
        ),
        (
            "i.txt",
            f"# rescom_timm index: 1\n# rows: {'1' * 5000}\n# classes: 1\n# class 0: 1\n# row label\n0 0\n",
            "line 2: a header line of 5,008 characters",
        ),
        ("i.csv", "path,label\na,²\nb,0\n", "label '²' is not a whole number from 0"),
        ("i.jsonl", "1\n2\n", "line 1 is no object"),
    ],
    ids=["superscript", "digits", "label", "numbers"],
)
def test_lists_that_are_none(tmp_path, name, text, expected):
    from rescom_timm.data.index import read

    (tmp_path / name).write_text(text)
    index, problems = read(tmp_path / name, 2)
    assert index is None and expected in "; ".join(problems)


def test_a_path_with_a_zero_byte_or_of_any_name_length_is_missing(tmp_path):
    (tmp_path / "root").mkdir()
    for path in ("a\0b/x.png", "a" * 4000 + "/x.png"):  # longer paths are refused as the list is read
        Index([path, "c/y.png"], [0, 1], 2).save(tmp_path / "list.txt")
        lists = {"index": str(tmp_path / "list.txt"), "test_index": str(tmp_path / "list.txt")}
        with raises("index.images", "2 of 2", kind=FileNotFoundError):
            load_data(DataConfig(str(tmp_path / "root"), **lists))


@pytest.mark.parametrize(
    ("features", "names"),
    [
        (torch.ones(2, 3), "3"),
        (torch.ones(2, 3), "[1, 2]"),
        (torch.tensor(1.0), '["a", "b"]'),
        (torch.ones(2, 3, dtype=torch.int64), '["a", "b"]'),
        (torch.ones(2, 3), "[" * 99_999),
        (torch.full((2, 3), float("nan")), '["a", "b"]'),
    ],
)
def test_class_features_that_are_none(tmp_path, features, names):
    save_file({"class_features": features}, tmp_path / "c.safetensors", {"class_names": names})
    with raises("net.class_features", "c.safetensors"):
        read_class_features(tmp_path / "c.safetensors", ["a", "b"], 3)


def test_weights_to_start_from_are_numbers(tmp_path):
    net = create_model("resnet20_cifar", 3)
    weights = net.state_dict()
    weights["classifier.bias"] = torch.full((3,), float("nan"))
    save_file(weights, tmp_path / "net.safetensors")
    with raises("train.from", "classifier.bias"):
        load_weights(create_model("resnet20_cifar", 3), tmp_path / "net.safetensors")
    assert timm.is_model("resnet20_cifar")
