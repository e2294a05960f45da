import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch.testing import assert_close

import rescom_timm
from rescom_timm.api import train_recipe
from rescom_timm.cli import export as export_command
from rescom_timm.config.loading import load_dict
from rescom_timm.data.decoding import ReadConfig
from rescom_timm.data.transforms import parse
from rescom_timm.errors import InputError
from rescom_timm.inference.export import export, export_run, save_model
from rescom_timm.inference.onnx import export_onnx
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.inference.program import export_program
from rescom_timm.io import sha256
from rescom_timm.methods import METHODS
from rescom_timm.models.classifiers import Cosine
from rescom_timm.models.net import ProjectorConfig
from tests.data.test_decoding import scene, turned
from tests.engine.child import recipe
from tests.engine.made_up_run import COUNTS, NAMES, make_run, randomize
from tests.raises import raises

SOURCE = ("tag", "license", "paper_ids", "paper_name", "origin_url", "notes", "description", "url", "hf_hub_id", "file")
"""What a description of other weights would tell."""


def tiny(backbone, seed=1, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = rescom_timm.create_model(
            backbone, 4, projector=ProjectorConfig(8, 4), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **options
        )
    randomize(net, seed)
    return net.eval()


def images(size, number=3):
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


CASES = [
    ("test_resnet", 40, {}),
    ("test_vit.r160_in1k", 32, {"img_size": 32, "drop_path_rate": 0.1}),
    ("test_efficientnet", 48, {"global_pool": "max"}),
    ("test_convnext", 64, {}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),  # strict about its size
    ("resnet20_cifar", 8, {}),
]


@pytest.mark.parametrize(("backbone", "size", "options"), CASES, ids=[case[0] for case in CASES])
def test_both_readers_get_the_same_logits(tmp_path, backbone, size, options):
    net = tiny(backbone, **options)
    export(net, tmp_path, NAMES, (3, size, size), counts=COUNTS, eval_policy=f"upscale({size})")
    x = images(size)
    model = from_pretrained(tmp_path)
    for own, read in zip(net(x), model.net(x), strict=True):
        assert torch.equal(own, read)
    assert (model.class_names, model.counts.tolist(), model.input_size) == (NAMES, COUNTS, (3, size, size))
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_close(plain(net.normalize(x)), net.classify(x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == NAMES and config["pretrained_cfg"]["input_size"] == [3, size, size]
    assert_close(config["pretrained_cfg"]["mean"], [0.4, 0.5, 0.6])
    assert_close(config["pretrained_cfg"]["std"], [0.2, 0.3, 0.25])
    assert not set(SOURCE) & set(config["pretrained_cfg"])
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.p*t*"))


def test_plain_timm_needs_nothing_of_ours(tmp_path):
    net = tiny("test_vit", img_size=32)
    export(net, tmp_path, NAMES, (3, 32, 32), eval_policy="resize(36) | center_crop(32)")
    x = images(32)
    np.save(tmp_path / "x.npy", net.normalize(x).numpy())
    np.save(tmp_path / "y.npy", net.classify(x).detach().numpy())
    code = """
import sys, numpy, timm, torch
folder = sys.argv[1]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
logits = model(torch.from_numpy(numpy.load(folder + "/x.npy"))).detach().numpy()
assert numpy.allclose(logits, numpy.load(folder + "/y.npy"), atol=1e-5)
assert "rescom_timm" not in sys.modules
print(model.pretrained_cfg["label_names"])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(NAMES)


@pytest.mark.parametrize(
    ("policy", "size", "shape"),
    [
        ("resize(20) | center_crop(16)", 16, (33, 57)),
        ("resize(36,bicubic) | center_crop(32)", 32, (50, 41)),
        ("resize(53) | center_crop(40)", 40, (60, 70)),  # 40 / (40 / 53) is a little less than 53
        ("upscale(24)", 24, (30, 50)),
        ("none", 32, (32, 32)),
    ],
)
def test_timm_prepares_images_as_we_do(tmp_path, policy, size, shape):
    net = tiny("test_resnet")
    export(net, tmp_path, NAMES, (3, size, size), eval_policy=policy)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = net.normalize(parse("" if policy == "none" else policy)(Image.fromarray(pixels))[None])
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert_close(transform(Image.fromarray(pixels))[None], ours, atol=1e-5, rtol=0)


def test_a_run_is_exported_with_its_best_checkpoint_and_its_queue(tmp_path):
    run = make_run(tmp_path / "run")
    told = save_model(run)
    assert "local-dir:" in told
    for source in (run, run / "model", str(run / "model")):
        model = from_pretrained(source)
        method = model.method()
        assert method.net is model.net and model.recipe.name == "tiny"
        assert method.queue.valid.all()
    details = json.loads((run / "model" / "rescom.json").read_text())
    assert details["checkpoint"] == "step-00000002" and details["progress"]["best_epoch"] == 2
    first = from_pretrained(run).net.classifier.weight
    export_run(run, tmp_path / "last", "last")
    assert not torch.equal(from_pretrained(tmp_path / "last").net.classifier.weight, first)
    assert torch.equal(
        from_pretrained(export_run(run, tmp_path / "named", "step-00000002")).net.classifier.weight, first
    )
    with raises("checkpoint.missing", "step-00000007", "step-00000002, step-00000004"):
        export_run(run, tmp_path / "none", "step-00000007")


def test_a_run_is_exported_with_the_views_of_its_recipe(tmp_path):
    views = {"train": "digits", "eval": "resize(9) | center_crop(8)", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    model = from_pretrained(export_run(make_run(tmp_path / "run", steps=(2,), views=views), tmp_path / "out"))
    assert model.eval_policy == "resize(9,bilinear) | center_crop(8)"
    assert_close(model.net.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert_close(model.net.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_a_run_that_is_not_finished_is_read_from_its_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", best=None)
    model = from_pretrained(run)
    export_run(run, tmp_path / "last", "last")
    assert torch.equal(model.net.classifier.weight, from_pretrained(tmp_path / "last").net.classifier.weight)


@pytest.mark.parametrize("method", [{"name": "lws"}, {"name": "logit_adjustment", "form": "post_hoc"}], ids=str)
def test_classifiers_of_other_methods(tmp_path, method):
    run = make_run(tmp_path / "run", steps=(3,), best=None, method=method)
    export_run(run, tmp_path / "out")
    model = from_pretrained(tmp_path / "out")
    x = images(8)
    whole = from_pretrained(export_run(run, tmp_path / "whole", plain=False))
    assert type(model.net.classifier) is type(model.method().net.classifier)
    assert torch.equal(model.net.classify(x), whole.net.classify(x))
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_close(plain(model.net.normalize(x)), model.net.classify(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [{"name": "hybrid_psc"}, {"name": "dro_lt"}, {"name": "ssd"}], ids=str)
def test_what_a_method_adds_to_its_net_is_read_back(tmp_path, method):
    run = make_run(tmp_path / "run", steps=(3,), best=None, method=method)
    model, whole = (from_pretrained(export_run(run, tmp_path / str(plain), plain=plain)) for plain in (True, False))
    assert_close(dict(model.net.state_dict()), dict(whole.net.state_dict()), rtol=0, atol=0)
    fresh = from_pretrained(tmp_path / "True", num_classes=7).net
    assert fresh.classifier.out_features == 7
    if METHODS[method["name"]][1].embeds:  # others have no projector
        assert torch.equal(fresh.projector[0].weight, model.net.projector[0].weight)


def test_the_cosines_of_ldam_are_ranked_alike_in_plain_timm(tmp_path, capsys):
    changes = {"method": {"name": "ldam"}, "net": {"backbone": "resnet20_cifar"}, "schedule__warmup_epochs": 0}
    tree = recipe(tmp_path, train__epochs=1, **changes)
    run = train_recipe(load_dict(tree))
    assert "other probabilities than the cosine classifier's" in capsys.readouterr().out
    own = from_pretrained(run / "model")
    assert type(own.net.classifier) is Cosine and own.method().net is own.net
    whole = from_pretrained(export_run(run, tmp_path / "whole", plain=False)).net
    plain, x = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval(), images(8)
    assert torch.equal(own.net.classify(x), whole.classify(x))
    assert torch.equal(plain(own.net.normalize(x)).argsort(dim=1), own.net.classify(x).argsort(dim=1))


def test_a_net_that_timm_has_no_place_for(tmp_path):
    method = {"name": "experts", "experts": 2}
    run = make_run(tmp_path / "run", steps=(3,), best=None, method=method)
    with raises("net.export"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "only rescom_timm.from_pretrained" in save_model(run)
    assert not (run / "model" / "config.json").exists()
    model = from_pretrained(run)
    assert model.net.classify(images(8)).shape == (3, 4) and model.method().net is model.net
    with raises("net.mismatch", run):
        from_pretrained(run, num_classes=5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.fill_(float("nan")), "is not finite"),
        (lambda w: w.index_fill(0, torch.tensor([1]), float("inf")), "is not finite"),
        (lambda w: w.to(torch.int64), "holds int64"),
    ],
    ids=["nan", "inf", "int64"],
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, change, expected):
    folder = export_run(make_run(tmp_path / "run"), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors["conv1.weight"])
    save_file({**tensors, "conv1.weight": changed}, folder / "model.safetensors")
    hashes = json.loads((folder / "hashes.json").read_text())
    (folder / "hashes.json").write_text(
        json.dumps({**hashes, "model.safetensors": sha256(folder / "model.safetensors")})
    )
    with pytest.raises(ValueError, match=f"encoder.conv1.weight .*{expected}"):
        from_pretrained(folder)


def test_a_model_that_cannot_be_written_is_an_error(tmp_path):
    run = make_run(tmp_path / "run", steps=(2,), best=None)
    (run / "model").write_text("in the way")
    with pytest.raises(FileExistsError):
        save_model(run)


def test_fine_tuning_on_other_classes(tmp_path):
    export_run(make_run(tmp_path / "run"), tmp_path / "out")
    known, fresh = from_pretrained(tmp_path / "out"), from_pretrained(tmp_path / "out", num_classes=7)
    assert fresh.net.classifier.out_features == 7 and not fresh.class_names and fresh.counts is None
    assert torch.equal(fresh.net(images(8)).embeddings, known.net(images(8)).embeddings)
    with raises("model.classes", "counts"):
        fresh.method()
    with raises("model.classes", 3, 7):
        fresh.method(torch.tensor([3, 2, 1]))
    method = fresh.method(torch.tensor([9, 8, 7, 6, 5, 4, 3]))
    batch = {"image": torch.stack([images(8, 6), images(8, 6)], dim=1), "label": torch.arange(6)}
    method.train()(batch)["loss"].backward()
    assert method.net.classifier.weight.grad.abs().sum() > 0 and method.queue.valid.sum() == 6
    assert fresh.net.to_timm().num_classes == 7
    with raises("model.classes", "num_classes"):
        from_pretrained(tmp_path / "out", num_classes=0)


def test_plain_timm_starts_from_an_export_by_recipe(tmp_path):
    folder = export_run(make_run(tmp_path / "run"), tmp_path / "out")
    net = rescom_timm.create_model(f"local-dir:{folder}", 9, pretrained=True)
    assert torch.equal(net.encoder.conv1.weight, from_pretrained(folder).net.encoder.conv1.weight)


@pytest.mark.parametrize("name", ["config.json", "rescom.json", "recipe.yaml"])
def test_a_text_that_was_changed_is_told_and_read(tmp_path, name):
    folder = export_run(make_run(tmp_path / "run", steps=(2,)), tmp_path / "out")
    (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.warns(UserWarning, match=name):
        assert from_pretrained(folder).class_names == NAMES


@pytest.mark.parametrize(
    ("change", "expected", "naming"),
    [
        ({"input_size": None}, "model.unreadable", ["NoneType"]),
        ({"input_size": [3, 8, 10**9]}, "model.details", ["input_size", 8192]),
        ({"options": {"checkpoint_path": "/tmp/x"}}, None, ["resnet20_cifar", "checkpoint_path"]),
        ({"options": {"pretrained_cfg_overlay": {"file": "/tmp/x"}}}, None, ["pretrained_cfg_overlay"]),
        ({"options": [1]}, "model.unreadable", []),
        ({"class_names": None}, "model.details", ["class_names"]),
        ({"mean": [0.5]}, "model.details", ["mean", [0.5]]),
        ({"backbone": "nothing"}, None, ["nothing"]),
        (None, "file.format", ["rescom.json"]),
    ],
)
def test_invalid_details_are_refused(tmp_path, change, expected, naming):
    folder = export_run(make_run(tmp_path / "run", steps=(2,)), tmp_path / "out")
    details = json.loads((folder / "rescom.json").read_text())
    (folder / "rescom.json").write_text(json.dumps([details] if change is None else {**details, **change}))
    with pytest.warns(UserWarning, match="rescom.json"), pytest.raises(InputError) as caught:
        from_pretrained(folder)
    assert expected in (None, caught.value.code) and all(str(part) in str(caught.value) for part in naming)


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "a: &x 1\nb: *x\n", "data: {source: 1}\n"])
def test_a_recipe_that_cannot_be_read_is_left_out(tmp_path, text):
    folder = export_run(make_run(tmp_path / "run", steps=(2,)), tmp_path / "out")
    (folder / "recipe.yaml").write_text(text)
    with pytest.warns(UserWarning, match="recipe") as told:
        assert from_pretrained(folder).recipe is None
    assert any("cannot be read and is left out" in str(one.message) for one in told)


@pytest.mark.parametrize("name", ["model.safetensors", "rescom.safetensors"])
def test_damage_is_seen(tmp_path, name):
    folder = export_run(make_run(tmp_path / "run", steps=(2,)), tmp_path / "out")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with raises("model.damaged", name, folder):
        from_pretrained(folder)
    (folder / "hashes.json").unlink()
    with raises("model.damaged", "hashes.json"):
        from_pretrained(folder)


def test_what_is_no_model(tmp_path):
    with raises("file.missing", tmp_path / "nowhere", kind=FileNotFoundError):
        from_pretrained(tmp_path / "nowhere")
    with raises("model.missing", tmp_path, "rescom.json"):
        from_pretrained(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with raises("checkpoint.missing", tmp_path / "run", kind=FileNotFoundError):
        from_pretrained(tmp_path / "run")
    run = make_run(tmp_path / "other")
    (run / "classes.json").unlink()
    with raises("model.missing", "classes.json", "--resume"):
        from_pretrained(run)
    with raises("model.classes", 3, 4):
        export(tiny("resnet20_cifar"), tmp_path / "x", NAMES[:3], (3, 8, 8))


def test_a_recipe_of_another_version_is_left_out(tmp_path):
    net = tiny("resnet20_cifar")
    export(net, tmp_path, NAMES, (3, 8, 8), counts=COUNTS)
    (tmp_path / "recipe.yaml").write_text("data: {source: digits}\nfuture: 1\n")
    with pytest.warns(UserWarning, match="future"):
        model = from_pretrained(tmp_path)
    assert model.recipe is None and torch.equal(model.net.classify(images(8)), net.classify(images(8)))
    with raises("model.missing", "recipe"):
        model.method()


def check_onnx(net, folder, size):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    export(net, folder, NAMES, (3, size, size))
    path = export_onnx(folder, folder / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == NAMES and json.loads(told["input_size"]) == [3, size, size]
    assert told["crop_mode"] == "center" and json.loads(told["crop_pct"]) == 1.0
    assert_close(json.loads(told["mean"]) + json.loads(told["std"]), [0.4, 0.5, 0.6, 0.2, 0.3, 0.25])
    for number in (1, 2, 5):
        x = net.normalize(images(size, number))
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        # Against float64, a ViT of such weights is off by 6e-5 in torch and by 2e-4 in onnxruntime: rounding.
        assert_close(torch.from_numpy(logits), net.classify(x).detach(), rtol=1e-3, atol=4e-4)


def test_onnx(tmp_path):
    check_onnx(tiny("resnet20_cifar"), tmp_path, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "size", "options"), CASES[:-1], ids=[case[0] for case in CASES[:-1]])
def test_onnx_of_more_families(tmp_path, backbone, size, options):
    check_onnx(tiny(backbone, **options), tmp_path, size)


def check_program(net, folder, size):
    export(net, folder, NAMES, (3, size, size), eval_policy=f"resize({size + 8},bicubic) | center_crop({size})")
    before = os.umask(0o027)
    try:
        path = export_program(folder, folder / "net.pt2")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640, "as the umask says"
    extra = {"rescom.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    told = json.loads(extra["rescom.json"])
    assert (told["class_names"], told["input_size"]) == (NAMES, [3, size, size])
    assert (told["interpolation"], told["crop_mode"]) == ("bicubic", "center")
    assert int(size / told["crop_pct"]) == size + 8 and told["eval_policy"].startswith("resize(")
    assert_close(told["mean"] + told["std"], [0.4, 0.5, 0.6, 0.2, 0.3, 0.25])
    for number in (1, 3, 5):
        x = net.normalize(images(size, number))
        assert_close(program(x), net.classify(x), rtol=1e-4, atol=1e-5)


def test_a_program_of_torch_export(tmp_path):
    check_program(tiny("resnet20_cifar"), tmp_path, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "size", "options"), CASES[:-1], ids=[case[0] for case in CASES[:-1]])
def test_a_program_of_torch_export_of_more_families(tmp_path, backbone, size, options):
    check_program(tiny(backbone, **options), tmp_path, size)


@pytest.mark.slow
def test_a_program_is_read_without_our_code(tmp_path):
    run = make_run(tmp_path / "run")
    assert export_command.main([str(run), "--format", "torch", "-o", str(tmp_path / "net.pt2")]) == 0
    code = "import sys, torch; m = torch.export.load(sys.argv[1]).module(); print(m(torch.zeros(2, 3, 8, 8)).shape[0])"
    code += "; assert not {'timm', 'rescom_timm'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "net.pt2")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_program_that_gives_other_logits_is_not_kept(tmp_path, monkeypatch):
    export(tiny("resnet20_cifar"), tmp_path / "model", NAMES, (3, 8, 8))
    monkeypatch.setattr(
        torch.export, "load", lambda file: SimpleNamespace(module=lambda: lambda x: torch.zeros(len(x), 4))
    )
    with raises("model.export", "exported program"):
        export_program(tmp_path / "model", tmp_path / "out" / "net.pt2")
    assert not list((tmp_path / "out").iterdir())


def test_every_file_of_an_export_has_the_rights_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        folder = export(tiny("resnet20_cifar"), tmp_path / "model", NAMES, (3, 8, 8), counts=COUNTS)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        path.name: "0o640" for path in folder.iterdir()
    }
    assert folder.stat().st_mode & 0o777 == 0o750


def test_the_front_door_opens():
    assert callable(rescom_timm.predict) and rescom_timm.from_pretrained is from_pretrained


def test_the_package_is_quick_to_import():
    code = (
        "import importlib.util, sys, rescom_timm\n"
        "importlib.util.find_spec('timm')  # as transformers looks whether it is there\n"
        "import timm\n"
        "assert timm.is_model('resnet32_cifar')\n"
        "heavy = {'datasets', 'accelerate', 'sklearn', 'matplotlib', 'rescom_timm.engine', 'rescom_timm.inference'}\n"
        "assert not heavy & set(sys.modules)\n"
        "assert {'predict', 'from_pretrained', 'create_model'} <= set(rescom_timm.__all__)\n"
        "try: rescom_timm.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing" in done.stdout, done.stderr


def test_transformers_reads_what_timm_reads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    net = rescom_timm.create_model("resnet18", 3, projector=ProjectorConfig(hidden=8, dim=4))
    names = ["a cat", "dog", "=eel"]
    folder = export(net, tmp_path / "model", names, (3, 64, 64), eval_policy="resize(72) | center_crop(64)")
    assert "num_classes" not in json.loads((folder / "config.json").read_text()).get("model_args", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        reader = transformers.pipeline("image-classification", model=str(folder))
    assert model.config.id2label == dict(enumerate(names))
    batch = torch.randn(2, 3, 64, 64)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(batch).logits, plain(batch), atol=1e-5)
        counted = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).eval()
        assert torch.equal(counted(batch), plain(batch))
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    ours = rescom_timm.predict(folder, [pixels], top_k=3)[0]
    theirs = reader(Image.fromarray(pixels), top_k=3)
    assert [one["label"] for one in theirs] == ours.labels
    assert [one["score"] for one in theirs] == pytest.approx(ours.probabilities, abs=2e-3)


@pytest.mark.parametrize(
    ("policy", "size"), [("resize(72,bicubic) | center_crop(64)", 64), ("upscale(48)", 48)], ids=["crop", "squash"]
)
def test_transformers_prepares_and_labels_a_photograph_as_we_do(tmp_path, policy, size):
    transformers = pytest.importorskip("transformers", reason="the extra test is not installed")
    net = tiny("resnet18")
    folder = export(net, tmp_path / "model", NAMES, (3, size, size), eval_policy=policy)
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        reader = transformers.pipeline("image-classification", model=model, image_processor=processor)
        theirs = reader(photograph, top_k=4)
    prepared = processor(photograph, return_tensors="pt")["pixel_values"]
    ours = parse(policy)(photograph)[None]
    assert_close(prepared, net.normalize(ours), atol=1e-5, rtol=0)
    probabilities, classes = net.classify(ours)[0].softmax(dim=0).sort(descending=True)
    assert [one["label"] for one in theirs] == [NAMES[k] for k in classes]
    assert [one["score"] for one in theirs] == pytest.approx(probabilities.tolist(), abs=1e-5)
    with torch.no_grad():
        assert_close(model(prepared).logits, net.classify(ours), rtol=1e-4, atol=1e-4)


def test_what_is_said_of_transformers_is_so(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    policy = "resize(72) | center_crop(64)"
    folder = export(
        tiny("resnet18"), tmp_path / "model", NAMES, (3, 64, 64), eval_policy=policy, reading=ReadConfig(exif=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        reader = transformers.pipeline("image-classification", model=str(folder))
    rgba, gray = scene(90, 70).convert("RGBA"), np.asarray(scene(90, 70).convert("L")).astype(np.uint16) * 257
    rgba.putalpha(40)
    rgba.save(tmp_path / "transparent.png")
    Image.fromarray(gray).save(tmp_path / "16.png")
    for tag in (1, 6):
        (tmp_path / f"{tag}.png").write_bytes(turned(scene(90, 70), tag))
    names = [
        *(str(tmp_path / f"{tag}.png") for tag in (1, 6)),
        str(tmp_path / "transparent.png"),
        str(tmp_path / "16.png"),
    ]
    ours = [one.probabilities for one in rescom_timm.predict(folder, names, top_k=3)]
    theirs = [[one["score"] for one in reader(name, top_k=3)] for name in names]
    same = [mine == pytest.approx(other, abs=2e-3) for mine, other in zip(ours, theirs, strict=True)]
    assert same[:2] == [True, True], "both read it upright"
    loaded = [np.asarray(transformers.image_utils.load_image(name)) for name in names[2:]]
    assert np.array_equal(loaded[0], np.asarray(rgba)[..., :3]), "the transparency is dropped"
    assert np.array_equal(loaded[1][..., 0], np.minimum(gray, 255)), "and 16 bits are clipped"
