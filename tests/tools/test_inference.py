"""Inference time: the ensembles are ensembles, and every net is timed in every round."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
from benchmarks import ensembles
from rescom_timm.analysis import style
from tests.raises import raises

SMALL = {"batch_size": 2, "image_size": (16, 16), "num_classes": 5, "device": "cpu", "warm_up": 1}


def test_experts_share_a_stem_and_average_their_logits() -> None:
    torch.manual_seed(0)
    name, net = ensembles.ensemble("resnet20_cifar", 3, 5)
    assert name == "3 experts from layer2" and isinstance(net, ensembles.Shared)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    net.eval()
    with torch.no_grad():
        stem = net.net.encoder.forward_features(net.net.normalize(images))
        own = [head(expert(stem)) for expert, head in zip(net.net.experts, net.net.classifier, strict=True)]
        torch.testing.assert_close(net.classify(images), torch.stack(own).mean(dim=0))
    assert len(own) == 3 and own[0].shape == (2, 5)
    with pytest.raises(ValueError, match="layer9"):
        ensembles.ensemble("resnet20_cifar", 2, 5, "layer9")


def test_a_backbone_that_is_no_chain_becomes_whole_nets() -> None:
    name, net = ensembles.ensemble("test_vit", 2, 5)
    assert name == "2 whole nets" and isinstance(net, ensembles.Whole)
    images = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8)
    net.eval()
    with torch.no_grad():
        own = [one.classify(images) for one in net.nets]
        torch.testing.assert_close(net.classify(images), (own[0] + own[1]) / 2)
    assert not torch.allclose(own[0], own[1])


def test_every_net_is_timed_in_every_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns: list[int] = []

    def slow(net: torch.nn.Module, images: torch.Tensor, place: torch.device) -> float:
        turns.append(sum(p.numel() for p in net.parameters()))
        return 1e-3 * (1 + len([n for n in turns if n == turns[-1]]) % 3) * (2 if turns[-1] > 300_000 else 1)

    monkeypatch.setattr(ensembles, "_time", slow)
    found = ensembles.measure("resnet20_cifar", [2], rounds=6, **SMALL)
    assert found.seconds.shape == (2, 6) and (found.seconds > 0).all()
    plain, pair = found.weights
    assert plain < pair < 2 * plain and turns.count(plain) == turns.count(pair) == 7
    assert turns[0] != turns[2]  # the order turns
    record = found.record()
    assert [row["ratio"] for row in record["nets"]] == [1.0, 2.0]
    np.testing.assert_allclose(record["nets"][0]["images_per_second"], 1000)
    assert (
        record["machine"]["torch"] == torch.__version__.split("+")[0] or record["machine"]["torch"] == torch.__version__
    )
    assert record["machine"]["processor"] and record["rounds"] == 6
    json.dumps(record)
    assert len(style.save(ensembles.draw(found), ensembles.table(found), tmp_path / "x", dpi=40)) == 3


def test_impossible_settings_are_refused() -> None:
    with raises("usage.arguments", 2):
        ensembles.measure("resnet20_cifar", [1], **SMALL)
    with raises("usage.arguments", "precision"):
        ensembles.measure("resnet20_cifar", [2], precision="int8", **SMALL)
    with pytest.raises(ValueError, match="resnet20_cifar"):
        ensembles.measure("resnet20_cifr", [2], **SMALL)
    if not torch.cuda.is_available():
        with raises("usage.arguments", "--device cpu"):
            ensembles.measure("resnet20_cifar", [2], **{**SMALL, "device": "cuda"})


def test_tool_writes_times_with_their_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "resnet20_cifar",
        "--experts",
        "2,3",
        "--batch-size",
        "2",
        "--size",
        "16",
        "--classes",
        "5",
        "--rounds",
        "2",
    ]
    assert benchmark.main(["inference", *words, "--precision", "bfloat16", "--device", "cpu", "-o", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "resnet20_cifar-2-bfloat16.json").read_text())
    names = [row["net"] for row in record["nets"]]
    assert names == ["plain", "2 experts from layer2", "3 experts from layer2"]
    assert record["image_size"] == [16, 16] and all(row["median_ms"] > 0 for row in record["nets"])
    assert "images/s" in capsys.readouterr().out
    assert benchmark.main(["inference", "resnet20_cifar", "img_size"]) == 1
    assert "is not key=value" in capsys.readouterr().err
