from pathlib import Path

import pytest

from rescom_timm.runs.recipe import RecipeError, keys, load, load_dict

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


@pytest.mark.parametrize(
    "word, expected",
    [
        ("lr=0.1", "unknown key lr; did you mean optimizer.lr"),
        ("method.temprature=0.3", "unknown key method.temprature; did you mean method.temperature"),
        ("method.queue.perclass=3", "did you mean method.queue.per_class"),
        ("trian.epochs=3", "unknown key trian; did you mean train"),
        ("zzz.qqq=3", "unknown key zzz; there are: checkpoint"),
        ("train.epochs=ten", "train.epochs: .*integer, not 'ten'"),
        ("train.epochs=true", "train.epochs: .*integer, not True"),
        ("train.epochs=1.5", "train.epochs: .*integer, not 1.5"),
        ("optimizer.lr='0.1'", "optimizer.lr: .*number, not '0.1'"),
        ("optimizer.lr=-1", "optimizer: lr must be above 0"),
        ("method.name=balancedsoftmax", "unknown method 'balancedsoftmax'; did you mean balanced_softmax"),
        ("method.positives=17", "Qp = 17.*Q = 16"),
        ("net.backbone=resnet33_cifar", "net: timm has no model 'resnet33_cifar'; did you mean resnet32_cifar"),
        ("schedule.warmup_epochs=30", "warmup_epochs is 30, which train.epochs = 30 never reaches"),
        ("schedule.name=steps", "milestones belong to schedule.name: steps"),
        ("train.accumulate=3", "batch_size 64 is not divisible by accumulate 3"),
        ("train.precision=fp8", "train.precision"),
        ("views.train=crp(32,4)", "did you mean 'crop'"),
        ("data.index=exponental(50)", "exponental"),
        ("train", "is not key=value"),
        ("train.epochs=[1", "the value is not YAML"),
    ],
)
def test_a_wrong_word_is_refused_with_what_to_do(word, expected):
    with pytest.raises(RecipeError, match=expected):
        load(DIGITS, [word])


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
    with pytest.raises(RecipeError, match="speed.channels_last: .*boolean, not 'yes'"):
        load(DIGITS, ["speed.channels_last=yes"])


def test_captured_graphs_and_accumulated_gradients_are_refused_together():
    words = ["train.accumulate=2", "speed.compile=reduce-overhead"]
    with pytest.raises(RecipeError, match=r"reduce-overhead captures CUDA graphs.*max-autotune-no-cudagraphs"):
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


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seed: 1\nseed: 2\n", "line 1: given twice: seed"),
        ("- 1\n", "a mapping of keys, not list"),
        ("train: [\n", "not a YAML file"),
        ("seed: 1\n", "data is missing"),
        ("data: {index: all}\n", "data.source is missing"),
        ("base: x.yaml\n", "is its own base"),
        ("base: nothing.yaml\n", "no recipe"),
        ("data: {source: digits}\nseed: 2020-01-01\n", "a recipe holds text, numbers"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, expected):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RecipeError, match=expected):
        load(tmp_path / "x.yaml")


def test_a_missing_file_names_its_neighbour():
    with pytest.raises(RecipeError, match="did you mean .*digits_lt.yaml"):
        load(RECIPES / "digit_lt.yaml")


def test_keys_are_dotted_and_cover_nested_sections():
    assert {"train.epochs", "method.queue.per_class", "net.projector.dim", "seed", "method.views"} <= set(keys())
