"""The rules by which `init` and `fit` choose."""

import numpy as np
import pytest

from rescom_timm.config.own_rules import CONTRAST, default_backbones, method, rescom, row_for
from rescom_timm.methods.rescom import auto_negatives


@pytest.mark.parametrize(
    ("start", "is_cpu", "images", "kind", "epochs", "batch"),
    [
        ("weights", True, 20, "fine_tune", 10, 16),
        ("weights", True, 1_000, "fine_tune", 10, 32),
        ("weights", True, 1_001, "fine_tune", 5, 32),
        ("weights", True, 5_000, "fine_tune", 5, 32),
        ("weights", True, 5_001, "probe", 0, 32),
        ("weights", True, 10**7, "probe", 0, 32),
        ("weights", False, 20_000, "fine_tune", 30, 32),
        ("weights", False, 20_001, "fine_tune", 15, 32),
        ("weights", False, 10**7, "fine_tune", 8, 32),
        ("scratch", True, 3, "scratch", 100, 2),
        ("scratch", True, 1_000, "scratch", 100, 32),
        ("scratch", True, 1_001, "scratch", 100, 128),
        ("scratch", True, 20_001, "scratch", 30, 128),
        ("scratch", False, 200_000, "scratch", 200, 128),
        ("scratch", False, 200_001, "scratch", 100, 128),
    ],
)
def test_length_by_start_device_and_images(start, is_cpu, images, kind, epochs, batch):
    row = row_for(start, is_cpu, images)
    assert (row.kind, row.epochs, row.batch) == (kind, epochs, batch)


@pytest.mark.parametrize(
    ("counts", "start", "name", "views"),
    [
        ([149, 100], "scratch", "cross_entropy", 2),
        ([150, 100], "scratch", "balanced_softmax", 2),
        ([14, 10], "weights", "cross_entropy", 1),
        ([500, 0, 3], "weights", "balanced_softmax", 1),
        ([50] + [5] * (CONTRAST - 2), "scratch", "balanced_softmax", 2),
        ([50] + [5] * (CONTRAST - 1), "scratch", "rescom", None),
        ([50] + [5] * (CONTRAST - 1), "weights", "balanced_softmax", 1),
    ],
)
def test_method_by_imbalance_classes_and_start(counts, start, name, views):
    section, why = method(np.array(counts), start)
    assert section["name"] == name and section.get("views") == views and why.startswith("method: ")


@pytest.mark.parametrize(("classes", "q"), [(2, 10), (100, 10), (200, 5), (1_000, 4), (8_142, 4)])
def test_rescom_has_as_many_positives_as_keys_of_a_class(classes, q):
    section = rescom(np.full(classes, 50))
    assert section["queue"]["per_class"] == section["positives"] == q and section["beta"] == 0.999999
    assert 1 <= auto_negatives(classes, q) <= (classes - 1) * q
    assert rescom(np.full(classes, 101))["beta"] == 0.99


def test_default_backbones_by_device_and_minutes():
    names = [row.name for row in default_backbones("cpu", 20)]
    assert names[0] == "tf_efficientnet_lite0.in1k" and len(names) == 2
    assert [row.name.split("_")[1].split(".")[0] for row in default_backbones("cuda", 30)] == ["small", "tiny", "base"]
