"""The HTML report and tools/figures.py: one file, offline, escaped, complete, and clear where something is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rescom_timm import metrics
from rescom_timm.analysis import confusion, longtail, pages, report, report_tables
from rescom_timm.analysis.run_files import Evaluation, RunFolder, open_runs
from rescom_timm.analysis.writing import write_figures
from rescom_timm.cli import plot as command
from tests.analysis.made_up import long_tail, make_run
from tests.raises import raises

COUNTS = long_tail(8, 400, 100)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(HTMLParser):
    """Checks that tags close in order, and collects text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return command


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    names = ["<script>alert(1)</script>", *[f"class & {c}" for c in range(1, 8)]]
    return [
        make_run(folder / "rescom", COUNTS, names),
        make_run(folder / "balanced_softmax", COUNTS, names, seed=1, skill=0.7),
    ]


def test_few_is_defined_once_in_report_and_card_alike(two_runs: list[Path]) -> None:
    text = _Page(report.page([RunFolder(path) for path in two_runs[:1]])).text
    assert text.count("fewer than 20") == 1 and metrics.groups_defined() in text and "under 20" not in text
    counts, labels = [200, 50, 5, 4], np.array([0, 1, 2, 2, 2, 3])
    predicted = np.array([0, 1, 3, 2, 2, 2])  # of the classes of few 2 of 4 images are right, 4 of 4 within the group
    meter = metrics.Meter(4, counts)
    meter.update(torch.eye(4)[predicted], torch.from_numpy(labels))
    tail = longtail.measure(
        Evaluation("r", "test-last", labels, predicted, np.ones(6, np.float32), 4, np.array(counts), "abcd")
    )
    few = tail.groups == "few"
    assert meter.compute()["few"] == np.average(tail.accuracy[few], weights=tail.tested[few]) == 50
    side = confusion.draw(confusion.measure(Evaluation("r", "t", labels, predicted, np.ones(6, np.float32), 4,
                                                       np.array(counts), "abcd"))).axes[1]  # fmt: skip
    assert "right or wrong" in side.get_title(loc="left") + side.get_title()


@pytest.mark.slow
def test_report_of_two_runs_side_by_side(two_runs: list[Path], tmp_path: Path) -> None:
    runs = open_runs(two_runs)
    page = _Page(report.write(runs, tmp_path / "new" / "report.html")[0].read_text(encoding="utf-8"))
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert all(address.startswith("data:image/png;base64,") for address in pictures)
    assert len(pictures) == 3 + 2 * 3
    assert page.tags.count("script") == 1, "its own, to which no name of a run or a class adds"
    assert "<script>alert(1)</script>" in page.text
    for expected in (
        "rescom",
        "balanced_softmax",
        "resnet32_cifar",
        "test-last",
        "a recipe & its <header>",
        "2.x <tag>",
    ):
        assert expected in page.text
    few = runs[0].evaluation().numbers["few"]
    assert f"{few:.1f}" in page.text
    assert "class & 7" in page.text and "the last epoch" in page.text


def test_summary_reads_recipe_and_numbers(two_runs: list[Path]) -> None:
    run = RunFolder(two_runs[1])
    line = report_tables.summary(run, run.evaluation())
    assert line["method"] == "rescom" and line["seed"] == "1" and line["epochs"] == "12"
    assert line["all"] == pytest.approx(run.evaluation().numbers["top1"])
    assert report_tables.summary(run, None)["all"] is None


def test_mean_and_deviation_over_seeds(two_runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "third", COUNTS, seed=2, epochs=13)
    again = make_run(tmp_path / "again", COUNTS, seed=1)
    runs = open_runs([*two_runs, other, again])  # two seeds of one setting, one of them twice, and another setting
    found = {run.name: run.evaluation() for run in runs}
    ((members, numbers),) = report_tables.over_seeds(runs, found)
    assert members == ["rescom", "balanced_softmax"]
    values = [found[name].numbers["few"] for name in members]
    assert numbers["few"] == pytest.approx((sum(values) / 2, abs(values[0] - values[1]) / 2**0.5))
    page = _Page(report.page(runs, drawn=[]))
    assert f"{numbers['few'][0]:.1f} \N{PLUS-MINUS SIGN} {numbers['few'][1]:.1f}" in page.text
    assert "sample standard deviation" not in _Page(report.page(runs[1:], drawn=[])).text


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    (folder / "evaluation").mkdir(parents=True)
    page = _Page(report.page([RunFolder(folder)]))
    for expected in ("no training log", "no evaluation", "No per-class table", "No recipe.yaml", "No environment.json"):
        assert expected in page.text
    assert [link for link in page.addresses if not link.startswith("#")] == []
    assert page.text.index("Not drawn") < page.text.rindex("no training log"), "told last"
    assert page.addresses == ["#groups", "#classes", "#recipes-and-versions", "#not-drawn"]


def test_the_contents_lead_to_every_section(two_runs: list[Path]) -> None:
    text = report.page(open_runs(two_runs))
    links = re.findall(r'<a href="#([\w-]+)">', text)
    assert re.findall(r'<h2 id="([\w-]+)">', text) == links
    assert links[:5] == ["conclusions", "groups", "confusion", "reliability", "learning-curves"]


def test_numbers_are_recomputed_where_the_json_is_absent(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    top1 = RunFolder(folder).evaluation().numbers["top1"]
    (folder / "evaluation" / "test-last.json").unlink()
    run = RunFolder(folder)
    line = report_tables.summary(run, run.evaluation())
    assert line["all"] == pytest.approx(top1) and line["many"] is None


def test_runs_of_other_classes_get_tables_of_their_own(two_runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", long_tail(4, 300, 30))
    text = report.page(open_runs([*two_runs, other]), drawn=[])
    assert text.count(">training images</th>") == 2


def test_tool_writes_pictures_and_report(tool: ModuleType, two_runs: list[Path], tmp_path: Path) -> None:
    assert tool.main([*map(str, two_runs), "--only", "reliability, report", "-o", str(tmp_path)]) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(
        [path.name for path in pages.files("report.html")]
        + [f"reliability-{run.name}.{kind}" for run in two_runs for kind in ("csv", "png", "svg")]
    )


def test_a_damaged_recipe_is_reported_before_anything_is_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    (folder / "recipe.yaml").write_text("a: [")
    with raises("file.format", "recipe.yaml"):
        next(write_figures([RunFolder(folder)], ["curves", "report"]))
    assert not (folder / "figures").exists()


def test_tool_puts_one_runs_pictures_into_the_run(tool: ModuleType, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    assert tool.main([str(folder), "--only", "schedule"]) == 0
    assert (folder / "figures" / "schedule.csv").is_file()


def test_tool_says_what_is_wrong(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "r", COUNTS)
    assert tool.main([str(folder), "--only", "reliabilty"]) == 1
    assert "[plot.name]: unknown plot 'reliabilty'; did you mean reliability?" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert tool.main([str(empty)]) == 1
    assert "is no run folder" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "absent")]) == 1
    assert "no run folder" in capsys.readouterr().err
    (folder / "metrics.jsonl").unlink()
    (folder / "environment.json").write_text(json.dumps([]))
    assert tool.main([str(folder), "--only", "curves,longtail"]) == 0
    assert "no curves: no training log" in capsys.readouterr().out
