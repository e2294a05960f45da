"""Metrics against torchmetrics, against hand-made cases, and for the rules that the Meter states."""

import gc
import json
import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as reference

from rescom_timm import metrics
from rescom_timm.analysis import robustness
from rescom_timm.metrics import Meter
from tests.raises import raises


def _batch(n: int = 400, k: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=generator)
    logits = 2 * torch.randn(n, k, generator=generator)
    logits[torch.arange(n), labels] += 1.5
    return logits, labels


def test_agrees_with_torchmetrics() -> None:
    logits, labels = _batch()
    meter = Meter(7, counts=[500, 200, 101, 100, 20, 19, 2])
    for part in range(0, 400, 150):
        meter.update(logits[part : part + 150], labels[part : part + 150])
    numbers = meter.compute()

    def accuracy(**options: object) -> torch.Tensor:
        return 100 * reference.multiclass_accuracy(logits, labels, num_classes=7, **options)

    assert numbers["top1"] == pytest.approx(float(accuracy(average="micro")), abs=1e-4)
    assert numbers["top5"] == pytest.approx(float(accuracy(average="micro", top_k=5)), abs=1e-4)
    assert numbers["mean_class"] == pytest.approx(float(accuracy(average="macro")), abs=1e-4)
    ece = 100 * reference.multiclass_calibration_error(logits.softmax(1), labels, num_classes=7, n_bins=15)
    assert numbers["ece"] == pytest.approx(float(ece), abs=1e-4)
    torch.testing.assert_close(meter.per_class()["accuracy"].float(), accuracy(average="none"))


def test_groups_have_the_literatures_borders() -> None:
    found = {name: classes.tolist() for name, classes in metrics.groups([101, 100, 20, 19, 5000, 0]).items()}
    assert found == {"many": [0, 4], "medium": [1, 2], "few": [3, 5]}
    assert list(metrics.groups([30, 40])) == ["medium"]
    found = {name: classes.tolist() for name, classes in metrics.groups([11, 10, 5, 4], (5, 10)).items()}
    assert found == {"many": [0], "medium": [1, 2], "few": [3]}
    assert metrics.group_rules((5, 10)) == {"many": "more than 10", "medium": "5 to 10", "few": "fewer than 5"}
    assert metrics.read_limits(None) == metrics.read_limits(["x", 3]) == (20, 100)
    assert metrics.read_limits([5, 10]) == (5, 10)


def test_group_accuracy_is_over_images_and_names_the_class_mean_where_it_differs() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])  # classes 0 and 1 (many) are not balanced, 2 and 3 (few) are
    predicted = torch.tensor([0, 0, 0, 0, 2, 2, 3, 0])
    meter = Meter(4, counts=[500, 400, 5, 4])
    meter.update(torch.eye(4)[predicted], labels)
    numbers = meter.compute()
    assert numbers["many"] == pytest.approx(75) and numbers["many_mean_class"] == pytest.approx(50)
    assert numbers["few"] == pytest.approx(75) and "few_mean_class" not in numbers
    assert not any(name.startswith("medium") for name in numbers)


def test_not_finite_rows_are_wrong_for_every_k() -> None:
    logits = torch.zeros(5, 6)
    logits[0] = math.nan  # every class "wins" an argmax over NaN
    logits[1, 2] = math.nan
    logits[2, 0] = math.inf
    logits[3] = -math.inf
    logits[4, 0] = 9.0
    meter = Meter(6)
    meter.update(logits, torch.zeros(5, dtype=torch.long))
    numbers = meter.compute()
    assert numbers["top1"] == pytest.approx(20) and numbers["top5"] == pytest.approx(20)
    assert numbers["invalid"] == pytest.approx(80)
    assert all(math.isfinite(value) for value in numbers.values())
    kept = meter.predictions()
    assert kept["predicted"].tolist() == [-1, -1, -1, -1, 0] and kept["confidence"][:4].sum() == 0


def test_minus_infinity_may_hide_a_class() -> None:
    meter = Meter(3)
    meter.update(torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([1]))
    assert meter.compute()["top1"] == 100 and "invalid" not in meter.compute()


def test_a_constant_output_is_right_for_k_classes_only() -> None:
    meter = Meter(20, topk=(1, 5))
    meter.update(torch.zeros(20, 20), torch.arange(20))
    numbers = meter.compute()
    assert numbers["top1"] == pytest.approx(5) and numbers["top5"] == pytest.approx(25)


def test_class_without_test_images_is_left_out_of_means() -> None:
    meter = Meter(4, counts=[200, 50, 5, 4])
    meter.update(torch.eye(4)[[0, 1, 0]], torch.tensor([0, 1, 1]))
    numbers = meter.compute()
    assert numbers["mean_class"] == pytest.approx(75)
    assert "few" not in numbers and all(math.isfinite(value) for value in numbers.values())
    record = meter.record()["per_class"]
    assert isinstance(record, dict)
    assert record["accuracy"] == [100, 50, None, None] and record["count"] == [200, 50, 5, 4]
    assert record["low"][2] is None and record["high"][0] == 100
    assert meter.sizes()["mean_class"] == {"images": 3, "classes": 2}
    assert meter.sizes()["medium"] == {"images": 2, "classes": 1}
    json.dumps(meter.record(), allow_nan=False)


def test_topk_that_cannot_fail_is_left_out() -> None:
    meter = Meter(3, topk=(1, 2, 3, 5))
    meter.update(torch.eye(3), torch.arange(3))
    assert [name for name in meter.compute() if name.startswith("top")] == ["top1", "top2"]


def test_update_makes_no_host_sync() -> None:
    # A meta tensor has no values: any step that would read one on the host raises.
    Meter(4, counts=[4, 3, 2, 1]).update(
        torch.empty(3, 4, device="meta"), torch.empty(3, dtype=torch.long, device="meta")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_half_precision_confidence_is_float32(dtype: torch.dtype) -> None:
    logits, labels = _batch()
    meter = Meter(7)
    meter.update(logits.to(dtype), labels.int())
    expected = logits.to(dtype).float().softmax(1).amax(1)
    torch.testing.assert_close(meter.predictions()["confidence"], expected)


def test_reset_and_gradients() -> None:
    logits, labels = _batch()
    meter = Meter(7)
    meter.update(logits.requires_grad_(), labels)
    assert not meter.predictions()["confidence"].requires_grad
    meter.reset()
    with raises("metric.empty"):
        meter.compute()


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1, 20, 0, 2], [9, 1, 30]])
def test_many_batches_count_as_one(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._Column, "first_size", 4)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sum(sizes), 6, generator=generator)
    labels = torch.randint(6, (len(logits),), generator=generator)
    whole, parts = Meter(6), Meter(6)
    whole.update(logits, labels)
    for part in torch.arange(len(logits)).split(sizes):
        parts.update(logits[part], labels[part])
    assert parts.compute() == whole.compute()
    for name, column in parts.predictions().items():
        assert torch.equal(column, whole.predictions()[name])
        assert column.untyped_storage().nbytes() == column.numel() * column.element_size(), "no more is saved"


def test_a_batch_leaves_no_tensor_of_its_own() -> None:
    """Four small ones of each batch cut up the heap: the process grew by 20 MB a batch of 256 with 10,000 classes."""
    meter, logits, labels = Meter(5), torch.randn(2, 5), torch.tensor([0, 1])
    meter.update(logits, labels)
    before = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    for _ in range(20):
        meter.update(logits, labels)
    assert sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()) == before


def test_bad_input_is_refused_in_words() -> None:
    with raises("metric.shape", "counts"):
        Meter(3, counts=[1, 2])
    with raises("metric.shape"):
        Meter(3, topk=(0,))
    with raises("metric.shape"):
        Meter(0)
    meter = Meter(3)
    with raises("metric.shape", "logits"):
        meter.update(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with raises("metric.shape", "logits"):
        meter.update(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with raises("metric.shape", "float32"):
        meter.update(torch.zeros(2, 3), torch.zeros(2))
    meter.update(torch.zeros(2, 3), torch.tensor([0, 3]))
    with raises("metric.labels", "0..2"):
        meter.compute()
    empty = Meter(3)
    empty.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with raises("metric.empty"):
        empty.compute()


def test_calibration_bins_include_their_upper_edge() -> None:
    confidence = torch.tensor([0.0, 0.5, 0.50001, 1.0])
    table = metrics.calibration(confidence, torch.tensor([False, True, False, True]), bins=2)
    assert table["count"].tolist() == [2, 2]
    torch.testing.assert_close(table["accuracy"], torch.tensor([50.0, 50.0], dtype=torch.float64))
    torch.testing.assert_close(
        table["confidence"], torch.tensor([25.0, 75.0005], dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert metrics.expected_calibration_error(torch.ones(8), torch.ones(8, dtype=torch.bool)) == 0


def _alexnet_errors() -> dict[str, list[float]]:
    return {kind: [error] * 5 for kind, error in robustness.ALEXNET_IMAGENET_C.items()}


def test_alexnet_has_an_mce_of_100() -> None:
    assert len(robustness.ALEXNET_IMAGENET_C) == 15
    assert robustness.mean_corruption_error(_alexnet_errors()) == pytest.approx(100)
    assert robustness.relative_mean_corruption_error(_alexnet_errors(), robustness.ALEXNET_CLEAN) == pytest.approx(100)


def test_mce_on_hand_made_errors() -> None:
    errors, baseline = {"fog": [10.0, 30.0], "snow": [40.0, 60.0]}, {"fog": 40.0, "snow": 50.0}
    assert robustness.corruption_errors(errors, baseline) == pytest.approx({"fog": 50.0, "snow": 100.0})
    assert robustness.mean_corruption_error(errors, baseline) == pytest.approx(75)
    # (20 - 10) / (40 - 20) and (50 - 10) / (50 - 20)
    assert robustness.relative_mean_corruption_error(errors, 10, baseline, 20) == pytest.approx((50 + 400 / 3) / 2)
    assert robustness.mean_error(errors) == pytest.approx(35)


def test_mce_refuses_other_kinds_and_severities() -> None:
    errors = _alexnet_errors()
    with raises("plot.baseline", "speckle_noise"):
        robustness.mean_corruption_error(errors | {"speckle_noise": [1.0] * 5})
    del errors["fog"]
    with raises("plot.baseline", "fog"):
        robustness.mean_corruption_error(errors)
    with raises("plot.baseline"):
        robustness.mean_corruption_error(errors | {"fog": [1.0]})
    with raises("plot.baseline", "fog"):
        robustness.relative_mean_corruption_error({"fog": [1.0]}, 0.5, {"fog": 10.0}, 10.0)
    with raises("metric.empty"):
        robustness.mean_error({})


def test_wilson_is_the_published_interval() -> None:
    low, high = metrics.wilson(np.array([81, 15, 0, 3, 0]), np.array([263, 148, 20, 3, 0]))
    # Newcombe 1998 (Statistics in Medicine 17, table I), method 3, four decimals.
    np.testing.assert_allclose(low[:3], [25.53, 6.24, 0.0], atol=0.005)
    np.testing.assert_allclose(high[:3], [36.62, 16.05, 16.11], atol=0.005)
    assert high[3] == 100 and low[3] == pytest.approx(43.85, abs=0.01)
    assert math.isnan(low[4]) and math.isnan(high[4])


def test_bootstrap_agrees_with_drawing_classes_and_images_one_by_one() -> None:
    generator = np.random.default_rng(3)
    total = generator.integers(1, 12, 40)
    correct = generator.binomial(total, generator.beta(4, 2, 40))
    images = [np.arange(n) < right for right, n in zip(correct, total, strict=True)]
    means = []
    for _ in range(500):
        drawn = [generator.choice(images[k], len(images[k])) for k in generator.integers(0, 40, 40)]
        means.append((np.concatenate(drawn).mean(), np.mean([part.mean() for part in drawn])))
    slow = 100 * np.quantile(means, [0.025, 0.975], axis=0)
    found = metrics.bootstrap(correct, total, draws=10_000)
    np.testing.assert_allclose(np.transpose([found["images"], found["classes"]]), slow, atol=2.0)
    alone = metrics.bootstrap(correct, total, classes=False)["images"]
    p, n = correct.sum() / total.sum(), total.sum()
    within = np.sqrt((correct * (1 - correct / total)).sum()) / n  # of a binomial in each class
    assert alone[1] - 100 * p == pytest.approx(
        max(196 * within, float(metrics.wilson(correct.sum(), n)[1]) - 100 * p), abs=1.0
    )


def test_intervals_at_the_ends_and_without_images() -> None:
    right = metrics.bootstrap(np.array([3, 3, 0]), np.array([3, 3, 0]))
    assert right["images"][1] == 100 and 60 < right["images"][0] < 62  # Wilson's of 6 of 6
    assert metrics.bootstrap(np.array([0]), np.array([0])) == {}
    assert metrics.intervals(np.array([0]), np.array([0]), np.array([5])) == {}
    found = metrics.intervals(torch.tensor([5, 2]), torch.tensor([9, 2]), torch.tensor([200, 4]))
    assert set(found) == {"top1", "mean_class", "many", "many_mean_class", "few", "few_mean_class"}
    assert set(metrics.intervals(np.array([5]), np.array([9]), None)) == {"top1", "mean_class"}


@pytest.mark.parametrize(
    ("classes", "images", "shape", "least"),
    [(30, 10, (6, 3), 0.95), (30, 1, (1.5, 0.5), 0.95), (10, 3, (6, 3), 0.95), (5, 10, (6, 3), 0.93)],
)
def test_intervals_cover_the_truth_of_simulated_classes(
    classes: int, images: int, shape: tuple[float, float], least: float
) -> None:
    """Accuracies of classes drawn from a beta distribution: the interval is to hold its mean."""
    generator, truth, held, alone = np.random.default_rng(0), 100 * shape[0] / sum(shape), 0, 0
    for _ in range(200):
        accuracy = generator.beta(*shape, classes)
        total = generator.integers(1, 2 * images, classes)
        correct = generator.binomial(total, accuracy)
        low, high = metrics.bootstrap(correct, total, draws=200)["classes"]
        held += low <= truth <= high
        low, high = metrics.bootstrap(correct, total, classes=False, draws=200)["classes"]
        alone += low <= 100 * accuracy.mean() <= high  # the images alone: of these classes
    assert held / 200 >= least - 0.015 and alone / 200 >= 0.935
