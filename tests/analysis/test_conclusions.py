"""The sentences that the report begins with: true of hand-made evaluations."""

import numpy as np

from rescom_timm.analysis import report
from rescom_timm.analysis.conclusions import conclusions
from rescom_timm.analysis.run_files import Evaluation, RunFolder
from tests.analysis.made_up import make_run


def evaluation(right: list[int], tested: list[int], counts: list[int] | None, confidence: float = 0.6) -> Evaluation:
    """Wrong images are taken for class 0, those of class 0 for class 1."""
    labels = np.repeat(np.arange(len(tested)), tested)
    pairs = enumerate(zip(right, tested, strict=True))
    predicted = np.concatenate([np.where(np.arange(n) < r, k, int(k == 0)) for k, (r, n) in pairs])
    names = ["cat", "dog", "emu", "fox"][: len(tested)]
    given = None if counts is None else np.array(counts)
    confidences = np.full(len(labels), confidence, np.float32)
    return Evaluation("a", "test-last", labels, predicted, confidences, len(tested), given, names)


def test_rare_classes_below_and_above_the_accuracy_are_named_with_what_they_are_taken_for() -> None:
    told = conclusions(evaluation([38, 35, 1, 2], [40, 40, 30, 4], [400, 200, 9, 3], confidence=0.9))
    assert told[0].startswith("66.7% of 114 images are right (") and "the mean over 4 classes is 59.0%" in told[0]
    assert "few 8.8% (" in told[1] and "2 classes, 34 test images" in told[1]
    assert told[2].startswith(
        "1 of 2 classes of few have their whole 95% interval below the accuracy of all images (66.7%), where about 0.1 "
        "would by chance: emu (9 training images): "
    )
    assert told[2].endswith("1 of 30 right, 29 taken for cat.") and "fox" not in told[2], "4 images do not say so"
    above = conclusions(evaluation([20, 20, 30, 2], [40, 40, 30, 4], [400, 200, 9, 1], confidence=0.6))
    assert above[2].startswith("No class of few") and above[3] == "1 of 2 above it: emu (9 training images)."
    assert told[3].startswith("1 class has fewer than 10 test images:") and "too high" in told[4] and "90.0%" in told[4]


def test_what_is_not_known_is_not_said() -> None:
    told = conclusions(evaluation([6, 5], [10, 10], None, 0.55))
    assert len(told) == 1, "neither groups nor thin classes, and probabilities near the accuracy"
    told = conclusions(evaluation([7, 7, 0], [10, 10, 2], [300, 200, 4], 0.64))
    assert told[2].startswith("No class of few has its whole 95% interval below") and "1 class has fewer" in told[3]
    assert any("no test image" in text for text in conclusions(evaluation([9, 0], [10, 0], [300, 200])))


def test_the_report_begins_with_them(tmp_path) -> None:
    runs = [RunFolder(make_run(tmp_path / name, [300, 50, 5], seed=seed)) for seed, name in enumerate("ab")]
    text = report.page(runs, drawn=[])
    assert text.index("Conclusions") < text.index("Groups")
    assert f"b: {conclusions(runs[1].evaluation())[0].split('%')[0]}%" in text
