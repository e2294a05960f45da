from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rescom_timm.config import synonyms
from rescom_timm.config.explain import keys
from rescom_timm.config.loading import differences, load, load_dict, load_fetched
from rescom_timm.config.recipe import RecipeError
from rescom_timm.data.sources import load as load_data
from rescom_timm.methods import METHODS
from tests.raises import raises, warns

RECIPES = Path(__file__).parents[2] / "recipes"
DIGITS = RECIPES / "digits_lt.yaml"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_named_by_its_file_and_a_document(path):
    recipe = load(path)
    assert recipe.name == path.stem
    assert load_dict(recipe.to_dict()) == recipe
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Source", "Command", "Hardware", "Expected"):
        assert any(line.startswith(f"# {word} ") for line in header), f"{path.name} lacks {word} in its header"
    assert any(f"recipes/{path.name}" in line for line in header), "the command names another recipe"


def test_an_argument_that_sets_nothing_is_an_error():
    """Values that cannot be: tests/faults/recipe_values.py."""
    with raises("recipe.override", "'train'", kind=RecipeError):
        load(DIGITS, ["train"])


@pytest.mark.parametrize(
    ("word", "code", "key"),
    [
        ("train.epochs=ten", "recipe.value", "train.epochs"),  # pydantic's own
        ("train.epochs=-1", "recipe.value", "epochs"),  # of a section
        ("optimizer={nesterov: true, momentum: 0}", "recipe.conflict", "optimizer: nesterov"),
        ("hub.strategy=best hub.repo=a/b", "recipe.conflict", "hub.strategy"),  # of the whole recipe
        ("trian.epochs=3", "recipe.unknown_key", "trian"),
        ("method.name=resscom", "recipe.unknown_method", "rescom"),
        ("data.source=null", "recipe.value", "data.source"),
        ("optimizer.lr=.inf", "recipe.value", "optimizer.lr"),
    ],
)
def test_an_error_within_a_section_keeps_its_code(word, code, key):
    with raises(code, key, kind=RecipeError):
        load(DIGITS, word.split(" ") if "{" not in word else [word])


def test_of_several_errors_the_first_gives_the_code():
    with raises("recipe.conflict", "nesterov", "unknown key zzz", kind=RecipeError) as caught:
        load(DIGITS, ["optimizer={nesterov: true, momentum: 0}", "zzz=1"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_key_has_a_code():
    with raises("recipe.missing_key", "data.source", kind=RecipeError):
        load_dict({"data": {}})


def test_numbers_in_yaml_are_what_people_mean(tmp_path):
    assert load(DIGITS, ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
    assert load(DIGITS, ["optimizer.lr=1"]).optimizer.lr == 1.0
    assert load(DIGITS, ["method.negatives=null"]).method.negatives is None
    assert load(DIGITS, ["schedule={name: steps, milestones: [3, 5]}"]).schedule.milestones == (3, 5)


def test_only_true_and_false_are_booleans(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {source: digits}\ntrain: {precision: no}\nspeed: {compile: false}\n")
    recipe = load(tmp_path / "a.yaml", ["speed.channels_last=True"])
    assert (recipe.train.precision, recipe.speed.compile, recipe.speed.channels_last) == ("no", False, True)
    assert load(DIGITS, ["train.precision=bf16", "train.precision=no"]).train.precision == "no"
    with raises("recipe.value", "speed.channels_last: ", "'yes'"):
        load(DIGITS, ["speed.channels_last=yes"])


def test_captured_graphs_and_accumulated_gradients_are_refused_together():
    words = ["train.accumulate=2", "speed.compile=reduce-overhead"]
    with raises("recipe.conflict", "reduce-overhead", "max-autotune-no-cudagraphs"):
        load(DIGITS, words)
    assert load(DIGITS, [words[0], "speed.compile=max-autotune-no-cudagraphs"]).train.accumulate == 2


def test_home_is_told_as_a_tilde_that_can_be_read_back(monkeypatch):
    monkeypatch.setenv("HOME", "/home/al")
    told = load(DIGITS, ["output=/home/al/x", "from=/mnt/home/al/x", "data.index=/home/alice/x"]).to_dict()
    assert (told["output"], told["init_from"], told["data"]["index"]) == ("~/x", "/mnt/home/al/x", "/home/alice/x")
    assert load_dict(told).folder == Path("/home/al/x/digits_lt")


def test_precedence_is_default_base_file_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {source: digits}\nseed: 1\ntrain: {epochs: 7, batch_size: 8}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {epochs: 9}\n")
    recipe = load(tmp_path / "b.yaml", ["train.batch_size=4"])
    assert (recipe.name, recipe.seed, recipe.train.epochs, recipe.train.batch_size) == ("b", 1, 9, 4)
    assert recipe.optimizer.momentum == 0.9


def test_another_method_drops_the_keys_of_the_old_one_and_the_same_keeps_them():
    assert load(DIGITS, ["method.name=balanced_softmax"]).method.name == "balanced_softmax"
    assert load(DIGITS, ["method.name=rescom", "method.beta=0.5"]).method.queue.per_class == 16


def test_a_missing_file_names_its_neighbour():
    with raises("recipe.missing", "digit_lt.yaml", RECIPES / "digits_lt.yaml"):
        load(RECIPES / "digit_lt.yaml")


def test_keys_are_dotted_and_cover_nested_sections():
    assert {"train.epochs", "method.queue.per_class", "net.projector.dim", "seed", "method.views"} <= set(keys())


@pytest.mark.parametrize("name", ["digits_lt", "digits_lt.yaml", "recipes/digits_lt.yaml"])
def test_a_recipe_that_comes_with_the_package_is_found_by_name_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert load(name) == load(DIGITS)
    Path("recipes").mkdir()
    Path("digits_lt.yaml").write_text("data: {source: mine}")
    Path("recipes/digits_lt.yaml").write_text("data: {source: ours}")
    expected = {"digits_lt": "digits", "digits_lt.yaml": "mine", "recipes/digits_lt.yaml": "ours"}
    assert load(name).data.source == expected[name], "a file that is there comes first"
    with raises("recipe.missing", "digits_lr", "digits_lt"):
        load("digits_lr")
    with raises("recipe.missing", "there/digits_lt"):
        load("there/digits_lt")


def test_fewer_epochs_alone_shorten_the_schedule_as_much():
    cifar = DIGITS.with_name("cifar10_lt_if100_r32.yaml")
    with warns("train.epochs=1 ", "30", "schedule.warmup_epochs=0"):
        assert load(DIGITS, ["train.epochs=1"]).schedule.warmup_epochs == 0
    with warns("milestones=[160, 180]"):
        half = load(cifar, ["train.epochs=200"]).schedule
    assert (half.warmup_epochs, half.milestones) == (5, (160, 180))
    with warns("name=constant"):
        assert load(cifar, ["train.epochs=2"]).schedule.name == "constant"
    whole = load(cifar)
    assert load(cifar, ["train.epochs=361"]).schedule == whole.schedule  # they reach all of it: nothing is changed
    for said in ("schedule.warmup_epochs=10", "schedule.name=steps"):
        with raises("recipe.conflict", "train.epochs = 20"):
            load(cifar, ["train.epochs=20", said])


def test_of_a_fetched_recipe_folder_and_push_are_not_followed(tmp_path):
    path = tmp_path / "recipe.yaml"
    tree = {"name": "kept", "output": "/anywhere", "data": {"source": "digits"}, "train": {"epochs": 7}}
    tree["hub"] = {"repo": "me/public", "private": False, "strategy": "end"}
    path.write_text(yaml.safe_dump(tree))
    with warns("output=/anywhere hub.private=False hub.repo=me/public"):
        made = load_fetched(path)
    assert (made.output, made.hub.repo, made.hub.private) == ("runs", None, True)
    assert (made.name, made.train.epochs) == ("kept", 7)
    with warns("output=/anywhere"):
        made = load_fetched(path, ["output=mine", "hub.repo=me/mine"])
    assert (made.output, made.hub.repo, made.hub.private) == ("mine", "me/mine", True)
    path.write_text(yaml.safe_dump({**tree, "base": "../../secret.yaml"}))
    with raises("recipe.base", "'../../secret.yaml'"):
        load_fetched(path)
    path.write_text(yaml.safe_dump({**tree, "name": "../.ssh"}))
    with raises("recipe.value", "'../.ssh'"), warns("output=/anywhere"):
        load_fetched(path)


def test_recipes_differ_by_what_trains_something_else():
    one = load(DIGITS).to_dict()
    other = load(DIGITS, ["speed.workers=1", "output=x", "data.source=y", "hub.repo=a/b", "data.index=all"]).to_dict()
    assert differences(one, other) == ["data.index"]
    assert differences({"evaluation": {"every": 1}}, {"evaluation": {"everything": 1}}) == ["evaluation.everything"]


KEYS = st.sampled_from(sorted(keys()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=3))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_stands_at_a_key_is_a_recipe_or_an_error_of_one(values):
    tree = {"data": {"source": "digits"}}
    for key, value in values.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = value
    try:
        made = load_dict(tree)
    except RecipeError as error:
        refused = str(error)
    else:
        refused = load_dict(made.to_dict()) == made
    assert refused


@pytest.mark.parametrize(
    ("words", "section", "expected"),
    [
        (["method=focal", "method.gamma=1.5"], "method", {"name": "focal", "views": 1, "gamma": 1.5}),
        (["optimizer=adamw"], "optimizer", {"name": "adamw"}),
        (["schedule=constant", "schedule.warmup_epochs=0"], "schedule", {"name": "constant"}),
        (["net.tuning=lora"], "net", {"pretrained": False}),
    ],
)
def test_a_section_may_be_given_as_its_name(words, section, expected):
    """Of the method it starts the section anew, as method.name does; of others the rest of the section stays."""
    made, written = load("digits_lt", words), load("digits_lt")
    told = made.to_dict()[section]
    assert {key: told[key] for key in expected} == expected
    if section != "method":
        assert {key for key, value in told.items() if value != written.to_dict()[section][key]} <= {
            "name",
            "tuning",
            "warmup_epochs",
        }


def test_a_section_may_be_given_as_its_name_in_a_file_and_in_a_base(tmp_path):
    (tmp_path / "below.yaml").write_text("data: {source: digits}\nmethod: focal\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\nmethod: {gamma: 1.0}\noptimizer: lamb\n")
    made = load(tmp_path / "above.yaml")
    assert (made.method.name, made.method.gamma, made.optimizer.name) == ("focal", 1.0, "lamb")
    assert load_dict({"data": {"source": "digits"}, "method": "ldam"}).method.name == "ldam"


def test_a_single_value_is_a_list_of_one():
    one = load("digits_lt", ["track.log_with=wandb", "net.trainable=norms", "track.tags=a"])
    assert (one.track.log_with, one.net.trainable, one.track.tags) == (("wandb",), ("norms",), ("a",))
    steps = load("digits_lt", ["schedule.name=steps", "schedule.milestones=20"])
    assert steps.schedule.milestones == (20,)


@pytest.mark.parametrize(
    "word", ["fp16=true", "cosine=true", "lora=true", "use_wandb=true", "use_ema=true", "imb_factor=50", "batch=32"]
)
def test_a_suggestion_with_a_value_is_a_recipe(word):
    """What an unknown key is answered with loads, when it is written as suggested."""
    with pytest.raises(RecipeError) as refused:
        load("digits_lt", [word])
    meant = str(refused.value).partition("did you mean ")[2].removesuffix("?")
    assert "=" in meant and load("digits_lt", [meant])


@pytest.mark.parametrize("word", ["time=1", "task=1", "ddp_timeout=1", "lr_cycle_limit=1", "few_shot=1"])
def test_a_far_key_is_not_suggested(word):
    with pytest.raises(RecipeError) as refused:
        load("digits_lt", [word])
    assert "did you mean" not in str(refused.value)


def test_synonyms_name_keys_and_methods_that_exist_and_hide_none():
    known = {*keys(), "from"}
    named = {key.partition("=")[0] for key in synonyms.KEYS.values()}
    assert {key for key in named if not key.startswith("net.options.")} <= known
    assert set(synonyms.METHODS.values()) <= set(METHODS) and not set(synonyms.METHODS) & set(METHODS)
    top = {key for key in known if "." not in key}
    assert not top & {*synonyms.KEYS, *synonyms.ELSEWHERE} and not set(synonyms.KEYS) & set(synonyms.ELSEWHERE)


def test_a_recipe_of_020_with_a_removed_key_loads_where_the_key_changed_nothing():
    tree = {"data": {"source": "digits"}, "loader": {"near_resize": False, "exif": True}}
    assert load_dict(tree) == load_dict({"data": {"source": "digits"}, "loader": {"exif": True}})
    with raises("recipe.removed_key", "loader.near_resize"):
        load_dict({"data": {"source": "digits"}, "loader": {"near_resize": True}})


def test_caltech101_has_the_classes_that_its_recipe_describes(shared):
    folder = shared / "caltech101_48px"
    if not folder.is_dir():
        pytest.skip(f"real data absent: {folder}")
    data = load_data(load("caltech101_r20", [f"data.source={folder}"]).data)
    counts = data.counts
    assert (len(counts), int(counts.sum()), int(counts.max()), int(counts.min())) == (101, 7667, 790, 21)
    assert len(data.test.rows) == 1010
