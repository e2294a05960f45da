"""Figures from run folders: what is measured, that every picture is saved, and what is said of missing pieces."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from safetensors.numpy import save

from rescom_timm import metrics
from rescom_timm.analysis import confusion, curves, longtail, plots, reliability, schedule, style
from rescom_timm.analysis.run_files import Evaluation, Missing, RunFolder, open_runs
from rescom_timm.analysis.writing import pictures
from tests.analysis.made_up import add_evaluation, long_tail, make_run
from tests.raises import raises, warns

COUNTS = long_tail(8, 400, 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(make_run(tmp_path_factory.mktemp("runs") / "rescom", COUNTS))


def _evaluation(labels: list[int], predicted: list[int], counts: list[int] | None, k: int = 3) -> Evaluation:
    confidence = np.full(len(labels), 0.5, dtype=np.float32)
    known = None if counts is None else np.array(counts)
    return Evaluation("run", "test-last", np.array(labels), np.array(predicted), confidence, k, known, list("abc")[:k])


def test_every_figure_is_saved_with_its_numbers(run: RunFolder, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for drawn in plots.draw_all([run]):
        assert drawn.figure is not None and drawn.table is not None, drawn.missing
        png, svg, numbers = style.save(drawn.figure, drawn.table, tmp_path / "new" / drawn.name, dpi=40)
        assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text()
        with numbers.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(None not in row.values() for row in rows)
    assert dict(matplotlib.rcParams) == before
    assert len(list((tmp_path / "new").iterdir())) == 3 * len(plots.FROM_FILES)


def test_save_refuses_ragged_numbers(tmp_path: Path) -> None:
    with raises("plot.value", ".csv"):
        style.save(style.new_figure(1, 1), {"a": [1, 2], "b": [1]}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_confusion_counts_orders_by_training_count_and_keeps_the_unpredicted() -> None:
    found = confusion.measure(_evaluation([0, 0, 1, 1, 2], [0, 1, 1, -1, 0], [5, 500, 50]))
    images, single = confusion.shares(found, [np.array([c]) for c in range(3)])
    assert images.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]] and single.tolist() == [
        [50, 50, 0],
        [0, 50, 0],
        [100, 0, 0],
    ]
    assert found.order.tolist() == [1, 2, 0]
    assert found.groups.tolist() == ["few", "many", "medium"]
    table = confusion.table(found)
    rows = list(zip(table["label"], table["predicted"], table["images"], table["predicted_name"], strict=True))
    assert rows == [(0, 0, 1, "a"), (0, 1, 1, "b"), (1, -1, 1, "none"), (1, 1, 1, "b"), (2, 0, 1, "a")]


def test_confusion_blocks_stay_within_groups_and_shares_count_all_images() -> None:
    k = 1000
    labels = np.arange(k).repeat(2)
    evaluation = Evaluation("r", "test-last", labels, np.where(labels < 10, -1, labels), np.ones(2 * k, np.float32),
                            k, np.array(long_tail(k, 1280, 256)), [str(c) for c in range(k)])  # fmt: skip
    found = confusion.measure(evaluation)
    sizes = confusion._block_sizes(found, 100)
    assert sizes.sum() == k and len(sizes) <= 103 and sizes.max() <= 10
    edges = set(np.cumsum(sizes))
    assert {int((found.groups == "many").sum()), int((found.groups != "few").sum())} <= edges
    _, shares = confusion.shares(found, np.split(found.order, np.cumsum(sizes)[:-1]))
    assert shares[0].sum() == pytest.approx(100 * (1 - 10 / sizes[0]) if sizes[0] > 10 else 0)
    np.testing.assert_allclose(shares[1:].sum(axis=1), 100)
    assert confusion.draw(found).axes


def test_confusion_without_counts_and_with_a_class_never_tested() -> None:
    found = confusion.measure(_evaluation([0, 0], [0, 2], None))
    assert found.order.tolist() == [0, 1, 2]
    assert len(confusion.draw(found).axes) == 2  # matrix and colour bar, no groups


def test_reliability_is_the_recorded_ece(run: RunFolder) -> None:
    found = reliability.measure(run.evaluation())
    assert found.ece == pytest.approx(run.evaluation().numbers["ece"])
    assert found.count.sum() == len(run.evaluation().labels)


def test_longtail_is_ordered_and_agrees_with_the_record(run: RunFolder) -> None:
    evaluation = run.evaluation()
    found = longtail.measure(evaluation)
    assert (np.diff(found.counts) <= 0).all() and found.class_names[0] == "class 0"
    many = found.groups == "many"
    assert np.average(found.accuracy[many], weights=found.tested[many]) == pytest.approx(evaluation.numbers["many"])
    few = evaluation.counts < 20  # type: ignore[operator]
    assert evaluation.size("few") == (evaluation.tested[few].sum(), few.sum())
    assert found.intervals == evaluation.intervals and evaluation.recorded
    older = replace(evaluation, recorded={})  # an evaluation of 0.2.0
    assert {k: tuple(v) for k, v in evaluation.recorded.items() if k in older.intervals} == {
        k: v for k, v in older.intervals.items() if k in evaluation.recorded
    }
    untested = longtail.measure(_evaluation([0, 1], [0, 0], [1, 30, 200]))
    assert np.isnan(untested.accuracy[0]) and untested.accuracy[1:].tolist() == [0, 100]
    bottom = longtail.draw(untested).axes[1]
    assert [bar.get_facecolor()[:3] == (1, 1, 1) for bar in bottom.patches] == [True, True, True], "below ten images"
    means = [line for line in bottom.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in means] == [0, 100]  # of medium and of few; no class of many was tested
    with raises("plot.evaluation", "training counts", kind=Missing):
        longtail.measure(_evaluation([0], [0], None))


def _log(folder: Path, lines: list[str]) -> RunFolder:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return RunFolder(folder)


def test_curves_after_a_resume_and_a_crash(tmp_path: Path) -> None:
    rows = [(0, 1.0), (1, 0.9), (2, 0.8), (1, 0.5), (2, 0.4)]  # resumed from epoch 0
    lines = [json.dumps({"epoch": e, "step": 10 * e, "train/loss": loss, "note": "x"}) for e, loss in rows]
    (curve,) = curves.measure([_log(tmp_path / "a", [*lines, '{"epoch": 3, "tra'])])
    assert curve.axis == "epoch" and curve.x.tolist() == [0, 1, 2] and curve.y.tolist() == [1.0, 0.5, 0.4]
    with warns("line 2"):
        (curve,) = curves.measure([_log(tmp_path / "b", [lines[0], "{broken", lines[1]])])
    assert curve.x.tolist() == [0, 1]


def test_curves_in_percent_have_one_scale(tmp_path: Path) -> None:
    lines = [json.dumps({"epoch": e, "train/loss": 2.0, "train/top1": 20 + e, "test/few": 90 - e}) for e in range(3)]
    figure = curves.draw(curves.measure([_log(tmp_path / "a", lines)]))
    loss, *percents = (axes.get_ylim() for axes in figure.axes if axes.get_visible())
    assert len(percents) == 2 and percents[0] == percents[1] != loss
    assert percents[0][0] <= 20 and 90 <= percents[0][1] <= 101


@pytest.mark.parametrize(
    "splits", [["test"], ["test", "validation"], ["test", "test_ema", "validation", "validation_ema"]]
)
def test_curves_show_many_medium_and_few_however_many_splits_are_evaluated(tmp_path: Path, splits: list[str]) -> None:
    names = ("top1", "top5", "many", "medium", "few", "few_mean_class", "mean_class", "ece")
    numbers = {f"{split}/{name}": 50.0 for split in splits for name in names}
    train = {"train/loss": 2.0, "train/loss_contrast": 1.0, "train/top1": 30.0}
    run = _log(tmp_path / "a", [json.dumps({"epoch": e, **train, **numbers}) for e in range(2)])
    found = {curve.name for curve in curves.measure([run])}
    shown = {f"{split}/{name}" for split in splits for name in ("top1", "many", "medium", "few")}
    assert found >= {"train/loss", "train/top1", "train/loss_contrast", *shown}
    panels = {
        axes.get_title(loc="left"): axes for axes in curves.draw(curves.measure([run])).axes if axes.get_visible()
    }
    assert list(panels)[:3] == ["train/loss", "top1", "many, medium, few"] and len(panels) == 6
    groups = panels["many, medium, few"].lines
    assert len(groups) == 3 * len(splits) and len({line.get_color() for line in groups}) == 3
    assert len({line.get_linestyle() for line in groups}) == len(splits), "one line style a split"
    two = curves.draw(curves.measure([run, _log(tmp_path / "b", [json.dumps({"epoch": 0, **numbers})])]))
    names = {axes.get_ylabel() for axes in two.axes}
    assert {"many (percent)", "medium (percent)", "few (percent)"} <= names, "the runs have the colours"


def test_splits_of_one_panel_share_its_axis(tmp_path: Path) -> None:
    lines = [json.dumps({"epoch": e // 2, "step": e, "train/top1": 1.0}) for e in range(4)]
    lines += [json.dumps({"epoch": e, "step": 2 * e + 1, "test/top1": 5, "test/ece": 3}) for e in range(2)]
    found = {curve.name: curve.axis for curve in curves.measure([_log(tmp_path / "a", lines)])}
    assert found == {"train/top1": "step", "test/top1": "step", "test/ece": "epoch"}


def test_reliability_shows_intervals_and_counts_of_bins() -> None:
    count, confidence, accuracy = (np.array(values, float) for values in ([5, 0, 1200], [30, 0, 80], [20, 0, 90]))
    top, bottom = reliability.draw(reliability.Reliability("r", count, confidence, accuracy, ece=10.0)).axes
    assert [text.get_text() for text in bottom.texts] == ["5", "", "1,200"]
    many, few = top.containers
    assert (many.lines[0].get_xdata(), few.lines[0].get_xdata()) == ([80], [30]), "empty bins have no point"
    assert few.lines[0].get_markerfacecolor() == "white" != many.lines[0].get_markerfacecolor(), "below ten images"
    low, high = metrics.wilson(np.array([1.0]), np.array([5.0]))
    (segment,) = few.lines[2][0].get_segments()
    assert segment[:, 1] == pytest.approx([low[0], high[0]])


def test_curves_use_steps_where_an_epoch_has_several(tmp_path: Path) -> None:
    lines = [json.dumps({"epoch": e // 2, "step": e, "loss": 1.0, "test/top1": 5}) for e in range(4)]
    run = _log(tmp_path / "a", lines)
    assert {curve.axis for curve in curves.measure([run])} == {"step"}
    (line,) = curves.draw(curves.measure([run], ["test/top1"])).axes[0].lines
    assert list(line.get_xdata()) == [0, 1, 2, 3] and list(line.get_ydata()) == [5] * 4
    with raises("plot.log", "accuracy", kind=Missing):
        curves.measure([run], ["accuracy"])


def test_schedule_logged_planned_and_missing(run: RunFolder, tmp_path: Path) -> None:
    (curve,) = schedule.measure([run])
    assert curve.y[0] == pytest.approx(0.1) and len(curve.y) == 12
    rates = {"steps": [0.1, 0.01], "warm-up": [0.0, 0.1]}
    planned = [curves.Curve(name, "lr", "epoch", np.arange(2.0), np.array(y)) for name, y in rates.items()]
    linear, logarithmic = schedule.draw(planned).axes
    assert [line.get_ydata().tolist() for line in linear.lines] == [[0.1, 0.01], [0.0, 0.1]]
    assert logarithmic.get_yscale() == "log" and np.isnan(logarithmic.lines[1].get_ydata()[0])
    with raises("plot.log", kind=Missing):
        schedule.measure([_log(tmp_path / "a", ['{"epoch": 0, "loss": 1}'])])


def test_curves_of_several_runs_leave_out_the_one_without_a_log(run: RunFolder, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    add_bare = bare / "evaluation"
    add_bare.mkdir(parents=True)
    found = curves.measure([run, RunFolder(bare)])
    assert {curve.run for curve in found} == {"rescom"}


def test_default_evaluation_and_others_by_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", COUNTS, evaluation="validation-best")
    add_evaluation(folder, COUNTS, None, evaluation="test-best")
    run = RunFolder(folder)
    assert run.evaluation().name == "test-best"
    add_evaluation(folder, COUNTS, None, evaluation="test-last")
    assert run.evaluations()[:2] == ["test-last", "test-best"]
    assert run.evaluation("validation-best").name == "validation-best"
    with raises("plot.evaluation", "test-frist", kind=Missing):
        run.evaluation("test-frist")


def test_evaluation_without_its_json_still_shows_a_confusion(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    (folder / "evaluation" / "test-last.json").unlink()
    evaluation = RunFolder(folder).evaluation()
    assert evaluation.num_classes == 8 and evaluation.counts is None
    drawn = {figure.name: figure for figure in plots.draw_all([RunFolder(folder)])}
    assert drawn["confusion"].figure is not None and "training counts" in drawn["longtail"].missing


def test_json_that_does_not_fit_its_predictions_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    path = folder / "evaluation" / "test-last.json"
    record = json.loads(path.read_text())
    record["per_class"]["count"] = [1, 2]
    path.write_text(json.dumps(record))
    with raises("plot.evaluation", path.name):
        RunFolder(folder).evaluation()
    path.write_text("{")
    with pytest.raises(ValueError, match=path.name):
        RunFolder(folder).evaluation()


@pytest.mark.parametrize("kind", ["torn", "other"])
def test_predictions_that_cannot_be_read_are_told(tmp_path: Path, kind: str) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    path = folder / "evaluation" / "test-last.safetensors"
    path.write_bytes(path.read_bytes()[:40] if kind == "torn" else save({"labels": np.zeros(3, np.int64)}))
    with raises("plot.evaluation", "rescom-timm evaluate", kind=Missing):
        RunFolder(folder).evaluation()


@pytest.mark.parametrize(("file", "text"), [("recipe.yaml", "a: &x [1]\nb: *x"), ("environment.json", "[1]")])
def test_what_was_not_written_by_us_is_refused_in_a_line(tmp_path: Path, file: str, text: str) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(file)):
        (RunFolder(folder).recipe(), RunFolder(folder).environment())


def test_no_run_folder(tmp_path: Path) -> None:
    with raises("run.missing", "absent"):
        RunFolder(tmp_path / "absent")
    with raises("run.missing"):
        RunFolder(tmp_path)


def test_runs_of_one_folder_name_get_names_of_their_own(tmp_path: Path) -> None:
    paths = [_log(tmp_path / f"{name}", ["{}"]).path for name in ("a", "b")]
    assert [run.name for run in open_runs(paths)] == ["a", "b"]
    for name in ("a", "b"):
        _log(tmp_path / name / "seed0", ["{}"])
    assert [run.name for run in open_runs([p / "seed0" for p in paths])] == ["a/seed0", "b/seed0"]


def test_a_run_without_a_checkpoint_says_so(run: RunFolder) -> None:
    (drawn,) = plots.draw_all([run], ["tsne"])
    assert drawn.figure is None and "rescom" in drawn.missing and "data" in drawn.missing


def test_balanced_takes_turns_and_keeps_order() -> None:
    labels = [0] * 50 + [1] * 20 + [2] * 3
    rows = style.balanced(labels, 24, seed=1)
    assert (np.diff(rows) > 0).all() and np.bincount(np.array(labels)[rows]).tolist() == [11, 10, 3]
    assert style.balanced(labels, 1000).tolist() == list(range(73))


def test_unknown_figure_names_the_nearest(run: RunFolder) -> None:
    with raises("plot.name", "confusoin", "confusion"):
        list(plots.draw_all([run], ["confusoin"]))
    with raises("plot.name", "curves"):
        plots.check_names(["qqq"])


@pytest.mark.parametrize("name", ["cost $5 and $6", "_hidden", "two\nlines", "a" * 300, "<b>&"])
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    assert len(style.plain(name)) <= 30 and "\n" not in style.plain(name)
    pair, sure = np.array([0, 1]), np.ones(2, np.float32)
    found = longtail.measure(Evaluation(name, "test-last", pair, pair, sure, 2, np.array([200, 3]), [name, name]))
    style.save(longtail.draw(found), longtail.table(found), tmp_path / "x", dpi=40)
    assert not style.plain(name).startswith("_")


def test_groups_have_fixed_colours_and_order() -> None:
    names = metrics.group_of([3, 500, 50, 100, 20, 101])
    assert names.tolist() == ["few", "many", "medium", "medium", "medium", "many"]
    assert style.present(names) == ["many", "medium", "few"] == list(style.GROUP_COLORS)
    assert metrics.by_count([5, 9, 5]).tolist() == [1, 0, 2]


def test_what_trackers_are_sent_is_drawn_without_noise_and_without_what_the_run_lacks(tmp_path):
    run = make_run(tmp_path / "run", [120, 50, 5], ["猫", "犬", "梟"])
    drawn = pictures(run)  # warnings are errors here
    assert list(drawn) == [f"figures/{name}" for name in ("curves", "longtail", "confusion", "reliability")]
    assert all(picture.mode == "RGB" and min(picture.size) > 300 for picture in drawn.values())
    (run / "metrics.jsonl").unlink()
    assert list(pictures(run)) == list(drawn)[1:]
