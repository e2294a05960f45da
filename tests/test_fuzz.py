"""Whatever stands in a file or on the command line either works, with what was written, or is an error in words.

Each target takes mutated inputs and raises where an input does something else. The suite tries a fixed few of each; the
slow tests try many. What was found stands as a test of its own beside what was mended.
"""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.config.explain import keys
from rescom_timm.config.loading import load, load_dict, load_fetched
from rescom_timm.config.recipe import RecipeError
from rescom_timm.data.index import Index, read
from rescom_timm.data.index_files import NoSplit
from rescom_timm.data.transforms import POLICIES, STEPS, parse
from rescom_timm.engine import checkpoint
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.inference.export import export_run
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.io import read_json, sha256, write_tensors
from tests.engine.made_up_run import NAMES, add_evaluation, make_run

ROOT = Path(__file__).parents[1]
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def few(number):
    """A fixed few inputs, the same each time."""
    return settings(max_examples=number, derandomize=True, **COMMON)


def many(number):
    return settings(max_examples=number, **COMMON)


@contextmanager
def in_words(*kinds, seconds=60):
    """The block works, or raises one of these errors with a message; it does not hang."""

    def late(*_):
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    said = "the block works"
    try:
        yield
    except kinds as error:
        said = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert said.strip() and "Traceback" not in said


# ------------------------------------------------------------------------------------------------------------ mutations

TOKENS = [
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc2\xb2",
    b"\xe2\x80\xa8",
    b'"',
    b"'",
    b",",
    b"\t",
    b" ",
    b":",
    b"-1",
    b"1e999",
    b"nan",
    b"null",
    b"[",
    b"{",
    b"}",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object:os.system ",
    b"!!int x",
    b"../",
    b"/",
    b"9" * 30,
    b"9" * 5000,
    b"0x" + b"f" * 5000,
    b"1:" * 900 + b"1",
    b"#",
    b"%",
    b"true",
    b"~",
    b"|",
    b"=1+1",
    b"label",
    b"path",
]
PLACE = st.floats(0, 1, exclude_max=True)
MUTATION = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.integers(0, 40)),
    st.tuples(st.just("end"), PLACE, st.just(0)),
    st.tuples(st.just("put"), PLACE, st.sampled_from(TOKENS) | st.binary(max_size=8)),
    st.tuples(st.just("again"), PLACE, st.integers(1, 60)),
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=4)


def mutated(content: bytes, mutations) -> bytes:
    """The bytes with a bit flipped, a piece cut, the end cut off, something put in, or a piece twice."""
    for kind, place, what in mutations:
        at = int(place * len(content))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << what)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + what :]
        elif kind == "end":
            content = content[:at]
        elif kind == "put":
            content = content[:at] + what + content[at:]
        elif kind == "again":
            content = content[: at + what] + content[at : at + what] + content[at + what :]
    return content


# ---------------------------------------------------------------------------------------------------------- index files


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """One file of each format that is read as an index."""
    folder = tmp_path_factory.mktemp("lists")
    Index([f"a/{i}.jpg" for i in range(6)], [0, 0, 0, 1, 1, 2], 3, {"source": "x"}, ["cat", "dog", "emu"]).save(
        folder / "paths.txt"
    )
    Index(np.arange(6), [0, 0, 0, 1, 1, 2], 3, {"split": "train"}).save(folder / "rows.txt")
    (folder / "official.txt").write_text("".join(f"train/{i}.jpg {i % 3}\n" for i in range(6)))
    table = pd.DataFrame({"path": [f"{i}.jpg" for i in range(6)], "label": list("aabbcc"), "split": ["train"] * 6})
    table.to_csv(folder / "list.csv", index=False)
    table.to_csv(folder / "list.tsv", index=False, sep="\t")
    table.to_json(folder / "list.jsonl", orient="records", lines=True)
    table.to_parquet(folder / "list.parquet")
    inat = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)],
        "annotations": [{"image_id": i, "category_id": i % 2} for i in range(4)],
        "categories": [{"id": k, "name": f"n{k}"} for k in range(2)],
    }
    (folder / "inat.json").write_text(json.dumps(inat))
    return sorted(folder.iterdir())


def index_target(lists, tmp_path, which, mutations, classes):
    path = lists[which % len(lists)]
    changed = tmp_path / f"changed{path.suffix}"
    changed.write_bytes(mutated(path.read_bytes(), mutations))
    index = None
    with in_words(FileNotFoundError, NoSplit):
        index, problems = read(changed, classes, split="train")
        assert (index is None) == bool(problems)
        assert all(isinstance(problem, str) and problem for problem in problems)
        if index is not None:
            assert len(index.keys) == len(index.labels) and index.counts.sum() == len(index)
            with in_words(ValueError):  # what the format cannot hold
                index.save(tmp_path / "saved.txt")
                again = Index.load(tmp_path / "saved.txt")
                assert again.sha256 == index.sha256 and list(again.keys) == list(index.keys)
    return index


INDEXES = (st.integers(0, 7), MUTATIONS, st.none() | st.integers(1, 5))


@few(80)
@given(*INDEXES)
def test_a_changed_index_file_is_read_or_its_problems_are_told(lists, tmp_path_factory, which, mutations, classes):
    index_target(lists, tmp_path_factory.getbasetemp(), which, mutations, classes)


@pytest.mark.slow
@many(20_000)
@given(*INDEXES)
def test_many_changed_index_files(lists, tmp_path_factory, which, mutations, classes):
    index_target(lists, tmp_path_factory.getbasetemp(), which, mutations, classes)


def test_a_flipped_bit_in_our_own_index_never_moves_a_row_to_another_class(lists, tmp_path):
    """The header holds the counts: a label cannot change alone. (A key can: its digest stands in the run, and resuming
    compares it.)"""
    path = next(path for path in lists if path.name == "rows.txt")
    content, original = path.read_bytes(), Index.load(path)
    start = content.index(b"# row label")
    for bit in range(8 * start, 8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.txt").write_bytes(changed)
        index, problems = read(tmp_path / "x.txt")
        assert problems or index.labels.tolist() == original.labels.tolist(), bit


# -------------------------------------------------------------------------------------- recipes, words, policies, names

RECIPES = ["digits_lt", "cifar10_lt_if100_r32", "imagenet_lt_clip_b16", "cifar100_lt_if10_r32"]


def recipe_target(tmp_path, which, mutations, fetched):
    path = tmp_path / "recipe.yaml"
    if fetched:
        content = load(RECIPES[which]).to_yaml().encode()
    else:
        content = (ROOT / "recipes" / f"{RECIPES[which]}.yaml").read_bytes()
    path.write_bytes(mutated(content, mutations))
    for base in (ROOT / "recipes").glob("digits_lt.yaml"):
        shutil.copy(base, tmp_path / base.name)
    with in_words(RecipeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = load_fetched(path) if fetched else load(path)
        assert load_dict(made.to_dict()) == made
        assert load_dict(yaml.safe_load(made.to_yaml())) == made
        if fetched:
            assert (made.output, made.hub.repo) == ("runs", None) and "/" not in made.name


RECIPE = (st.integers(0, 3), MUTATIONS, st.booleans())


@few(25)
@given(*RECIPE)
def test_a_changed_recipe_is_a_recipe_or_an_error_of_one(tmp_path_factory, which, mutations, fetched):
    recipe_target(tmp_path_factory.getbasetemp(), which, mutations, fetched)


@pytest.mark.slow
@many(10_000)
@given(*RECIPE)
def test_many_changed_recipes(tmp_path_factory, which, mutations, fetched):
    recipe_target(tmp_path_factory.getbasetemp(), which, mutations, fetched)


VALUE = st.sampled_from(
    [
        "",
        "1",
        "-1",
        "0",
        "1e9",
        "null",
        "true",
        "[]",
        "{}",
        "[1, 2]",
        "{a: 1}",
        "nan",
        "x",
        "~",
        "&a 1",
        "*a",
        "!!set {a}",
        "=",
    ]
) | st.text(max_size=12)
WORD = st.tuples(st.sampled_from(sorted(keys())) | st.text(max_size=10), VALUE).map("=".join) | st.text(max_size=12)


def words_target(words):
    with in_words(RecipeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = load_dict({"data": {"source": "digits"}}, "recipe", words)
        assert load_dict(made.to_dict()) == made


@few(80)
@given(st.lists(WORD, min_size=1, max_size=3))
def test_words_of_the_command_line_are_taken_or_refused(words):
    words_target(words)


@pytest.mark.slow
@many(20_000)
@given(st.lists(WORD, min_size=1, max_size=3))
def test_many_words_of_the_command_line(words):
    words_target(words)


PIECE = st.sampled_from(
    [
        *STEPS,
        *POLICIES,
        "(",
        ")",
        ",",
        "|",
        "=",
        "1",
        "-1",
        "0.5",
        "1e9",
        "nan",
        "inf",
        "9" * 40,
        "224",
        "bilinear",
        "pad=",
        " ",
    ]
) | st.text(max_size=3)


def policy_target(line):
    with in_words(ValueError):
        policy = parse(line)
        assert parse(policy.text).text == policy.text


@few(150)
@given(st.lists(PIECE, max_size=8).map("".join))
def test_a_policy_is_one_or_an_error(line):
    policy_target(line)


@pytest.mark.slow
@many(50_000)
@given(st.lists(PIECE, max_size=8).map("".join))
def test_many_policies(line):
    policy_target(line)


# -------------------------------------------------------------------------------------------------- runs and exports


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an export of it in RUN/model and an evaluation."""
    run = make_run(tmp_path_factory.mktemp("run") / "run", steps=(2, 4), best=2)
    export_run(run, run / "model")
    add_evaluation(run, "test-last", 61.5)
    predictions = {
        "labels": torch.tensor([0, 1, 2, 3]),
        "predicted": torch.tensor([0, 1, 2, 2]),
        "confidence": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    write_tensors(run / "evaluation" / "test-last.safetensors", predictions)
    return run


DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("end"), PLACE, st.just(0)),
    st.tuples(st.just("put"), PLACE, st.binary(min_size=1, max_size=4)),
)


@contextmanager
def changed(path, content):
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checkpoint_target(run, name, damage):
    folder = run / "checkpoints" / "step-00000002"
    net, state = checkpoint.load(folder)
    with changed(folder / name, mutated((folder / name).read_bytes(), [damage])), in_words(CheckpointError):
        found, told = checkpoint.load(folder)
        assert same(found, net) and same(told["method"], state["method"]) and told["progress"] == state["progress"]


CHECKPOINTS = (st.sampled_from([*checkpoint.FILES, "hashes.json"]), DAMAGE)


@few(30)
@given(*CHECKPOINTS)
def test_damage_to_a_checkpoint_is_found(run, name, damage):
    checkpoint_target(run, name, damage)


@pytest.mark.slow
@many(5_000)
@given(*CHECKPOINTS)
def test_much_damage_to_a_checkpoint(run, name, damage):
    checkpoint_target(run, name, damage)


def export_target(run, original, name, damage):
    """Weights that were changed are refused, texts that were changed are told; else the model is the one exported."""
    folder = run / "model"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with changed(folder / name, mutated((folder / name).read_bytes(), [damage])), in_words(ValueError):
            model = from_pretrained(folder)
            assert told or (same(model.net.state_dict(), original) and model.class_names == NAMES)


EXPORTS = (
    st.sampled_from(
        ["config.json", "model.safetensors", "rescom.safetensors", "rescom.json", "recipe.yaml", "hashes.json"]
    ),
    DAMAGE,
)


@pytest.fixture(scope="module")
def original(run):
    return from_pretrained(run / "model").net.state_dict()


@few(12)
@given(*EXPORTS)
def test_damage_to_an_export_is_found_or_told(run, original, name, damage):
    export_target(run, original, name, damage)


@pytest.mark.slow
@many(1_500)
@given(*EXPORTS)
def test_much_damage_to_an_export(run, original, name, damage):
    export_target(run, original, name, damage)


# Hashes made to fit: what a stranger writes, not what a disk spoils.

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [
            "../../x",
            "/dev/zero",
            "hf-hub:me/x",
            "local-dir:/",
            "step-00000002",
            "\0",
            "vit_base_patch16_224",
            10**9,
            10**30,
            -1,
        ]
    ),
    st.lists(st.integers(-2, 9), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(tree, path=()):
    """Every place of a JSON tree."""
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*path, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree[:20]):
            yield from places(value, (*path, i))


def replaced(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if value is DROP and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


DROP = "\0drop"


def refit(folder):
    hashes = read_json(folder / "hashes.json")
    (folder / "hashes.json").write_text(json.dumps({name: sha256(folder / name) for name in hashes}))


def details_target(run, tmp_path, number, value):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "model", folder)
    details = json.loads((folder / "rescom.json").read_text())
    there = [path for path in places(details) if path]
    (folder / "rescom.json").write_text(json.dumps(replaced(details, there[number % len(there)], value)))
    refit(folder)
    with warnings.catch_warnings(), in_words(ValueError):
        warnings.simplefilter("ignore")
        model = from_pretrained(folder)
        assert model.net.classifier.out_features == len(model.class_names)
        assert all(isinstance(name, str) for name in model.class_names)


LIES = (st.integers(0, 500), ODD | st.just(DROP))


@few(12)
@given(*LIES)
def test_an_export_that_lies_is_refused_or_read(run, tmp_path_factory, number, value):
    details_target(run, tmp_path_factory.getbasetemp(), number, value)


@pytest.mark.slow
@many(2_000)
@given(*LIES)
def test_many_exports_that_lie(run, tmp_path_factory, number, value):
    details_target(run, tmp_path_factory.getbasetemp(), number, value)


def state_target(run, tmp_path, file, number, value):
    """A lie in state.json or classes.json of a run whose model is exported."""
    folder = tmp_path / "lying"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("model", "step-00000004"))
    step = folder / "checkpoints" / "step-00000002"
    path = step / "state.json" if file == "state.json" else folder / file
    tree = json.loads(path.read_text())
    there = [place for place in places(tree) if place]
    path.write_text(json.dumps(replaced(tree, there[number % len(there)], value)))
    refit(step)
    with warnings.catch_warnings(), in_words(CheckpointError, ValueError, FileNotFoundError):
        warnings.simplefilter("ignore")
        export_run(folder, tmp_path / "out", "last", plain=False)


STATES = (st.sampled_from(["state.json", "state.json", "classes.json"]), *LIES)


@few(15)
@given(*STATES)
def test_a_run_that_lies_is_refused_or_exported(run, tmp_path_factory, file, number, value):
    state_target(run, tmp_path_factory.getbasetemp(), file, number, value)


@pytest.mark.slow
@many(2_000)
@given(*STATES)
def test_many_runs_that_lie(run, tmp_path_factory, file, number, value):
    state_target(run, tmp_path_factory.getbasetemp(), file, number, value)


def folder_target(run, name, mutations):
    """The files of a run that have no checksum: texts, logs, evaluations."""
    path = run / name
    with warnings.catch_warnings(), changed(path, mutated(path.read_bytes(), mutations)):
        warnings.simplefilter("ignore")
        folder = RunFolder(run)
        for look in (folder.recipe, folder.recipe_text, folder.environment, folder.rows, folder.evaluation):
            with in_words(ValueError):
                look()


FOLDERS = (
    st.sampled_from(
        [
            "recipe.yaml",
            "environment.json",
            "metrics.jsonl",
            "evaluation/test-last.json",
            "evaluation/test-last.safetensors",
        ]
    ),
    MUTATIONS,
)


@few(40)
@given(*FOLDERS)
def test_the_texts_of_a_run_are_read_or_told(run, name, mutations):
    folder_target(run, name, mutations)


@pytest.mark.slow
@many(10_000)
@given(*FOLDERS)
def test_many_texts_of_a_run(run, name, mutations):
    folder_target(run, name, mutations)
