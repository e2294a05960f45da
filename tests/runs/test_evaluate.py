"""Evaluation: every image once, on any number of processes; what is written and printed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rescom_timm.data.sources import load
from rescom_timm.runs import checkpoint
from rescom_timm.runs.evaluate import table
from rescom_timm.runs.recipe import load_dict
from tests.runs.child import recipe, run


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def finished(request, tmp_path_factory):
    """(recipe, folder) of a run; its test split has 500 images, which no batch of 64 divides."""
    tree = recipe(tmp_path_factory.mktemp("run"), train__epochs=1, schedule__warmup_epochs=0, evaluation__batch_size=64)
    run(tree, ranks=request.param)
    return load_dict(tree), Path(tree["output"]) / "run"


def test_every_image_is_evaluated_once_in_order(finished):
    made, folder = finished
    data = load(made.data)
    found = load_file(folder / "evaluation" / "test-last.safetensors")
    assert found["labels"].tolist() == data.test.labels.tolist()
    assert found["predicted"].shape == found["confidence"].shape == (500,)
    record = json.loads((folder / "evaluation" / "test-last.json").read_text())
    assert record["images"] == 500 and record["split"] == "digits test" and record["checkpoint"] == "last"
    assert "not selected" in record["chosen"]
    right = 100 * (found["predicted"] == found["labels"]).double().mean().item()
    assert json.dumps(record).count(f"{right:.3f}".rstrip("0")) >= 1 or right in json.dumps(record)


def test_it_is_the_saved_net_that_was_evaluated(finished):
    """The predictions on disk are those of the checkpoint's weights, its agreed BatchNorm statistics included."""
    from rescom_timm.data.loaders import eval_loader
    from rescom_timm.runs.build import build_method

    made, folder = finished
    data = load(made.data)
    method = build_method(made, data)
    method.net.load_state_dict(checkpoint.newest(folder / "checkpoints")[1])
    method.net.eval()
    with torch.no_grad():
        logits = torch.cat([method.net.classify(b["image"]) for b in eval_loader(data.test, made.views, 250)])
    found = load_file(folder / "evaluation" / "test-last.safetensors")
    assert (logits.argmax(dim=1) == found["predicted"]).float().mean() > 0.995  # ties of rounding aside
    np.testing.assert_allclose(logits.softmax(dim=1).amax(dim=1), found["confidence"], rtol=1e-4)


def test_table_lines_up_with_long_names_and_gaps():
    text = table({"test": {"top1": 12.345, "medium_mean_class": 1.0}, "validation": {"top1": 100.0}}).splitlines()
    assert len({len(line) for line in text}) == 1
    assert text[0].split() == ["top1", "medium_mean_class"]
    assert text[1].split() == ["test", "12.35", "1.00"] or text[1].split() == ["test", "12.34", "1.00"]
    assert text[2].split() == ["validation", "100.00", "-"]
