"""Figures of classes and galleries of mistakes, against numbers worked out by hand."""

import numpy as np
import pytest

from rescom_timm.analysis import classes, mistakes
from rescom_timm.analysis.run_files import Evaluation, Missing
from tests.raises import raises


def evaluation(labels: list[int], predicted: list[int], k: int) -> Evaluation:
    arrays = [np.array(values, dtype=np.int64) for values in (labels, predicted)]
    return Evaluation("run", "test-last", *arrays, np.ones(len(labels)), k, None, [str(c) for c in range(k)])  # type: ignore[call-arg]


def test_recall_precision_f1_and_confusions_of_each_class() -> None:
    found = classes.measure(evaluation([0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 2, 1, 0, 0, 0, -1], 4))
    assert found.accuracy[:3].tolist() == [50.0, 50.0, 0.0] and np.isnan(found.accuracy[3])
    assert found.precision[:3].tolist() == [40.0, 50.0, 0.0] and np.isnan(found.precision[3])
    assert found.f1[:3] == pytest.approx([100 * 4 / 9, 50.0, 0.0]) and np.isnan(found.f1[3])
    assert found.confused.tolist() == [2, 0, 0, -1]
    assert found.taken.tolist() == [1, 1, 2, 0] and found.overall == pytest.approx(100 * 3 / 9)


def test_classes_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 30, 4000)
    predicted = np.where(rng.random(4000) < 0.6, labels, rng.integers(0, 30, 4000))
    found = classes.measure(evaluation(labels.tolist(), predicted.tolist(), 30))
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted)
    for ours, theirs in ((found.precision, precision), (found.accuracy, recall), (found.f1, f1)):
        assert ours == pytest.approx(100 * theirs)


PROBABILITIES = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.0, 0.55, 0.45]])
LABELS = np.array([0, 0, 1, 1, 2])
JUDGED = mistakes.Judged(LABELS, PROBABILITIES.argmax(axis=1), PROBABILITIES.max(axis=1))


def test_the_most_confident_mistakes_come_first() -> None:
    assert mistakes.most_confident(JUDGED, 3).tolist() == [1, 3, 2]
    assert mistakes.of_class(JUDGED, 1, 4).tolist() == [3, 2]
    assert mistakes.of_class(JUDGED, 0, 4).tolist() == [1]
    invalid = JUDGED._replace(predicted=np.array([0, -1, 0, 2, 1]))
    assert mistakes.most_confident(invalid, 3).tolist() == [3, 2, 4], "an output that is no number is no prediction"


def test_a_gallery_has_rows_a_table_and_a_picture() -> None:
    image = np.zeros((9, 7, 3), np.uint8)
    tiles = [mistakes.tile(image, 10 + i, JUDGED, i, ["a", "b$", "<c>"]) for i in (1, 3, 2)]
    gallery = mistakes.grid("title", tiles, columns=2)
    assert [len(row) for row in gallery.rows] == [2, 1]
    table = mistakes.table(gallery)
    assert table["row"] == [11, 13, 12] and table["predicted"] == ["b$", "<c>", "a"]
    assert table["confidence_percent"] == pytest.approx([80.0, 70.0, 60.0])
    figure = mistakes.draw(gallery)
    assert len(figure.axes) == 4 and sum(bool(axes.images) for axes in figure.axes) == 3
    with raises("plot.no_mistakes", kind=Missing):
        mistakes.grid("title", [])
