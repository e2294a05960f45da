"""Kept logits: what is computed from them is what the net's own would give; training that does not test."""

import json
from pathlib import Path

import pytest
import torch

from rescom_timm.api import train_recipe
from rescom_timm.config.loading import load_dict
from rescom_timm.engine import logits
from rescom_timm.engine.evaluate import evaluate_run
from rescom_timm.metrics import Meter
from tests.engine.child import recipe
from tests.raises import raises


def drawn(n: int = 300, k: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, k, (n,), generator=generator)
    found = 3 * torch.randn(n, k, generator=generator) + 40
    found[torch.arange(n), labels] += 4
    return found, labels


def kept(found: torch.Tensor, labels: torch.Tensor, path: Path) -> logits.Logits:
    keeper = logits.Keeper(len(labels), found.shape[1])
    for part in torch.arange(len(labels)).split(128):
        keeper.update(found[part], labels[part])
    keeper.write(logits.place(path, "test-last"))
    return logits.read(path, "test-last")


def test_all_logits_in_half_precision_give_the_same_figures(tmp_path):
    found, labels = drawn()
    read = kept(found, labels, tmp_path)
    assert not read.approximate and read.values.dtype == torch.float16 and read.values.shape == (300, 12)
    counts, shift = [200] * 6 + [5] * 6, torch.linspace(-2, 2, 12)
    meter = Meter(12, counts)
    meter.update(found / 1.5 + shift, labels)
    ours = read.judged(counts, shift=shift, temperature=1.5)
    assert ours.compute() == pytest.approx(meter.compute(), abs=0.05)
    assert torch.equal(ours.predictions()["predicted"], meter.predictions()["predicted"])


def test_beyond_the_bound_the_largest_and_the_sum_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "WHOLE", 300 * 12 * 2 - 1)
    monkeypatch.setattr(logits, "TOP", 5)
    found, labels = drawn()
    read = kept(found, labels, tmp_path)
    assert read.approximate and read.values.shape == (300, 5) and read.num_classes == 12
    dense = torch.cat([values for values, _ in read.batches(size=70)])
    assert dense.shape == (300, 12) and torch.equal(dense.argmax(dim=1), found.argmax(dim=1))
    torch.testing.assert_close(dense.softmax(1).amax(1), found.softmax(1).amax(1), atol=2e-3, rtol=0)
    top = found.topk(5).indices
    torch.testing.assert_close(dense.softmax(1).gather(1, top), found.softmax(1).gather(1, top), atol=2e-3, rtol=0)
    rest = dense.scatter(1, top, torch.inf).amin(dim=1)
    assert (rest <= read.values.amin(dim=1) + 1e-6).all()


def test_missing_and_damaged_logits_are_named(tmp_path):
    with raises("file.missing", "evaluation/logits/test-last.safetensors", kind=FileNotFoundError):
        logits.read(tmp_path, "test-last")
    kept(*drawn(), tmp_path)
    path = logits.place(tmp_path, "test-last")
    path.write_bytes(path.read_bytes()[:50])
    with raises("run.evaluation", path, kind=ValueError):
        logits.read(tmp_path, "test-last")


def test_a_hidden_test_split_is_seen_by_evaluate_alone(alone, tmp_path):
    folder = train_recipe(load_dict(recipe(tmp_path, train__epochs=2, evaluation__hide_test=True)))
    assert {path.name.partition("-")[0] for path in folder.glob("evaluation/*.json")} == {"validation"}
    assert "test/" not in (folder / "metrics.jsonl").read_text()
    meter = evaluate_run(folder)[2]
    read = logits.read(folder, "test-last")
    assert read.judged().compute()["top1"] == pytest.approx(meter.compute()["top1"])
    assert torch.equal(read.labels, meter.predictions()["labels"])
    assert json.loads((folder / "evaluation" / "test-last.json").read_text())["images"] == len(read.labels)


def test_nothing_is_tested_where_the_recipe_says_none(alone, tmp_path):
    folder = train_recipe(load_dict(recipe(tmp_path, train__epochs=2, data__test="none")))
    assert {path.name.partition("-")[0] for path in folder.glob("evaluation/*.json")} == {"validation"}
    with raises("data.split", "data.test: none"):
        evaluate_run(folder)
    tree = recipe(tmp_path, train__epochs=2, data__test="none", data__validation="none")
    folder = train_recipe(load_dict(tree))
    assert not (folder / "evaluation").exists() and (folder / "model" / "model.safetensors").is_file()
