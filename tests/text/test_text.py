"""Printed text: what a terminal would obey is escaped, whoever prints it."""

import io
import sys
import warnings
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tqdm import tqdm

from rescom_timm import io as files
from rescom_timm.__main__ import main
from rescom_timm.cli import EXIT_CODES, answer, new_parser
from rescom_timm.cli.parts.predict import read_prior
from rescom_timm.config.loading import load
from rescom_timm.config.recipe import RecipeError
from rescom_timm.data.index import Index
from rescom_timm.engine.errors import message
from rescom_timm.hub_download import at_revision
from rescom_timm.text import check_name, counted, escape_controls, escaped_output
from tests.raises import raises
from tests.text.hostile import CONTROLS, TERMINAL


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\x1b[31m", "\\x1b[31m"),
        ("a\x9bb", "a\\x9bb"),
        ("x\u202ey", "x\\u202ey"),
        ("\udcff", "\\udcff"),
        ("caf\u00e9 \u65e5\u672c \u05d0\u05d1 \U0001f408\u200d\u2b1b \u0645\u06cc\u200c\u062e", None),
    ],
)
def test_controls_are_escaped_and_letters_stay(text, escaped):
    assert escape_controls(text) == (text if escaped is None else escaped)


def test_line_breaks_stay_where_text_has_lines():
    assert escape_controls("a\n\tb\r", lines=True) == "a\n\tb\\r" and escape_controls("a\nb\t") == "a\\nb\\t"


def test_every_print_is_escaped_and_the_streams_come_back(capsys):
    before = sys.stdout, sys.stderr, warnings.formatwarning
    with escaped_output(), escaped_output():
        print("out", *TERMINAL)
        print("x", *TERMINAL, file=sys.stderr)
        sys.stdout.writelines(TERMINAL)
    assert before == (sys.stdout, sys.stderr, warnings.formatwarning)
    told = capsys.readouterr()
    assert told.out.count("\\x1b]52;c;bWU=\\x07") == 2 and "\\u202egnp" in told.err
    assert not any(one in told.out for one in CONTROLS) and not any(one in told.err for one in CONTROLS)


def test_a_bar_moves_and_its_text_is_escaped(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with escaped_output(), tqdm(total=2, desc="a\x1b]0;x\x07b", ncols=60, mininterval=0, file=sys.stderr) as bar:
        bar.update(2)
    told = screen.getvalue()
    assert told.startswith("\r") and "a\\x1b]0;x\\x07b" in told and "2/2" in told
    assert not any(one in told.replace("\r", "") for one in CONTROLS)


@pytest.mark.parametrize(
    "words", ["recipes {}", "train digits_lt {}=1 --print", "train digits_lt --{}", "{}", "doctor {}"]
)
@pytest.mark.parametrize("hostile", ["a\x1b]52;c;bWU=\x07", "b\x9b1m", "c\u202eyx"])
def test_words_that_a_command_refuses_are_printed_escaped(words, hostile, capsys):
    try:
        code = main([word.replace("{}", hostile) for word in words.split()])
    except SystemExit as stop:
        code = stop.code
    told = "".join(capsys.readouterr())
    assert code in (1, 2) and ascii(hostile)[1:-1] in told.replace("\\\\", "\\")
    assert not any(one in told for one in CONTROLS)


def test_names_of_classes_in_printed_findings_are_escaped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    header = "# rescom_timm index: 1\n# source: \x1b[2Jgone\n# rows: 2\n# classes: 2\n# class 0: 1 a\n# class 1: 1 b\n"
    (tmp_path / "l.txt").write_text(header + "# path label\na\u202e.png 0\nb.png 1\n", encoding="utf-8")
    assert main(["describe", "l.txt"]) == 0 and "source: \\x1b[2Jgone" in capsys.readouterr().out
    assert main(["overlap", "l.txt", "l.txt"]) == 3 and "a\\u202e.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a\x1b[m", "b\x9b", "c\u202e", "d\u200f", "e\x00", "f\u200b", "g\ufe0f"])
def test_names_with_controls_are_refused_where_we_write_them(name, tmp_path):
    with raises("text.name", "a class name", ascii(name[-1])[1:-1] if len(name) == 2 else "\\x1b"):
        Index([f"{k}.png" for k in range(2)], [0, 1], 2, class_names=["good", name]).save(tmp_path / "l.txt")
    assert not (tmp_path / "l.txt").exists()
    with pytest.raises(RecipeError):
        load("digits_lt", [f'name="{ascii(name)[1:-1]}"'])
    check_name("caf\u00e9 \u05d0 \U0001f408\u200d\u2b1b", "a class name")


@pytest.mark.parametrize("mark", ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u3164", "\ufe0f"])
def test_zero_width_characters_are_escaped_except_where_they_show(mark):
    for name in (f"{mark}cat", f"c{mark}at", f"cat{mark}"):
        assert escape_controls(name) == name.replace(mark, ascii(mark)[1:-1])
    tags = "cat\U000e0041\U000e007f"
    assert escape_controls(tags) == "cat\\U000e0041\\U000e007f"
    assert escape_controls(f"a{2 * mark}b") == f"a{2 * ascii(mark)[1:-1]}b"
    shown = [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937",
        "\U0001f408\u200d\u2b1b",
        "\u2764\ufe0f",
        "1\ufe0f\u20e3",
    ]
    assert [escape_controls(name) for name in shown] == shown


def test_a_warning_is_one_line_without_the_code(capsys):
    def work():
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkey = warnings.formatwarning
            assert (
                monkey(UserWarning("two\nlines \x1b"), UserWarning, "commands/train.py", 75)
                == "warning: two lines \x1b\n"
            )
        return 0

    assert answer(work) == 0


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (RecipeError("recipe.unknown_key", "no such key"), "no such key"),
        (OSError(28, "No space left on device", "f"), "No space left on device: 'f'"),
        (OSError(None, "Error while serializing"), "Error while serializing"),
        (MemoryError(), "memory is full"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_is_printed_without_its_kind_and_number(error, printed, capsys):
    def work():
        raise error

    assert message(error) == printed
    assert answer(work) == 1
    assert f"]: {printed}" in capsys.readouterr().err


def test_help_ends_with_the_exit_codes(capsys):
    assert EXIT_CODES in new_parser("about", "x", "rescom-timm x").format_help()
    assert main(["--help"]) == 0 and EXIT_CODES in capsys.readouterr().out
    for word in ("0 ok", "1 failed", "2 usage error", "3 index check", "130", "143"):
        assert word in EXIT_CODES


@pytest.mark.parametrize("verb", ["evaluate {}", "plot {}", "robustness {}", "export {}", "push {}"])
@pytest.mark.parametrize(("run", "said"), [("none", "no run folder none"), ("f", "f is no run folder: it is a file"),
                                           ("d", "d is no run folder: it holds none of")])  # fmt: skip
def test_every_command_answers_alike_to_what_is_no_run(verb, run, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("mine")
    (tmp_path / "d").mkdir()
    assert main(verb.format(run).split()) == 1
    assert f"]: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected", "printed"),
    [
        ("1\n2\n3\n", [1, 2, 3], "cat 1, dog 2, caf\u00e9 3"),
        ("4 5\n6", [4, 5, 6], "cat 4, dog 5, caf\u00e9 6"),
        ("dog,2\ncafe\u0301,3\ncat,1\n", [1, 2, 3], ""),
        ('class,images\n\ncaf\u00e9, 30\n"cat",1e1\ndog,0.5\n', [10, 0.5, 30], ""),
    ],
)
def test_a_prior_is_numbers_in_the_printed_order_or_names_in_any(text, expected, printed, tmp_path, capsys):
    (tmp_path / "p.csv").write_text(text, encoding="utf-8")
    assert read_prior(str(tmp_path / "p.csv"), ["cat", "dog", "caf\u00e9"]) == expected
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("source", ["me/x", "hf://me/x", "hf-hub:me/x", "me/x@v1"])
def test_a_revision_makes_an_address(source):
    assert at_revision(source, "v1") == "hf://me/x@v1"


@pytest.mark.parametrize(
    ("source", "revision"), [("runs", "v1"), ("me/x@v2", "v1"), ("me/x", "a b"), (Path("me/x"), "v1")]
)
def test_revisions_that_cannot_be(source, revision):
    with raises("hub.id", "revision"):
        at_revision(source, revision)


def test_what_safetensors_cannot_write_is_the_systems_error(tmp_path, monkeypatch):
    def fails(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(OSError) as error:
        files.write_tensors(tmp_path / "x.safetensors", {})
    assert error.value.errno == 28 and "None" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("number", "things", "text"),
    [(1, "class", "1 class"), (0, "image", "0 images"), (1215, "class folder", "1,215 class folders"),
     (1, "batch", "1 batch"), (2, "batch", "2 batches"), (1, "more problem", "1 more problem")],
)  # fmt: skip
def test_counted(number, things, text):
    assert counted(number, things) == text
