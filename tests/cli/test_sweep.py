"""rescom-timm sweep over the digits: its cells, what it skips and resumes, its table."""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rescom_timm.cli import sweep as command
from rescom_timm.cli.parts import sweep as grids
from rescom_timm.config.loading import load
from tests.recipes import UNDRAWN

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "recipes" / "digits_lt.yaml")
QUICK = [
    "+cross_entropy", "train.epochs=1", "schedule.warmup_epochs=0", "method.views=1", "train.batch_size=364", UNDRAWN,
    "net.backbone=resnet8_cifar",
]  # fmt: skip


@pytest.fixture(scope="module")
def sweep():
    return grids


def test_cells_are_every_combination_with_readable_names(sweep):
    grid = {"method.beta": ["0", "0.9"], "train.epochs": ["5"], "method.queue.kind": ["fifo", "reversed"]}
    found = sweep.cells(["recipes/digits_lt.yaml"], grid, [0, 3])
    assert len(found) == 8 and len({cell.name for cell in found}) == 8
    assert found[0].name == "digits_lt-beta=0-queue.kind=fifo-seed=0"
    assert [cell.seed for cell in found] == [0] * 4 + [3] * 4
    assert found[5].overrides == ("method.beta=0", "train.epochs=5", "method.queue.kind=reversed")
    recipe = sweep.cells([str(ROOT / "recipes" / "digits_lt.yaml")], grid, [3])[-1].load(Path("somewhere"))
    assert (recipe.seed, recipe.method.beta, recipe.method.queue.kind) == (3, 0.9, "reversed")
    assert (recipe.output, recipe.name) == ("somewhere", "digits_lt-beta=0.9-queue.kind=reversed-seed=3")


def test_values_are_cut_at_commas_outside_brackets(sweep):
    assert sweep.split("0,0.9, 0.99") == ["0", "0.9", "0.99"]
    assert sweep.split("crop(32,4) | flip,none") == ["crop(32,4) | flip", "none"]
    assert sweep.split("[3, 5],[7]") == ["[3, 5]", "[7]"]


def test_the_seed_stands_in_a_value_where_a_second_stage_wants_it(sweep, tmp_path):
    cell = sweep.cells(["digits_lt"], {"from": ["runs/x-seed={seed}"]}, [2], [["crt"]])[0]
    assert cell.load(tmp_path).init_from == "runs/x-seed=2" and cell.name == "digits_lt_crt-seed=2"


def test_a_sweep_trains_skips_resumes_and_ends_in_a_table(sweep, tmp_path, capsys):
    words = [DIGITS, *QUICK, "--output", str(tmp_path), "--seeds", "0,1"]
    assert command.main(words) == 0
    capsys.readouterr()
    first, second = (tmp_path / f"digits_lt_cross_entropy-seed={seed}" for seed in (0, 1))
    tops = [top1(folder) for folder in (first, second)]
    with (tmp_path / "sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["run"] == "digits_lt_cross_entropy" and row["seeds"] == "2"
    assert float(row["top1"]) == pytest.approx(sum(tops) / 2)
    assert float(row["minutes"]) == pytest.approx((minutes(first) + minutes(second)) / 2) and minutes(first) > 0
    assert float(row["top1_deviation"]) == pytest.approx(abs(tops[0] - tops[1]) / 2**0.5)
    assert all((tmp_path / f"sweep{ending}").stat().st_size > 1000 for ending in (".png", ".svg"))

    # A cell that was killed after its last save is resumed, the other is left as it is.
    (first / "evaluation" / "test-last.json").unlink()
    before = (second / "metrics.jsonl").stat().st_mtime_ns
    assert command.main(words) == 0
    told = capsys.readouterr().out
    assert told.count(": finished") == 1 and "resumed from step-00000001" in told
    assert (second / "metrics.jsonl").stat().st_mtime_ns == before
    assert top1(first) == tops[0]

    # Checkpoints of finished cells can be dropped: they stay finished, with figures and model.
    assert command.main([*words, "--lean"]) == 0
    assert capsys.readouterr().out.count(": finished") == 2
    assert not list(tmp_path.glob("*/checkpoints")) and len(list(tmp_path.glob("*/model/model.safetensors"))) == 2

    # A cell whose model could not be written, for the disk was full, is not finished.
    shutil.rmtree(first / "model")
    assert command.main(words) == 0
    assert capsys.readouterr().out.count(": finished") == 1 and (first / "model" / "rescom.json").is_file()

    # The table can be made again, and a finished run of other settings is not taken for this one.
    (tmp_path / "sweep.md").unlink()
    assert command.main(["--table", "--output", str(tmp_path)]) == 0
    assert "| digits_lt_cross_entropy | 2 |" in (tmp_path / "sweep.md").read_text()
    assert command.main([*words, "optimizer.lr=0.3"]) == 1
    error = capsys.readouterr().err
    assert "optimizer.lr" in error and "--output" in error


def top1(folder):
    return json.loads((folder / "evaluation" / "test-last.json").read_text())["numbers"]["top1"]


def minutes(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["seconds"] for line in lines if "seconds" in line][-1] / 60


def test_the_minutes_are_those_of_the_whole_training(sweep, tmp_path):
    (tmp_path / "a-seed=0" / "evaluation").mkdir(parents=True)
    (tmp_path / "a-seed=0" / "evaluation" / "test-last.json").write_text('{"numbers": {"top1": 50.0}}')
    lines = [{"epoch": epoch, "seconds": 90.0 * epoch} for epoch in (1, 2, 3)] + [{"epoch": 3, "test/top1": 50.0}]
    (tmp_path / "a-seed=0" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sweep.measure([(("a",), "a-seed=0")], tmp_path) == {("a",): [{"top1": 50.0, "minutes": 4.5}]}


@pytest.mark.slow
def test_a_cell_that_patience_ended_is_finished(sweep, tmp_path, capsys):
    words = [DIGITS, *QUICK, "--seeds", "0", "--lean", "--output", str(tmp_path), "train.epochs=9", "optimizer.lr=1e-9"]
    words += ["data.validation=unused(20)", "evaluation.every=1", "evaluation.patience=2"]
    assert command.main(words) == 0
    (figures,) = tmp_path.glob("*/metrics.jsonl")
    before = figures.read_text()
    assert 3 <= json.loads(before.splitlines()[-1])["epoch"] < 9
    capsys.readouterr()
    assert command.main(words) == 0
    assert ": finished" in capsys.readouterr().out and figures.read_text() == before


def test_settings_can_be_chosen_by_validation_rows(sweep, tmp_path):
    words = [DIGITS, *QUICK, "data.validation=unused(20)", "--seeds", "0", "--output", str(tmp_path)]
    assert command.main(words) == 0
    with (tmp_path / "sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    (folder,) = tmp_path.glob("*seed=0")
    *_, last = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    for figure in ("top1", "mean_class"):
        assert float(row[f"validation_{figure}"]) == pytest.approx(last[f"validation/{figure}"])
        assert float(row[figure]) == pytest.approx(last[f"test/{figure}"])
    assert row["validation_top1"] != row["top1"]


def test_the_table_has_a_row_for_each_setting_and_no_deviation_of_one_seed(sweep):
    rows = {
        ("a", "beta=0"): [{"top1": 50.0, "many": 80.0}, {"top1": 54.0, "many": 82.0}],
        ("a", "beta=0.9"): [{"top1": 61.5, "many": 90.0}],
    }
    text = sweep.markdown(sweep.summary(rows)).splitlines()
    assert text[0] == "| run | seeds | top1 | many |"
    assert text[2:] == ["| a beta=0 | 2 | 52.0 ± 2.8 | 81.0 ± 1.4 |", "| a beta=0.9 | 1 | 61.5 | 90.0 |"]


def test_intervals_and_images_of_a_figure_stand_in_the_table(sweep, tmp_path):
    folder = tmp_path / "a-seed=0" / "evaluation"
    folder.mkdir(parents=True)
    record = {"numbers": {"top1": 50.0, "few": 40.0}, "intervals": {"few": [31.5, 55.0]},
              "sizes": {"few": {"images": 38, "classes": 7}}}  # fmt: skip
    (folder / "test-last.json").write_text(json.dumps(record))
    table = sweep.summary(sweep.measure([(("a",), "a-seed=0")], tmp_path))
    numbers = table[0].numbers
    assert (numbers["few_low"], numbers["few_high"], numbers["few_n"]) == (31.5, 55.0, 38)
    assert sweep.markdown(table).splitlines()[::2] == [
        "| run | seeds | top1 | few (n 38) |",
        "| a | 1 | 50.0 | 40.0 (31-55) |",
    ]


@pytest.mark.parametrize("held", [[60.0, 70.0], [None, 70.0], [None, None]])
def test_validation_comes_first_and_is_drawn_where_there_is_one(sweep, held):
    rows = {
        (name,): [{"top1": test, "few": test} | ({} if value is None else {"validation_top1": value})]
        for name, test, value in zip("ab", (90.0, 50.0), held, strict=True)
    }
    table = sweep.summary(rows)
    head = sweep.markdown(table).splitlines()[0]
    assert head == "| run | seeds |" + " validation_top1 |" * any(held) + " top1 | few |"
    (axes,) = sweep.draw(table, "x").axes
    drawn = axes.lines[0].get_xdata()
    expected = held if any(held) else [90.0, 50.0]
    assert [None if value != value else value for value in drawn] == expected
    assert axes.get_xlabel().startswith("validation" if any(held) else "test")


def test_rows_are_ranked_by_validation_and_the_cheapest_near_the_best_is_proposed(sweep):
    rows = {
        ("slow",): [{"validation_few": n, "top1": 1.0, "minutes": 9.0} for n in (70.0, 72.0, 74.0)],
        ("quick",): [{"validation_few": n, "top1": 2.0, "minutes": 3.0} for n in (70.5, 71.0, 71.5)],
        ("bad",): [{"validation_few": n, "top1": 99.0, "minutes": 1.0} for n in (60.0, 61.0, 62.0)],
        ("untested",): [{"top1": 50.0, "minutes": 1.0}],
    }
    table = sweep.summary(rows)
    assert [row.run for row in sweep.ranked(table, "few")] == ["slow", "quick", "bad", "untested"]
    told = sweep.proposed(table, "few")  # the best has 72 with a standard error of 2 / sqrt(3) = 1.15
    assert told.startswith("proposed: quick (validation_few 71.0") and "1.2" in told and "slow 72.0" in told
    assert sweep.proposed(table, "top1") == "", "never by the test figures"
    single = {name: [{"validation_top1": value, "validation_top1_low": value - 4, "validation_top1_high": value + 4,
                      "trained_thousands": size}] for name, value, size in (("a", 80.0, 9.0), ("b", 79.0, 2.0),
                                                                             ("c", 70.0, 1.0))}  # fmt: skip
    assert sweep.proposed(sweep.summary({(name,): runs for name, runs in single.items()}), "top1").startswith(
        "proposed: b"
    )


def test_a_cell_that_does_not_fit_is_left_out_with_its_reason(sweep, tmp_path, capsys):
    words = [str(ROOT / "recipes" / "digits_lt.yaml"), "method.positives=99", "--seeds", "0", "--output", str(tmp_path)]
    assert command.main(words) == 1
    assert "error[queue.mined]: digits_lt-seed=0 is left out: " in capsys.readouterr().err
    assert not (tmp_path / "sweep.md").exists()


def test_shares_cut_the_cells(sweep, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(sweep, "run", lambda todo, output, lean: taken.append([cell.name for cell in todo]) or [])
    for share in ("1/2", "2/2"):
        command.main([DIGITS, "train.epochs=1,2,3", "--seeds", "0", "--share", share, "--output", str(tmp_path)])
    assert [len(names) for names in taken] == [2, 1] and not set(taken[0]) & set(taken[1])


@pytest.mark.parametrize("words", [[], ["train.epochs=1"], [DIGITS, "--seeds", "a"], [DIGITS, "--share", "3/2"]])
def test_commands_that_say_too_little_are_refused(sweep, words):
    with pytest.raises(SystemExit):
        command.main(words)


def test_the_commands_of_its_docstring_name_recipes_and_keys_that_exist(sweep):
    text = command.__doc__.replace("\\\n", " ")
    commands = [line.split()[2:] for line in text.splitlines() if line.strip().startswith("rescom-timm sweep recipes/")]
    assert len(commands) >= 5
    for words in commands:
        recipes = [word for word in words if word.startswith("recipes/") and "{" not in word]
        for path in [path for word in recipes for path in sorted(ROOT.glob(word))]:
            grid = [word.partition("=") for word in words if "=" in word]
            keys = [f"{key}={sweep.split(values)[0]}" for key, _, values in grid]
            for preset in [name for word in words if word[0] == "+" for name in word.split(",")] or [""]:
                load(path, [*filter(None, [preset]), *keys])
        assert all(list(ROOT.glob(word)) for word in recipes)


def test_several_commands_remember_their_cells_in_one_file(sweep, tmp_path):
    found = sweep.cells(["recipes/a.yaml"], {"x": [str(n) for n in range(8)]}, [0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda cell: sweep.remember([cell], tmp_path), found))
    assert sorted(name for _, name in sweep.remember([], tmp_path)) == sorted(cell.name for cell in found)
