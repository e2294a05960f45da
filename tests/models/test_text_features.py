"""Class features by a tiny random CLIP, and classifiers that start from a file of them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from rescom_timm.cli import class_features as tool
from rescom_timm.config.loading import load_dict
from rescom_timm.data.index import Index
from rescom_timm.data.sources import load
from rescom_timm.engine.build import build_method
from rescom_timm.models.classifiers import ClassifierConfig, read_class_features
from tests.engine.child import recipe
from tests.raises import raises

NAMES = ["sea_lion", "owl", "Great Egret"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a random CLIP of two layers, whose tokens are letters."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **small, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": len(tokens),
            "max_position_embeddings": 40, "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1,
        },
        vision_config={**small, "hidden_size": 24, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def written(path, features, names=None):
    save_file({"class_features": features}, path, None if names is None else {"class_names": json.dumps(names)})
    return path


def started(tree):
    made = load_dict(tree)
    return build_method(made, load(made.data), start=True).net.classifier.weight


def test_they_are_what_the_text_tower_says_of_every_name(clip, tmp_path):
    """Name by name without padding, against all at once with it; two prompts; the product with an image's features is
    that of CLIP's own embeddings."""
    from transformers import CLIPModel, CLIPTokenizer

    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    prompts, out = ["a photo of a {}.", "a {}, seen"], tmp_path / "features.safetensors"
    words = [str(tmp_path / "names.txt"), "--model", str(clip), "-o", str(out)]
    assert tool.main([*words, "--prompt", prompts[0], "--prompt", prompts[1]]) == 0
    with safe_open(out, framework="pt") as file:
        found, about = file.get_tensor("class_features"), file.metadata()
    assert json.loads(about["class_names"]) == NAMES and json.loads(about["prompts"]) == prompts
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    texts = []
    with torch.no_grad():
        for name in ("sea lion", "owl", "Great Egret"):
            each = [
                model.text_projection(model.text_model(**tokenizer(p.format(name), return_tensors="pt")).pooler_output)
                for p in prompts
            ]
            texts.append(F.normalize(sum(F.normalize(one[0], dim=0) for one in each), dim=0))
        x = torch.randn(5, 24)
        theirs = model.visual_projection(x) @ torch.stack(texts).T
        ours = x @ found.T
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    scale = (model.visual_projection.weight.T @ torch.stack(texts).T).norm(dim=0)  # a unit vector has lost its length
    assert torch.allclose(ours * scale, theirs, atol=1e-4)


def test_the_classifier_starts_from_a_file_in_the_order_of_the_classes(alone, tmp_path):
    names = [str(k) for k in range(10)]
    features = torch.randn(10, 64)
    path = written(tmp_path / "f.safetensors", features.flip(0).contiguous(), names[::-1])
    net = {
        "backbone": "test_vit", "options": {"img_size": 8, "patch_size": 4}, "projector": {"hidden": 8, "dim": 8},
        "tuning": {"name": "prompt", "tokens": 2}, "classifier": {"kind": "cosine", "init": "file", "file": str(path)},
    }  # fmt: skip
    tree = recipe(tmp_path, net=net)
    assert torch.allclose(started(tree), F.normalize(features, dim=1), atol=1e-6)
    written(path, features, [*names[:8], "eight", "nine"])
    with raises("data.classes", "net.classifier.file", "'8', '9'", "'eight', 'nine'"):
        started(tree)
    path.unlink()
    with raises("file.missing", path):
        started(tree)
    tree["net"]["classifier"] = {"init": "file"}
    with raises("recipe.conflict", "net.classifier"):
        load_dict(tree)


def test_files_that_are_no_class_features(tmp_path):
    path = tmp_path / "f.safetensors"
    for features, names in ((torch.rand(3, 5), NAMES), (torch.rand(2, 4), None), (torch.full((3, 4), torch.nan), None)):
        with raises("net.class_features", 3, 4):
            read_class_features(written(path, features, names), NAMES, 4)
    with raises("data.classes", "owl"):
        read_class_features(written(path, torch.rand(4, 4), [*NAMES, "owl"]), NAMES, 4)
    assert read_class_features(written(path, torch.rand(3, 4)), NAMES, 4).shape == (3, 4)
    save_file({"other": torch.rand(3, 4)}, path)
    with raises("net.class_features", path.name):
        read_class_features(path, NAMES, 4)
    path.write_text("text")
    with raises("net.class_features", path.name):
        read_class_features(path, NAMES, 4)
    assert ClassifierConfig(init="file", file="x").file == "x"


def test_what_the_tool_cannot_do_is_one_line(clip, tmp_path, capsys):
    names, out = tmp_path / "names.txt", tmp_path / "out.safetensors"
    for text, words, expected in (
        ("owl\nowl\n", ["--model", str(clip)], "error[net.class_names]: "),
        ("\n", ["--model", str(clip)], "error[net.class_names]: "),
        ("owl\n", ["--model", str(clip), "--prompt", "a photo"], "error[net.text]: "),
        ("owl\n", ["--model", str(tmp_path)], "error[net.text]: "),
    ):
        names.write_text(text)
        assert tool.main([str(names), "-o", str(out), *words]) == 1
        assert expected in capsys.readouterr().err and not out.exists()
    assert tool.main([str(tmp_path / "none.txt"), "--model", str(clip), "-o", str(out)]) == 1


def test_names_of_a_recipe_and_of_an_index(clip, tmp_path):
    assert tool.read_class_names("digits_lt") == [str(k) for k in range(10)]
    Index(["a.png", "b.png"], np.array([0, 1]), 2, class_names=["owl", "sea lion"]).save(tmp_path / "list.txt")
    assert tool.read_class_names(str(tmp_path / "list.txt")) == ["owl", "sea lion"]
