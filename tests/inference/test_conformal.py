"""Prediction sets, against closed forms and by simulation."""

import json

import pytest
import torch

from rescom_timm.inference.conformal import calibrated
from rescom_timm.inference.decisions import kept_sets, read_sets, sets_of
from tests.raises import raises

COUNTS = torch.tensor([500, 300, 50, 30, 10, 5])


def drawn(number: int, frequencies: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, labels) of a classifier that is sure of itself beyond its right, worse on rare classes."""
    labels = torch.multinomial(frequencies.float(), number, replacement=True, generator=generator)
    logits = torch.randn(number, 6, generator=generator, dtype=torch.float64)
    pull = torch.tensor([3.0, 2.5, 2.0, 1.5, 0.5, 0.2], dtype=torch.float64)[labels]
    logits[torch.arange(number), labels] += pull
    return (3 * logits).softmax(dim=1), labels


def test_the_threshold_is_the_order_statistic() -> None:
    """Nine images, c = .8: the ceil(10 * .8) = 8th smallest of 1 - p."""
    own = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4, 0.3, 0.1], dtype=torch.float64)
    sets = calibrated(torch.stack([own, 1 - own], dim=1), torch.zeros(9, dtype=torch.long), 0.8)
    assert sets.thresholds.tolist() == pytest.approx([0.7, 0.7])
    inside = sets.of(torch.tensor([[0.75, 0.25], [0.65, 0.35], [0.5, 0.5]]))
    assert inside.tolist() == [[True, False], [True, True], [True, True]]
    wide = torch.full((1, 10), 0.1)
    assert calibrated(torch.ones(9, 10), torch.zeros(9, dtype=torch.long), 0.8).of(wide).sum() == 1, "never empty"


def test_so_many_images_are_needed() -> None:
    labels = torch.zeros(8, dtype=torch.long)
    with raises("predict.calibration", 0.9, 9, 8):
        calibrated(torch.rand(8, 2), labels, 0.9)
    calibrated(torch.rand(9, 2), torch.zeros(9, dtype=torch.long), 0.9)
    for coverage in (0.0, 1.0, 1.5, float("nan")):
        with raises("predict.value", "coverage", f"{coverage:g}"):
            calibrated(torch.rand(9, 2), labels, coverage)


@pytest.mark.parametrize("coverage", [0.92, 0.95])  # above the accuracy: the most probable class adds nothing
def test_the_coverage_holds_over_many_draws(coverage: float) -> None:
    """The mean over 400 calibrations is between c and c + 1 / (n + 1), within four of its standard errors."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        sets = calibrated(*drawn(99, COUNTS, generator), coverage)
        probabilities, labels = drawn(500, COUNTS, generator)
        found.append(float(sets.of(probabilities).gather(1, labels[:, None]).float().mean()))
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 20
    assert coverage - 4 * error <= mean <= coverage + 0.01 + 4 * error
    assert error < 0.003


def test_by_group_it_holds_for_rare_classes_where_the_common_one_does_not() -> None:
    generator, few, common = torch.Generator().manual_seed(1), [], []
    even = torch.ones(6)
    for _ in range(200):
        known = drawn(400, even * COUNTS.clamp(min=60), generator)
        probabilities, labels = drawn(600, even, generator)  # evenly, as test sets are
        rare = labels >= 4
        for sets, kept in ((calibrated(*known, 0.8, COUNTS), few), (calibrated(*known, 0.8), common)):
            kept.append(float(sets.of(probabilities[rare]).gather(1, labels[rare][:, None]).float().mean()))
    few_mean, common_mean = torch.tensor(few).mean(), torch.tensor(common).mean()
    assert few_mean > 0.79 and common_mean < 0.72


def test_prevalence_adjusted_sets_cover_the_mean_over_classes_more_at_the_same_coverage() -> None:
    """Over 200 calibrations of a calibrated classifier with a long tail; the score is -p / pi, as in a loop."""
    pi = COUNTS.double() / COUNTS.sum()
    generator = torch.Generator().manual_seed(3)

    def images(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.multinomial(pi, number, replacement=True, generator=generator)
        noise = 0.7 * torch.randn(number, 6, generator=generator, dtype=torch.float64)
        return (torch.eye(6, dtype=torch.float64)[labels] + noise) / 0.49, labels

    found = []
    for _ in range(200):
        (known, true), (new, labels) = images(300), images(2000)
        row = []
        for kind in ("marginal", "prevalence"):
            sets = sets_of(known, true, 0.9, torch.zeros(6), kind, prior=pi)
            held = sets.of_logits(new, new).gather(1, labels[:, None]).flatten()
            row += [held.double().mean(), torch.stack([held[labels == k].double().mean() for k in range(6)]).nanmean()]
        found.append(row)
    means, errors = torch.tensor(found).mean(0), torch.tensor(found).std(0) / 200**0.5
    assert (means[0::2] >= 0.9 - 4 * errors[0::2]).all() and means[2] <= 0.92
    assert means[3] > means[1] + 0.02
    probabilities = (known + pi.log()).softmax(1)
    scores = sorted(-float(p[y]) / float(pi[y]) for p, y in zip(probabilities, true.tolist(), strict=True))
    inside = sets.of_logits(new, new)
    for row, answer in zip(inside, (new + pi.log()).softmax(1), strict=True):
        expected = [-float(p) / float(pi_k) <= scores[270] + 1e-6 for p, pi_k in zip(answer, pi, strict=True)]
        assert row.tolist() == [a or k == int((answer / pi).argmax()) for k, a in enumerate(expected)]
        if int(row.sum()) > 2:
            break


def test_an_export_keeps_the_same_sets() -> None:
    generator = torch.Generator().manual_seed(4)
    logits, labels = 3 * torch.randn(40, 6, generator=generator), torch.randint(0, 5, (40,), generator=generator)
    even = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = read_sets(json.loads(json.dumps(kept_sets(logits, labels, even, 1.7))), even, 1.7)
    assert set(found) == {(kind, c) for kind in ("marginal", "prevalence") for c in (0.8, 0.9, 0.95)}, "not .99 of 40"
    for (kind, coverage), sets in found.items():
        ours = sets_of(logits, labels, coverage, even, kind, 1.7 if kind == "prevalence" else 1.0)
        torch.testing.assert_close(sets.thresholds, ours.thresholds)
        torch.testing.assert_close(sets.shift, ours.shift)
        assert (sets.temperature, sets.guarantee) == (ours.temperature, ours.guarantee)
    kept = kept_sets(logits, labels, even, 1.7)
    for wrong in ({"prior": [1.0]}, {"prior": [0.0] * 6}, {"marginal": {"0.9": float("nan")}}):
        with raises("model.details"):
            read_sets(kept | wrong, even, 1.7)


def test_a_group_without_enough_images_is_told() -> None:
    generator = torch.Generator().manual_seed(2)
    probabilities, labels = drawn(300, COUNTS, generator)
    kept = (labels < 4) | (torch.arange(300) < 20)
    probabilities, labels = probabilities[kept], labels[kept]
    few = int((labels >= 4).sum())
    assert few < 9
    sets = calibrated(probabilities, labels, 0.9, COUNTS)
    assert f"few not guaranteed ({few} images, 9 are needed)" in sets.guarantee and "many on " in sets.guarantee
    common = calibrated(probabilities, labels, 0.9).thresholds[0]
    assert sets.thresholds[4] == sets.thresholds[5] == common and sets.thresholds[0] != common
