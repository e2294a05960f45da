"""Priors by EM, temperature, abstention: against closed forms and simulated classifiers."""

import json
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import rescom_timm
from rescom_timm.api import train_recipe
from rescom_timm.cli import evaluate as evaluate_command
from rescom_timm.config.loading import load_dict
from rescom_timm.engine import logits
from rescom_timm.engine.evaluate import evaluate_run
from rescom_timm.inference.decisions import coverage_table, estimated_prior, fitted_temperature
from rescom_timm.inference.export import export_run
from rescom_timm.inference.predict import Reader
from rescom_timm.inference.pretrained import from_pretrained
from tests.engine.child import recipe
from tests.engine.made_up_run import COUNTS, NAMES, make_run
from tests.raises import raises


def calibrated_scores(prior: torch.Tensor, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of even classes of a classifier that is calibrated: x = e_y + noise of deviation .6, s = log p(x | y)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(prior, n, replacement=True, generator=generator)
    x = torch.eye(len(prior))[labels] + 0.6 * torch.randn(n, len(prior), generator=generator)
    return x / 0.36, labels


PRIOR = torch.tensor([0.55, 0.25, 0.12, 0.06, 0.02])


def test_em_finds_the_prior_and_the_maximum_of_the_likelihood():
    scores, labels = calibrated_scores(PRIOR, 4000)
    found = estimated_prior(scores)
    assert float((found - PRIOR).abs().max()) < 0.03 and float(found.sum()) == pytest.approx(1)
    even = scores.softmax(1).double()

    def loss(x: np.ndarray) -> float:  # of the mixture, over the simplex
        return -float((even @ torch.softmax(torch.from_numpy(x), 0)).log().mean())

    best = np.exp(minimize(loss, np.zeros(5)).x)
    np.testing.assert_allclose(found, best / best.sum(), atol=1e-3)
    with_prior = ((scores + found.log()).argmax(1) == labels).double().mean()
    assert with_prior > (scores.argmax(1) == labels).double().mean() + 0.02


def test_em_warns_with_few_images():
    with pytest.warns(UserWarning, match="199 images"):
        estimated_prior(calibrated_scores(PRIOR, 199)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimated_prior(calibrated_scores(PRIOR, 200)[0])


def test_the_temperature_is_found_whatever_the_prior_of_the_images():
    for prior in (PRIOR, torch.full((5,), 0.2)):
        scores, labels = calibrated_scores(prior, 6000)
        assert fitted_temperature(scores * 1.7, labels) == pytest.approx(1.7, rel=0.06)
    scores, labels = calibrated_scores(PRIOR, 6000)
    seen = labels != 4  # a class without validation images
    assert 0.9 < fitted_temperature(scores[seen], labels[seen]) < 1.1
    sure = 4 * torch.eye(5)[:3]  # three images, all right
    assert fitted_temperature(sure, torch.arange(3)) > 0.5
    with raises("predict.calibration"):
        fitted_temperature(scores[:0], labels[:0])


def test_abstention_says_of_each_group_what_is_kept_and_wrong():
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    right = np.array([True, False, True, True, False])
    rows = coverage_table(confidence, right, np.array([0, 0, 0, 1, 1]), np.array([200, 5]), kept=(1.0, 0.8))
    assert [(row["kept"], row["group"]) for row in rows] == [
        (100, "all"), (100, "many"), (100, "few"), (80, "all"), (80, "many"), (80, "few"),
    ]  # fmt: skip
    whole, few = rows[3], rows[5]
    assert (whole["share"], whole["risk"], whole["threshold"]) == (80, 25, 0.6)
    assert (few["share"], few["risk"], few["images"]) == (50, 0, 1) and few["low"] == 0 and few["high"] > 70


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("model") / "run", steps=(2,))
    scores, labels = calibrated_scores(torch.tensor([0.7, 0.2, 0.05, 0.05]), 3000)
    keeper = logits.Keeper(3000, 4)
    keeper.update(1.5 * scores, labels)
    keeper.write(logits.place(folder, "validation-last"))
    return folder


def pixels(n):
    return list(np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))


def test_the_export_keeps_the_temperature(run, tmp_path):
    model = from_pretrained(export_run(run, tmp_path / "model"))
    assert model.temperature == pytest.approx(1.5, rel=0.05)
    found = rescom_timm.predict(model, pixels(3), top_k=4, temperature="fitted")
    scores = torch.from_numpy(np.stack(pixels(3))).permute(0, 3, 1, 2)
    expected = (model.net.classify(scores) / model.temperature).softmax(1)
    for one, row in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(row[[NAMES.index(name) for name in one.labels]].tolist(), abs=1e-5)
    details = tmp_path / "model" / "rescom.json"
    details.write_text(json.dumps(json.loads(details.read_text()) | {"temperature": -1}))
    with pytest.warns(UserWarning, match="rescom.json"), raises("model.details", "temperature"):
        from_pretrained(tmp_path / "model")


def test_the_prior_of_the_images_is_estimated_and_used(run, tmp_path):
    model = from_pretrained(export_run(run, tmp_path / "model"))
    images = pixels(40)
    with pytest.warns(UserWarning, match="40 images"):
        reader = Reader(model, images, "estimate")
    assert reader.temperature == model.temperature
    scores = model.net.classify(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).float()
    with pytest.warns(UserWarning, match="40 images"):
        expected = estimated_prior(scores, model.temperature)
    torch.testing.assert_close(reader.prior, expected, atol=1e-5, rtol=1e-4)
    found = torch.cat([batch.probabilities for batch in reader.batches()])
    torch.testing.assert_close(found, (scores / model.temperature + expected.log()).softmax(1).float())


def test_evaluate_judges_the_kept_logits_anew(alone, tmp_path, capsys):
    run = train_recipe(load_dict(recipe(tmp_path, train__epochs=2)))
    meter = evaluate_run(run)[2]
    scores = torch.cat([values for values, _ in logits.read(run, "test-last").batches()])
    labels = meter.predictions()["labels"]
    prior = tmp_path / "prior.txt"
    prior.write_text("9 1 1 1 1 1 1 1 1 1")
    words = [str(run), "--prior", str(prior), "--temperature", "2", "--abstain"]
    capsys.readouterr()
    assert evaluate_command.main(words) == 0
    told = capsys.readouterr().out
    shift = torch.tensor([9.0] + [1.0] * 9).log()
    top1 = 100 * float(((scores / 2 + shift).argmax(1) == labels).double().mean())
    after = told.split("the same with temperature 2")[1]
    assert f" {top1:.2f} " in after.splitlines()[1] and "surest 80%" in after and "few" in after
    assert evaluate_command.main([str(run), "--prior", "estimate", "--temperature", "fitted"]) == 0
    assert "prior estimate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate_command.main([str(run), "--temperature", "-1"])


def test_temperatures_that_cannot_be(run, tmp_path):
    model = from_pretrained(export_run(run, tmp_path / "model"))
    for wrong in (0, -1.0, float("nan"), "hot"):
        with raises("predict.value", "temperature"):
            rescom_timm.predict(model, pixels(1), temperature=wrong)
    plain = make_run(tmp_path / "plain", steps=(2,))
    with raises("predict.value", "temperature"):
        rescom_timm.predict(export_run(plain, tmp_path / "p"), pixels(1), temperature="fitted")
    assert len(COUNTS) == 4
