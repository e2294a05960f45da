"""What has changed between two starts of a fit."""

import pytest

from rescom_timm.config.loading import load
from rescom_timm.data.sources import load as load_data
from rescom_timm.fitting.inventory import changes, inventory

BEFORE = {"a.png": ["train", "cat", "10 1"], "b.png": ["test", "dog", "20 1"]}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({}, {}),
        ({"a.png": ["train", "cat", "11 1"]}, {"replaced": ["a.png"]}),
        ({"a.png": ["train", "dog", "10 1"]}, {"of another class": ["a.png"]}),
        ({"a.png": ["validation", "cat", "10 1"]}, {"in another split": ["a.png"]}),
        ({"c.png": ["test", "dog", "20 2"], "a.png": ["validation", "cat", "10 1"]}, {"added": ["c.png"]}),
    ],
)
def test_changes(now, expected):
    assert changes(BEFORE, BEFORE | now) == expected


def test_stored_images_and_files(tmp_path):
    """Images of a data set have no time of change: their bytes count."""
    file = tmp_path / "weights"
    file.write_text("w")
    data = load_data(load("digits_lt", ["data.index=step(100)"]).data)
    before = inventory(data, [str(file), None, "none"])
    assert len(before) == 1 + len(data.train.labels) + len(data.test.labels) and str(file) in before
    assert len({state for _, _, state in before.values()}) > 0.9 * len(before)
    file.write_text("v2")
    assert changes(before, inventory(data, [str(file), None, "none"])) == {"replaced": [str(file)]}
