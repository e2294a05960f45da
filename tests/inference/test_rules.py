"""Operating points and costs: against loops, closed forms and simulated classifiers; kept in exports; bad input."""

import argparse
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import rescom_timm
from rescom_timm.api import Run
from rescom_timm.cli import export, predict
from rescom_timm.cli import push as cli_push
from rescom_timm.cli.parts import evaluate
from rescom_timm.engine import logits
from rescom_timm.errors import CodedError
from rescom_timm.hub import push
from rescom_timm.inference.export import export_run
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.inference.rules import Costs, operating_point, price, read_costs
from rescom_timm.metrics import wilson
from tests.engine.made_up_run import COUNTS, NAMES, make_run
from tests.inference.test_decisions import calibrated_scores, pixels
from tests.raises import exits, raises

RARE = torch.tensor([0.6, 0.25, 0.1, 0.05])


def recall(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    return float((scores.argmax(dim=1) == labels)[labels == k].double().mean())


def test_the_threshold_is_the_order_statistic():
    """Nine images of b, r = .8: the ceil(10 * .8) = 8th easiest is still found, and no more."""
    margins = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 5.0])
    scores = torch.stack([margins, torch.zeros(9)], dim=1)
    point = operating_point(scores, torch.ones(9, dtype=torch.long), {"b": 0.8}, ["a", "b"])
    assert point.offsets.tolist() == pytest.approx([0, 0.8], abs=1e-5) and point.images == {"b": 9}
    assert point.decide(scores, scores.softmax(1)).tolist() == [1] * 8 + [0]
    easy = operating_point(scores - torch.tensor([9.0, 0]), torch.ones(9, dtype=torch.long), {"b": 0.8}, ["a", "b"])
    assert easy.offsets.tolist() == [0, 0], "a recall that is there costs nothing"


def test_the_recall_holds_over_many_draws_for_two_classes_at_once():
    new, labels = calibrated_scores(RARE, 8_000, seed=10_000)
    found = []
    for seed in range(40):
        point = operating_point(*calibrated_scores(RARE, 800, seed), {"fox": 0.8, "emu": 0.75}, NAMES)
        found.append([recall(new + point.offsets, labels, k) for k in (3, 2)])
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / 40**0.5
    assert (means >= np.array([0.8, 0.75]) - 4 * errors).all() and (means <= np.array([0.83, 0.78]) + 4 * errors).all()


def test_recalls_that_cannot_be():
    scores, labels = calibrated_scores(RARE, 800)
    seen = (labels != 3) | (torch.arange(800) < 60)
    few = int((labels[seen] == 3).sum())
    assert 0 < few < 9
    with raises("predict.calibration", "'fox'", 9, few):
        operating_point(scores[seen], labels[seen], {"fox": 0.9}, NAMES)
    with raises("predict.calibration", "'fox'", 0):
        operating_point(scores[labels != 3], labels[labels != 3], {"fox": 0.5}, NAMES)
    with raises("predict.classes", "'fxo'", "'fox'"):
        operating_point(scores, labels, {"fxo": 0.9}, NAMES)
    for wrong in (0, 1, -1, float("nan")):
        with raises("predict.value", "'fox'"):
            operating_point(scores, labels, {"fox": wrong}, NAMES)
    same = torch.zeros(800, 4)
    with raises("predict.calibration", "'cat'", "'dog'"):
        operating_point(same + torch.rand(800, 4), labels, {"cat": 0.9, "dog": 0.9}, NAMES)


def test_costs_decide_as_a_loop_does_and_a_tie_goes_to_the_most_probable():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(50, 4, generator=generator).softmax(1)
    rule = Costs(torch.rand(4, 4, generator=generator, dtype=torch.float64))
    expected = [
        min(range(4), key=lambda j: sum(float(p[i]) * float(rule.matrix[i, j]) for i in range(4)))
        for p in probabilities
    ]
    assert rule.decide(probabilities.log(), probabilities).tolist() == expected
    assert len(set(expected)) > 1
    plain = Costs(1 - torch.eye(4, dtype=torch.float64))
    assert plain.decide(probabilities, probabilities).equal(probabilities.argmax(1))
    assert (
        Costs(torch.zeros(4, 4, dtype=torch.float64))
        .decide(probabilities, probabilities)
        .equal(probabilities.argmax(1))
    )


TABLE = "true,fox,cat,emu,dog\nemu,1,2,0,3\nfox,0,9,9,9\ncat,1,0,1,1\ndog,1,1,1,0\n"


def test_costs_are_read_by_name_from_csv_and_json(tmp_path):
    (tmp_path / "c.csv").write_text(TABLE)
    rows = list(csv.reader(TABLE.splitlines()))
    tree = {row[0]: dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[1:]}
    (tmp_path / "c.json").write_text(json.dumps(tree))
    found = read_costs(tmp_path / "c.csv", NAMES).matrix
    assert found.tolist() == [[0, 1, 1, 1], [1, 0, 1, 1], [2, 3, 0, 1], [9, 9, 9, 0]]
    assert read_costs(tmp_path / "c.json", NAMES).matrix.equal(found)
    odd = ['a,"b" = c', " x", "y\nz"]
    (tmp_path / "odd.csv").write_text('t,"a,""b"" = c",x,"y\nz"\n"a,""b"" = c",0,1,2\n"y\nz",3,0,4\n x,5,6,0\n')
    assert read_costs(tmp_path / "odd.csv", odd).matrix.tolist() == [[0, 1, 2], [5, 6, 0], [3, 0, 4]]


@pytest.mark.parametrize(
    ("content", "suffix", "code", "naming"),
    [
        (TABLE.replace("\nfox", "\nfix"), "csv", "predict.classes", ["'fix'", "'fox'"]),
        (TABLE.replace("true,fox", "true,fix"), "csv", "predict.classes", ["'fix'", "'fox'"]),
        (TABLE.replace("\nfox", "\ncat"), "csv", "predict.classes", ["'cat'"]),
        (TABLE.replace("true,fox", "true,cat"), "csv", "predict.classes", ["'cat'"]),
        (TABLE.replace("fox,0,9,9,9\n", ""), "csv", "predict.classes", ["'fox'"]),
        ("\n".join(line.rpartition(",")[0] for line in TABLE.split("\n")), "csv", "predict.classes", ["'dog'"]),
        (TABLE.replace("9", "nan", 1), "csv", "predict.costs", ["'fox'", "nan"]),
        (TABLE.replace("9", "-inf", 1), "csv", "predict.costs", ["'fox'", "-inf"]),
        (TABLE.replace("9", "high", 1), "csv", "predict.costs", ["'fox'", "high"]),
        (TABLE.replace("9", "", 1), "csv", "predict.costs", ["'fox'"]),
        (TABLE.replace(",9\n", "\n"), "csv", "predict.costs", []),
        ("", "csv", "predict.costs", []),
        ("{", "json", "predict.costs", []),
        ("[1, 2]", "json", "predict.costs", []),
        ('{"cat": 1}', "json", "predict.costs", []),
        ('{"cat": {"cat": 0}, "cat": {"cat": 1}}', "json", "predict.classes", ["'cat'"]),
        ('{"cat": {"cat": 0, "cat": 1}, "dog": {}, "emu": {}, "fox": {}}', "json", "predict.classes", ["'cat'"]),
        ('{"cat": {"cat": 0, "dog": true, "emu": 1, "fox": 1}, "dog": {}, "emu": {}, "fox": {}}', "json",
         "predict.costs", ["'cat'", "True"]),
    ],
)  # fmt: skip
def test_costs_that_cannot_be(tmp_path, content, suffix, code, naming):
    path = tmp_path / f"c.{suffix}"
    path.write_text(content)
    with raises(code, path, *naming):
        read_costs(path, NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("rules") / "run", steps=(2,))
    for split, seed in (("validation", 0), ("test", 1)):
        keeper = logits.Keeper(800, 4)
        keeper.update(*calibrated_scores(RARE, 800, seed))
        keeper.write(logits.place(folder, f"{split}-last"))
    return folder


def test_the_price_is_counted(run):
    kept = logits.read(run, "test-last")
    rule = Run(run).operating_point({"fox": 0.9})
    found = price(rule, kept, NAMES, torch.tensor(COUNTS))
    told, plain = found.text, json.loads(json.dumps(found.record(), allow_nan=False))
    scores, labels = kept.whole()
    after = (scores + rule.offsets).argmax(1)
    for what, inside in (("recall", labels == 3), ("precision", after == 3)):
        right, n = int((labels == after)[inside].sum()), int(inside.sum())
        low, high = wilson(right, n)
        line = next(line for line in told.splitlines() if line.startswith(f"{what} of 'fox'"))
        assert line.endswith(f"-> {100 * right / n:.1f}% ({int(low)}-{int(-(-high // 1))}; n {n})")
        assert plain[what]["fox"][1] == {"right": right, "images": n, "low": float(low), "high": float(high)}
    lost = int(((scores.argmax(1) == labels) & (after != labels))[labels == 0].sum())
    assert f"'cat' {lost} of {int((labels == 0).sum())}" in told
    assert plain["lost"]["cat"] == {"lost": lost, "images": int((labels == 0).sum())}
    top1 = {name: 100 * float((one == labels).double().mean()) for name, one in
            (("most probable class", scores.argmax(1)), ("by the rule", after))}  # fmt: skip
    assert {name: numbers["top1"] for name, numbers in plain["numbers"].items()} == pytest.approx(top1)


def test_a_price_without_images_is_plain_json(run):
    kept = logits.read(run, "test-last")
    some = kept.labels != 3
    kept = logits.Logits(kept.labels[some], kept.values[some], 4)
    plain = price(Run(run).operating_point({"fox": 0.9}), kept, NAMES).record()
    assert json.loads(json.dumps(plain, allow_nan=False))["recall"]["fox"][0]["low"] is None


def test_evaluate_and_predict_write_prices(run, tmp_path, monkeypatch):
    meter = logits.read(run, "test-last").judged(torch.tensor(COUNTS))
    words = dict.fromkeys(("prior", "temperature", "costs")) | {"checkpoint": "last", "weights": "raw", "split": "test"}
    evaluate.decided(argparse.Namespace(**words, recall={"fox": 0.8}), run, "test-last", meter, NAMES)
    found = json.loads((run / "evaluation" / "price" / "test-last.json").read_text())
    assert found["validation"]["images"] == found["test-last"]["images"] == 800 and "'fox'" in found["rule"]
    Image.fromarray(pixels(1)[0]).save(tmp_path / "x.png")
    assert predict.main([str(run), f"{tmp_path}/x.png", "-o", f"{tmp_path}/p.csv", "--recall", "fox=0.8"]) == 0
    assert json.loads((tmp_path / "p-price.json").read_text())["validation"] == found["validation"]


def test_the_export_keeps_the_point_and_predict_uses_it(run, tmp_path, capsys):
    point = Run(run).operating_point({"fox": 0.75, "emu": 0.7})
    assert export.main([str(run), "-o", str(tmp_path / "m"), "--recall", "fox=0.75", "--recall", "emu=0.7"]) == 0
    model = from_pretrained(tmp_path / "m")
    assert model.operating_point.recall == {"fox": 0.75, "emu": 0.7} and model.temperature is not None
    assert model.operating_point.offsets.equal(point.offsets) and model.operating_point.images == point.images
    images = pixels(40)
    found = rescom_timm.predict(model, images, rule=point)
    scores = model.net.classify(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).float()
    assert [one.decision for one in found] == [NAMES[k] for k in (scores + point.offsets).argmax(1)]
    assert {one.decision for one in rescom_timm.predict(model, images)} == {None}
    Image.fromarray(images[0]).save(tmp_path / "x.png")
    capsys.readouterr()
    assert predict.main([str(tmp_path / "m"), str(tmp_path / "x.png"), "-o", str(tmp_path / "p.csv")]) == 0
    assert "recall of 'fox' at least 0.75" in capsys.readouterr().out
    with (tmp_path / "p.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["decision"] == found[0].decision
    details = tmp_path / "m" / "rescom.json"
    good = json.loads(details.read_text())
    card = (tmp_path / "m" / "README.md").read_text()
    assert "fox" in card[card.index("decision rule") :].splitlines()[0]
    for wrong in ({"offset": float("inf")}, {"number": 4}, {"recall": 1}, {"images": None}):
        details.write_text(json.dumps(good | {"operating_point": [good["operating_point"][0] | wrong]}))
        with pytest.warns(UserWarning, match="rescom.json"), pytest.raises(CodedError) as caught:
            from_pretrained(tmp_path / "m")
        assert caught.value.code.startswith("model.")


def test_the_export_keeps_costs_and_predict_uses_them(run, tmp_path):
    (tmp_path / "c.csv").write_text(TABLE)
    Image.fromarray(pixels(1)[0]).save(tmp_path / "x.png")
    assert export.main([str(run), "-o", str(tmp_path / "m"), "--costs", str(tmp_path / "c.csv")]) == 0
    assert from_pretrained(tmp_path / "m").rule.matrix.equal(read_costs(tmp_path / "c.csv", NAMES).matrix)
    rows = []
    for model, words in ((tmp_path / "m", []), (run, ["--costs", str(tmp_path / "c.csv"), "--temperature", "fitted"])):
        path = tmp_path / "p.csv"
        if not words or from_pretrained(run).temperature is not None:
            assert predict.main([str(model), str(tmp_path / "x.png"), "-o", str(path), *words]) == 0
            rows.append(path.read_text())
    assert len(set(rows)) == 1
    details = tmp_path / "m" / "rescom.json"
    good = json.loads(details.read_text())
    for wrong in ([[0.0]], [[float("nan")] * 4] * 4, [1, 2], "no"):
        details.write_text(json.dumps(good | {"costs": wrong}))
        with pytest.warns(UserWarning, match="rescom.json"), pytest.raises(CodedError) as caught:
            from_pretrained(tmp_path / "m")
        assert caught.value.code.startswith("model.")
    with raises("predict.costs", "2,001"):
        Costs(torch.zeros(2001, 2001)).record()


def test_a_push_keeps_a_rule_and_refuses_one_that_cannot_be_before_the_network(run, monkeypatch):
    sent = {}
    monkeypatch.setattr(push, "push", lambda folder: sent.update(json.loads(
        (push.staged(folder)[0] / "upload" / "rescom.json").read_text())) or {"url": "there"})  # fmt: skip
    assert cli_push.main([str(run), "--repo", "me/m", "--recall", "fox=0.75"]) == 0
    assert sent["operating_point"] == Run(run).operating_point({"fox": 0.75}).record()
    with raises("predict.calibration", "'fox'"):
        Run(run).push("me/m", recall={"fox": 0.9999})
    assert not push.staged(run)
    with exits(2):
        cli_push.main([str(run), "--recall", "fox=0.75", "--costs", "c.csv"])


def test_the_commands_refuse_what_cannot_be(run, tmp_path, capsys):
    twice = ["--recall", "fox=.9", "--recall", "fox=.8"]
    single = (["--recall", text] for text in ("fox", "fox=1", "=0.9", "fox=x"))
    for words in (*single, twice, ["--recall", "fox=.9", "--costs", "c.csv"]):
        with exits(2):
            predict.main([str(run), "x.png", *words])
    with exits(2):
        export.main([str(run), "--format", "onnx", "--recall", "fox=.9"])
    assert export.main([str(run), "-o", str(tmp_path / "m"), "--recall", "a=b,c=0.9"]) == 1
    assert "error[predict.classes]" in (told := capsys.readouterr().err) and "'a=b,c'" in told
    assert not (tmp_path / "m" / "rescom.json").exists()
    plain = make_run(tmp_path / "plain", steps=(2,))
    for words in (["--recall", "fox=.9"], ["--costs", str(tmp_path / "c.csv")]):
        assert predict.main([str(plain), "x.png", *words]) == 1
    told = capsys.readouterr().err
    assert "error[data.split]" in told and "error[predict.value]" in told
    with raises("data.split", plain):
        export_run(plain, tmp_path / "p", recall={"fox": 0.9})
    folder = export_run(run, tmp_path / "e")
    assert predict.main([str(folder), "x.png", "--recall", "fox=.9"]) == 1
    assert "error[run.missing]" in capsys.readouterr().err


def test_the_mean_cost_has_an_interval_and_falls_where_probabilities_are_right(run, tmp_path):
    (tmp_path / "c.csv").write_text(TABLE)
    kept = logits.read(run, "test-last")
    scores, labels = kept.whole()
    rule = read_costs(tmp_path / "c.csv", NAMES)
    shift = RARE.log()
    priced = price(rule, kept, NAMES, shift=shift)
    told = priced.text
    likely = (scores + shift).softmax(1)
    paid = [rule.paid(labels, one) for one in (likely.argmax(1), rule.decide(scores, likely))]
    first, second, difference = (
        float(f"{x:.4g}") for x in (paid[0].mean(), paid[1].mean(), (paid[1] - paid[0]).mean())
    )
    line = told.splitlines()[-1]
    assert f" {first:g} (" in line and f"-> {second:g} (" in line and f"difference {difference:g} (" in line
    low, high = map(float, line.rpartition("95%: ")[2].rstrip(")").split(" to "))
    deviation = float(np.std(paid[1] - paid[0])) / 800**0.5
    assert (low, high) == pytest.approx(
        (difference - 1.96 * deviation, difference + 1.96 * deviation), abs=0.2 * deviation
    )
    assert second < first
    assert priced.record()["cost"]["difference"]["value"] == pytest.approx(second - first, abs=1e-3)
