"""Runs of a frozen backbone and few trained weights: what is saved, resumed, evaluated and exported."""

import shutil

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load, load_dict, shipped
from rescom_timm.config.recipe import RecipeError
from rescom_timm.engine.evaluate import evaluate_run
from rescom_timm.engine.run_folder import run_recipe
from rescom_timm.inference.export import export_run
from rescom_timm.inference.pretrained import from_pretrained
from tests.engine.child import differences, figures, last, recipe, run, trainer_of
from tests.marks import slow
from tests.raises import raises

FROZEN = ("vit_b16", "clip_b16", "dinov2_b14", "siglip2_b16")
VIT = {"img_size": 8, "patch_size": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file of a small ViT's weights, as if they were pretrained."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("base") / "vit.safetensors"
    save_file(timm.create_model("test_vit", **VIT).state_dict(), path)
    return path


def tuned(folder, base, kind, **changes):
    net = {
        "backbone": "test_vit", "options": VIT, "pretrained": True, "weights_file": str(base),
        "tuning": {"name": kind} | ({"rank": 2} if kind in ("lora", "adaptformer") else {}),
        "projector": {"hidden": 16, "dim": 8},
        "trainable": ["none"] if kind == "full" else ["all"],
        "classifier": {"kind": "cosine", "init": "class_means"},
    }  # fmt: skip
    return recipe(folder, net=net, train__epochs=2, **changes)


def weights_of(folder):
    """Of the newest checkpoint: (names of its net, bytes)."""
    path = sorted((folder / "checkpoints").glob("step-*"))[-1] / "net.safetensors"
    with safe_open(path, framework="pt") as file:
        return set(file.keys()), path.stat().st_size


@pytest.mark.parametrize("kind", ["lora", *slow("adaptformer", "prompt", "full")])
def test_a_checkpoint_holds_what_trains_and_resumes_bit_equal(alone, tmp_path, base, kind):
    whole, parts = (tuned(tmp_path / name, base, kind) for name in ("whole", "parts"))
    folder = train_recipe(load_dict(whole))
    names, size = weights_of(folder)
    assert size < base.stat().st_size / 4 and not any("patch_embed" in name for name in names)
    assert "classifier.weight" in names and any("projector" in name for name in names)
    assert any(word in name for name in names for word in ("lora_A", "adapter.down", "prompts")) == (kind != "full")
    shutil.copytree(folder, tmp_path / "parts/run")
    shutil.rmtree(tmp_path / "parts/run/checkpoints/step-00000022")
    train_recipe(load_dict(parts), resume=True)
    assert differences(last(whole), last(parts)) == []
    assert figures(whole) == figures(parts)


@pytest.mark.slow
def test_an_average_is_saved_of_what_trains_alone_and_resumes_bit_equal(alone, tmp_path, base):
    whole, parts = (tuned(tmp_path / name, base, "lora", train__ema={"decay": 0.9}) for name in ("whole", "parts"))
    folder = train_recipe(load_dict(whole))
    assert last(whole)[1]["average"].keys() == weights_of(folder)[0]
    shutil.copytree(folder, tmp_path / "parts/run")
    shutil.rmtree(tmp_path / "parts/run/checkpoints/step-00000022")
    train_recipe(load_dict(parts), resume=True)
    assert differences(last(whole), last(parts)) == []
    assert evaluate_run(folder, weights="ema")[2].compute()["top1"] == figures(whole)[-1]["test_ema/top1"]


@pytest.mark.parametrize("kind", ["lora", "adaptformer", "prompt", "full"])
@pytest.mark.slow
def test_not_a_bit_of_the_frozen_weights_changes(alone, tmp_path, base, kind):
    trainer = trainer_of(tuned(tmp_path, base, kind))
    before = {name: value.clone() for name, value in trainer.state.frozen.items()}
    trainer.open(resume=False)
    trainer.fit()
    trainer.close()
    assert before and all(torch.equal(value, before[name]) for name, value in trainer.state.frozen.items())
    assert not any(weight in trainer.optimizer.state for weight in trainer.state.frozen.values())


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.slow
def test_what_is_read_back_depends_on_no_state_of_the_generators(alone, tmp_path, base, kind):
    """Whatever of a net is drawn at random is saved, or not there."""
    folder = train_recipe(load_dict(tuned(tmp_path, base, kind, method={"name": "balanced_softmax", "views": 2})))
    torch.manual_seed(99)
    before = load_file(folder / "evaluation/test-last.safetensors")
    evaluate_run(folder)
    assert differences(load_file(folder / "evaluation/test-last.safetensors"), before) == []
    nets = []
    for seed in (98, 97):
        torch.manual_seed(seed)
        nets.append(from_pretrained(export_run(folder, tmp_path / str(seed), plain=False)).net)
    assert differences(*(dict(net.state_dict()) for net in nets)) == []


@pytest.mark.parametrize("kind", ["lora", *slow("adaptformer", "prompt")])
def test_it_is_evaluated_and_exported_as_it_was_trained(alone, tmp_path, base, kind, capsys):
    tree = tuned(tmp_path, base, kind)
    folder = train_recipe(load_dict(tree))
    told = load_file(folder / "evaluation/test-last.safetensors")
    evaluate_run(folder)
    assert differences(load_file(folder / "evaluation/test-last.safetensors"), told) == []
    model = from_pretrained(folder / "model")
    assert model.net.tuning.name == ("full" if kind == "lora" else kind) and model.net.head.kind == "cosine"
    again = from_pretrained(folder)  # from the checkpoint
    images = torch.rand(3, 3, 8, 8)
    assert torch.allclose(model.net.classify(images), again.net.classify(images), atol=1e-5)
    if kind == "lora":  # merged; timm's linear layer ranks as the cosines do
        plain = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
        assert torch.equal(plain(images).argsort(dim=1), model.net.classify(images).argsort(dim=1))
        assert "other probabilities than the cosine classifier's" in capsys.readouterr().out
    else:
        assert not (folder / "model/config.json").exists(), "what cannot be merged has no place in plain timm"
    fresh = from_pretrained(folder / "model", num_classes=4).net
    assert fresh.classify(images).shape == (3, 4) and fresh.head.kind == "cosine"
    features = [one.encoder(one.normalize(images)) for one in (fresh, model.net)]
    assert torch.equal(*features), "the rank is that of training whatever the new classes ask for"


@pytest.mark.parametrize("kind", ["lora", pytest.param("adaptformer", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_frozen_weights_in_bfloat16_train_the_same(alone, tmp_path, base, kind):
    """Under autocast it makes no difference, to the bit; what is exported is what was evaluated."""
    trees = [tuned(tmp_path / name, base, kind, train__precision="bf16") for name in ("wide", "narrow")]
    trees[1]["net"]["frozen_precision"] = "bf16"
    folders = [train_recipe(load_dict(tree)) for tree in trees]
    wide, narrow = (last(tree)[0] for tree in trees)
    assert differences(wide, narrow) == [] and figures(trees[0]) == figures(trees[1])
    trainer = trainer_of({**trees[1], "output": str(tmp_path / "none")})
    kinds = {value.dtype for name, value in trainer.state.frozen.items() if value.ndim > 1 and "blocks" in name}
    assert kinds == {torch.bfloat16}
    told = load_file(folders[1] / "evaluation/test-last.safetensors")
    evaluate_run(folders[1])
    assert differences(load_file(folders[1] / "evaluation/test-last.safetensors"), told) == []
    images = torch.rand(3, 3, 8, 8)
    one, other = (from_pretrained(folder).net.classify(images) for folder in folders)
    assert torch.allclose(one, other, atol=0.1) and one.dtype == other.dtype == torch.float32
    trees[1]["train"]["precision"] = "no"
    with raises("recipe.conflict", "net.frozen_precision", "train.precision"):
        load_dict(trees[1])


def test_layers_below_the_first_that_trains_keep_nothing(alone, tmp_path, base):
    """Bytes that the encoder saves for the backward pass: none where it is frozen, few where its last block trains."""
    saved = {}
    for trainable in ("none", "last_block", "all"):
        tree = tuned(tmp_path, base, "full")
        tree["net"]["trainable"] = [trainable]
        trainer = trainer_of(tree)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            trainer.net.train().encoder(torch.rand(8, 3, 8, 8))
        saved[trainable] = sum(kept)
    assert saved["none"] == 0 < saved["last_block"] < 0.5 * saved["all"]


def test_lora_under_a_linear_classifier_becomes_plain_timm(alone, tmp_path, base):
    tree = tuned(tmp_path, base, "lora")
    tree["net"]["classifier"] = {"kind": "linear", "init": "class_means"}
    folder = train_recipe(load_dict(tree))
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    images = torch.rand(3, 3, 8, 8)
    own = from_pretrained(folder / "model")
    assert own.net.tuning.name == "full", "what is exported is merged"
    assert torch.allclose(model(images), own.net.classify(images), atol=1e-5)


@pytest.mark.slow
def test_other_base_weights_are_refused(alone, tmp_path, base):
    tree = tuned(tmp_path, base, "lora")
    folder = train_recipe(load_dict(tree))
    torch.manual_seed(6)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit", **VIT).state_dict(), other)
    tree["net"]["weights_file"] = str(other)
    kept = base.read_bytes()
    try:
        base.write_bytes(other.read_bytes())  # the same name, other numbers
        for act in (
            lambda: train_recipe(run_recipe(folder), resume=True),
            lambda: evaluate_run(folder),
            lambda: export_run(folder, tmp_path / "export"),
        ):
            with raises("checkpoint.differs", "net.weights_file"):
                act()
    finally:
        base.write_bytes(kept)


@pytest.mark.parametrize("name", ["logit_adjustment", "paco", "hybrid_psc"])
@pytest.mark.slow
def test_other_methods_train_over_it(alone, tmp_path, base, name):
    tree = tuned(tmp_path, base, "lora", method={"name": name})
    tree["net"]["classifier"] = {}
    tree["train"]["epochs"], tree["schedule"]["warmup_epochs"] = 1, 0
    folder = train_recipe(load_dict(tree))
    assert (folder / "evaluation/test-last.json").is_file()


@pytest.mark.slow
def test_two_processes_start_from_the_same_class_means(alone, tmp_path, base):
    trees = [tuned(tmp_path / name, base, "lora", train__accumulate=1) for name in ("one", "two")]
    for tree, ranks in zip(trees, (1, 2), strict=True):
        tree["train"]["epochs"], tree["schedule"]["warmup_epochs"] = 0, 0
        run(load_dict(tree).to_dict(), ranks)
    one, two = (last(tree)[0]["classifier.weight"] for tree in trees)
    assert torch.equal(one, two) and torch.allclose(one.norm(dim=1), torch.ones(10), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tuning": {"name": "loar"}}, ["net.tuning.name", "'full', 'lora', 'adaptformer' or 'prompt'"]),
        ({"tuning": {"name": "lora", "rank": 4000}}, ["tuning.rank", 4000, "blocks.0.attn.qkv"]),
        ({"tuning": {"name": "lora", "layers": ["x*"]}}, ["'x*'"]),
        ({"trainable": ["nrms"], "tuning": {"name": "lora"}}, ["net.trainable", "'nrms'"]),
    ],
)
def test_what_cannot_be_tuned_is_one_line_before_training(alone, tmp_path, base, change, named):
    tree = tuned(tmp_path, base, "lora")
    tree["net"] |= change
    with pytest.raises(RecipeError) as caught:
        train_recipe(load_dict(tree))
    assert all(str(part) in str(caught.value) for part in named) and str(caught.value).count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_a_method_with_a_classifier_of_its_own_is_told(alone, tmp_path, base):
    with raises("recipe.conflict", "net.classifier", "ldam"):
        train_recipe(load_dict(tuned(tmp_path, base, "lora", method={"name": "ldam"})))


@pytest.mark.parametrize("path", [path for path in shipped() if any(word in path.stem for word in FROZEN)], ids=str)
def test_every_recipe_of_a_frozen_vit_trains_a_small_one_of_random_weights(alone, tmp_path, path):
    words = [
        "data={source: digits, label_column: null, test: test, test_index: all, index: exponential(20)}",
        "net.backbone=test_vit", "net.options={img_size: 8, patch_size: 4}", "net.pretrained=false",
        "views.train=random_resized_crop(8,0.5,1,bicubic) | flip", "views.eval=none", "net.projector.hidden=8",
        "train.batch_size=16", "train.precision=no", "speed.workers=0", f"output={tmp_path}",
    ]  # fmt: skip
    if load(path).method.name == "rescom":
        words += ["method.negatives=9"]
    train_recipe(load(path, words), dry_run=True)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "adaptformer"])
@pytest.mark.slow
def test_fsdp2_on_two_processes_is_the_same_run_and_exported(tmp_path, base, kind):
    trees = [tuned(tmp_path / name, base, kind, train__accumulate=1) for name in ("plain", "sharded")]
    for tree in trees:
        tree["net"]["classifier"] = {"kind": "cosine"}
        tree["train"]["epochs"], tree["schedule"]["warmup_epochs"] = 1, 0
    run(load_dict(trees[0]).to_dict(), 2)
    run(load_dict(trees[1]).to_dict(), 2, fault=("fsdp",))
    plain, sharded = (last(tree) for tree in trees)
    assert sharded[1]["sharded"] and not plain[1]["sharded"]
    trained = {name: value for name, value in sharded[0].items() if name in plain[0]}
    torch.testing.assert_close(trained, plain[0], rtol=1e-3, atol=1e-4)
    for name, value in load_file(base).items():  # saved whole, and not a bit has changed
        own = sharded[0].get(f"encoder.{name}")
        assert own is None or torch.equal(own, value)
    assert from_pretrained(tmp_path / "sharded/run").net.tuning.name == ("full" if kind == "lora" else kind)
