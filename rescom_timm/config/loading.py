"""Recipe: one YAML file, checked key by key before anything is loaded.

Order of precedence: defaults < `base` recipes < the file < presets (`+ldam`), left to right < `key=value` arguments.
Keys in `speed` change how fast a run is, never what it computes; every other key may change results.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

import pydantic

from rescom_timm.config.explain import explain, lists
from rescom_timm.config.recipe import MAX_SEED, Recipe, RecipeError
from rescom_timm.config.secrets import secret_in
from rescom_timm.data.config import VALIDATION, DataConfig, refuse_missing
from rescom_timm.data.profiles import RULES, parse_call
from rescom_timm.errors import InputError
from rescom_timm.hub_client import hub_id
from rescom_timm.io import MAX_DEPTH, parse_yaml, read_yaml
from rescom_timm.methods import METHODS
from rescom_timm.models.net import check_backbone

FREE_KEYS = (
    "name", "output", "origin", "data.source", "evaluation.every", "evaluation.batch_size", "evaluation.hide_test",
    "checkpoint", "speed",
    "train.nonfinite", "train.ema.export", "track", "hub", "method.teacher",
)  # fmt: skip
"""Keys and sections that may change when a run is resumed: they do not change what is trained (of a teacher, which may
have moved, the weights are compared)."""
UNREAD_KEYS = tuple(key for key in FREE_KEYS if key != "data.source")
"""Those that do not change what is evaluated either."""
FETCHED_KEYS = ("output", "track", "hub")
"""Sections of a recipe from the Hub that are ignored: the command line sets where is written, tracked and pushed.
Files that it names (`named_files`) are not read either."""


_PACKAGE = Path(__file__).parents[1]
SHIPPED = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
"""The recipes that come with the package: in it where it was installed, beside it in a clone."""


def shipped() -> list[Path]:
    """The recipes that come with the package, by name: one for each data set and backbone."""
    return sorted(SHIPPED.glob("*.yaml"))


def presets() -> dict[str, Path]:
    """The presets that come with the package, by name: methods, and other settings to put over a recipe."""
    return {path.stem: path for path in sorted((SHIPPED / "methods").glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """The file of that path, or the shipped recipe of that name (digits_lt, digits_lt.yaml or recipes/digits_lt.yaml).

    Raises RecipeError, naming the nearest, where there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = {found.name: found for found in shipped()}
    file = f"{path.name.removesuffix('.yaml')}.yaml"
    if file in known and path.parent in (Path(), Path("recipes")):
        return known[file]
    if path.is_dir():
        within = path / "recipe.yaml"
        todo = f": write {within}, with --resume to go on with that run" if within.is_file() else ""
        raise RecipeError("recipe.missing", f"no recipe {name}: it is a folder{todo}")
    if name in presets():
        raise RecipeError("recipe.missing", f"no recipe {name}: it is a preset; write it as +{name} after a recipe")
    beside = {found.name: found for found in path.parent.glob("*.yaml")}
    near = get_close_matches(file, known | beside, n=1)
    meant = near and (str(beside[near[0]]) if near[0] in beside else known[near[0]].stem)
    todo = f"did you mean {meant}?" if meant else "`rescom-timm recipes` lists them"
    raise RecipeError("recipe.missing", f"no recipe {name}; {todo}")


def current_name(name: str | Path) -> tuple[str, str] | None:
    """Recipe and preset of a name that 0.2.0 had for both, such as digits_lt_ldam; None for any other name."""
    path = Path(name)
    stem = path.name.removesuffix(".yaml")
    if path.is_file() or (path.parent not in (Path(), Path("recipes")) and path.parent.resolve() != SHIPPED.resolve()):
        return None
    for recipe in sorted((found.stem for found in shipped()), key=len, reverse=True):
        if stem.startswith(f"{recipe}_") and stem.removeprefix(f"{recipe}_") in presets():
            return recipe, stem.removeprefix(f"{recipe}_")
    return None


def load(path: str | Path, overrides: Sequence[str] = (), to_train: bool = False) -> Recipe:
    """The recipe of a YAML file or of a shipped recipe's name, with its `base` recipes.

    overrides: presets (`+ldam`) and `key=value`. The run is named after file and presets, such as digits_lt_ldam.
    to_train: the folder and the lists of its data must exist.

    Raises RecipeError for a file that is no recipe, an unknown key or preset (naming the nearest), a wrong type or an
    impossible combination, and MissingFileError for data that is not there; all that before timm and torchvision are
    imported, which know the names of backbones and of steps.
    """
    chosen = [_preset_name(argument) for argument in overrides if argument.startswith("+")]
    overrides = [argument for argument in overrides if not argument.startswith("+")]
    if (both := current_name(path)) is not None:
        recipe, preset = both
        warnings.warn(
            f"recipe {path} is now `{recipe} +{preset}`; the old name goes in the next release", FutureWarning, 2
        )
        path, chosen = recipe, [preset, *chosen]
    path = find(path)
    files = _with_bases(path, ())
    tree: dict[str, Any] = {"name": "_".join([path.stem, *chosen])}
    for _, own in files:
        tree = merged(tree, own)
    for name in chosen:
        tree = merged(tree, _preset(name, [file.stem for file, _ in files]))
    made = _typed(tree, str(path), overrides)
    refuse_secrets(made)
    if to_train:
        refuse_missing(made.data)
    if path.resolve().parent != SHIPPED.resolve() or any(
        argument.startswith(("net", "views")) for argument in overrides
    ):
        _check_names(made, str(path))  # those of shipped recipes are known
    return made


def _preset_name(argument: str) -> str:
    """The name of a preset, ldam of +ldam. Raises RecipeError, naming the nearest, if there is no such preset."""
    name = argument.removeprefix("+")
    if "=" in name:
        raise RecipeError("recipe.override", f"{argument}: set a key without the plus sign: {name}")
    if name not in presets():
        near = get_close_matches(name, presets(), n=1)
        todo = f"did you mean +{near[0]}?" if near else "`rescom-timm recipes` lists them"
        raise RecipeError("recipe.unknown_preset", f"no preset {argument}; {todo}")
    return name


def _preset(name: str, files: Sequence[str]) -> dict[str, Any]:
    """What a preset sets over a recipe: its own keys, then those of its `when` for the recipe's files, base first."""
    tree = _yaml(presets()[name])
    when = tree.pop("when", {})
    for file in files:
        tree = merged(tree, when.get(file, {}))
    return tree


def settings_of(name: str) -> dict[str, object]:
    """What the preset of a name sets over any recipe; of a method without a preset, that method.

    Raises RecipeError, naming the nearest, if there is neither.
    """
    if name in presets():
        return _preset(name, [])
    if name in METHODS:
        return {"method": {"name": name}}
    near = get_close_matches(name, {**presets(), **METHODS}, n=3)
    todo = f"did you mean {', '.join(near)}?" if near else "`rescom-timm recipes` lists them"
    raise RecipeError("recipe.unknown_method", f"no preset or method {name!r}; {todo}")


def load_fetched(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run on the Hub, which somebody else may have written.

    Its output, track and hub are ignored with a warning. Raises RecipeError as load does, for a recipe with a base, and
    if it names local files that `overrides` do not set.
    """
    tree = _yaml(Path(path))
    if "base" in tree:
        raise RecipeError("recipe.base", f"{path}: base: {tree['base']!r} of a recipe from the Hub is not followed")
    dropped = {key: tree.pop(key) for key in FETCHED_KEYS if key in tree}
    usual = flat(Recipe(data=DataConfig("digits")).to_dict())
    ignored = [f"{key}={value}" for key, value in flat(dropped).items() if usual.get(key) != value]
    if ignored:
        warnings.warn(
            f"the fetched recipe's settings {' '.join(ignored)} are ignored; set them on the command line to use them",
            stacklevel=2,
        )
    made = load_dict(tree, str(path), overrides)
    given = [argument.partition("=")[0].strip().replace("init_from", "from") for argument in overrides]
    own = [
        f"{key}={value}"
        for key, value in named_files(made)
        if not any(f"{key}.".startswith(f"{own}.") for own in given)
    ]
    if own:
        raise RecipeError(
            "recipe.local_file",
            f"{path}: a recipe from the Hub names local files, which are not read: {' '.join(own)}; "
            "set each on the command line",
        )
    refuse_secrets(made)
    return made


def named_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of what a recipe names on the disk of a machine: data, lists, weights, runs."""
    data, net = recipe.data, recipe.net
    call = parse_call(data.validation, VALIDATION) if data.validation != "none" else None
    teacher = recipe.method.teacher
    for key, value, named in (
        ("data.source", data.source, data.source != "digits" and hub_id(data.source, alone=True) is None),
        ("data.index", data.index, data.index != "all" and not parse_call(data.index, RULES)),
        ("data.test_index", data.test_index, data.test_index != "all" and not parse_call(data.test_index, RULES)),
        ("data.validation", data.validation, call is not None and call[0] == "index"),
        ("net.backbone", net.backbone, net.backbone.startswith("local-dir:")),
        ("net.weights_file", net.weights_file, net.weights_file is not None),
        ("net.classifier.file", net.classifier.file, net.classifier.file is not None),
        ("from", recipe.init_from, recipe.init_from is not None and hub_id(recipe.init_from, plain=False) is None),
        ("method.teacher", teacher, teacher is not None and hub_id(teacher) is None),
    ):
        if named:
            yield key, str(value)


def refuse_secrets(recipe: Recipe) -> None:
    """Raises RecipeError, naming the key, for a token or a password: a recipe stands in every file of its run."""
    texts = {key: f"{key}={value}" for key, value in flat(recipe.to_dict()).items()}
    if secret_in("\n".join(texts.values())) is None:
        return
    for key, text in texts.items():
        if kind := secret_in(text):
            raise RecipeError(
                "recipe.secret",
                f"{key} holds {kind}, which the run's files, card and trackers would show; remove it "
                "(the Hub's token comes from `hf auth login` or HF_TOKEN)",
            )


def load_dict(tree: dict[str, object], source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of plain types, changed by `key=value` arguments. Raises RecipeError as load does."""
    made = _typed(tree, source, overrides)
    _check_names(made, source)
    return made


def _check_names(recipe: Recipe, source: str) -> None:
    """Raise RecipeError for a backbone that timm does not know, or a policy of unknown steps."""
    from rescom_timm.data.transforms import check as check_views

    section = "views"
    try:
        check_views(recipe.views)
        section = "net"
        check_backbone(recipe.net.backbone)
    except InputError as error:
        raise RecipeError(error.code, f"{source}: {section}: {error}") from None


def _typed(tree: dict[str, Any], source: str, overrides: Sequence[str]) -> Recipe:
    """The recipe whose keys, types and combinations are checked, the names of backbone and steps are not."""
    if not isinstance(tree, dict):
        raise RecipeError("recipe.file", f"{source}: a recipe is a mapping of keys, not {type(tree).__name__}")
    tree = _in_full(tree)
    before, given = tree, [argument.partition("=")[0].strip() for argument in overrides]
    tree = overridden(tree, overrides)
    if "train.epochs" in given and not any(key.startswith("schedule") for key in given):
        tree = _shortened(tree, before, source)
    if "from" in tree:
        tree = {**tree, "init_from": tree["from"]}
        del tree["from"]
    tree = _without_removed(tree, source)
    method = tree.get("method")
    if isinstance(method, dict):
        tree = {**tree, "method": {"name": "rescom", **method}}
    if odd := [f"{key}: {wrong}" for key, value in _numbers(tree) if (wrong := _absurd(value))]:
        raise RecipeError("recipe.value", f"{source}: " + "\n  ".join(odd))
    try:
        return _ADAPTER.validate_json(json.dumps(tree), strict=True)
    except pydantic.ValidationError as error:
        raise explain(error, source) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(
            "recipe.file", f"{source}: {error}; a recipe holds text, numbers, true, false, null and lists"
        ) from None


def overridden(tree: dict[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """A tree of plain types with `key=value` arguments over it. Raises RecipeError for what is no such argument."""
    for argument in overrides:
        tree = merged(tree, _override(argument))
    return tree


REMOVED = {
    "loader.near_resize": (
        False,
        "resizing by torch was at most 12% faster and is gone; loader.device_views moves work",
    ),
}
"""Keys of earlier releases: the value at which they change nothing, which is dropped, and why they are gone."""


def _without_removed(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """The tree without keys of earlier releases. Raises RecipeError where one would change what is trained."""
    for key, (harmless, why) in REMOVED.items():
        section, _, name = key.partition(".")
        if isinstance(old := tree.get(section), dict) and name in old:
            if old[name] is not harmless:
                raise RecipeError("recipe.removed_key", f"{source}: {key} was removed: {why}; leave it out")
            tree = {**tree, section: {k: v for k, v in old.items() if k != name}}
    return tree


def _numbers(tree: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a tree with their dotted keys."""
    if isinstance(tree, int | float):
        yield key, tree
    elif isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _numbers(value, f"{key}.{name}" if key else str(name))


def _absurd(number: float) -> str:
    """What is wrong with a number whatever it is for; it stands above any that a setting has."""
    if isinstance(number, float) and not isfinite(number):
        return f"must be a finite number, not {number}"
    largest = MAX_SEED if isinstance(number, int) else 10**6
    shown = (
        number if isinstance(number, float) or abs(number) < 10**100 else "that"
    )  # of 4,300 digits, which is no text
    return f"must be at most {largest:,} in size, not {shown}" if abs(number) > largest else ""


def _shortened(tree: dict[str, Any], before: dict[str, Any], source: str) -> dict[str, Any]:
    """The tree with its schedule shortened in proportion, where the given train.epochs would not reach its end."""
    try:
        whole, epochs = _typed(before, source, ()), tree["train"]["epochs"]
    except (RecipeError, KeyError, TypeError):
        return tree  # the error is that of the tree with all overrides
    schedule = whole.schedule
    if type(epochs) is not int or not 0 < epochs <= max(schedule.warmup_epochs, *schedule.milestones, 0):
        return tree
    shorter: dict[str, Any] = {"warmup_epochs": schedule.warmup_epochs * epochs // whole.train.epochs}
    if schedule.milestones:
        moved = {round(epoch * epochs / whole.train.epochs) for epoch in schedule.milestones}
        shorter["milestones"] = sorted(epoch for epoch in moved if 0 < epoch < epochs)
        shorter["name"] = "steps" if shorter["milestones"] else "constant"
    shown = ", ".join(f"schedule.{key}={value}" for key, value in shorter.items())
    warnings.warn(
        f"train.epochs={epochs} instead of {whole.train.epochs} shortens the schedule in proportion: {shown}",
        stacklevel=4,
    )
    return merged(tree, {"schedule": shorter})


_ADAPTER = pydantic.TypeAdapter(Recipe)


def _with_bases(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """A file and its bases with what each of them says, the lowest first."""
    if path in seen:
        raise RecipeError("recipe.base", f"{path} is its own base ({' -> '.join(map(str, (*seen, path)))})")
    tree = _in_full(_yaml(path))
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise RecipeError("recipe.base", f"{path}: base must be the name of one other recipe, not {base!r}")
    below = [] if base is None else _with_bases(path.parent / base, (*seen, path))
    return [*below, (path, tree)]


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise RecipeError("recipe.missing", f"no recipe {path}") from None
    except (ValueError, OSError) as error:
        raise RecipeError("recipe.file", str(error)) from None


def _override(argument: str) -> dict[str, Any]:
    key, equals, value = argument.partition("=")
    if argument.startswith("+"):
        raise RecipeError("recipe.override", f"{argument}: this recipe is complete and takes no preset; set its keys")
    if not equals or not key:
        raise RecipeError("recipe.override", f"{argument!r} is not key=value, such as train.epochs=10")
    try:
        tree: Any = parse_yaml(value)
    except ValueError as error:
        raise RecipeError("recipe.override", f"{argument!r}: the value is not YAML: {error}") from None
    parts = key.strip().split(".")
    if len(parts) > MAX_DEPTH:
        raise RecipeError("recipe.override", f"{argument[:60]!r}... is nested deeper than {MAX_DEPTH} levels")
    for part in reversed(parts):
        tree = {part: tree}
    return _in_full(tree)


SHORT = {"method": "name", "optimizer": "name", "schedule": "name", "net.tuning": "name", "net.classifier": "kind"}
"""Sections that may be given as the value of one of their keys."""


def _in_full(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"method": "focal"} -> {"method": {"name": "focal"}}, {"track": {"tags": "a"}} -> {"track": {"tags": ["a"]}}."""
    full: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, str) and f"{prefix}{key}" in SHORT:
            value = {SHORT[f"{prefix}{key}"]: value}
        elif isinstance(value, str | int) and f"{prefix}{key}" in lists():
            value = [value]
        full[key] = _in_full(value, f"{prefix}{key}.") if isinstance(value, dict) else value
    return full


def merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """`above` over `below`. A section that changes its `name` starts anew: another method has other keys."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            name = old.get("name", "rescom")
            renamed = key == "method" and value.get("name", name) != name
            result[key] = value if renamed else merged(old, value)
        else:
            result[key] = value
    return result


def flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences(old: Mapping[str, object], new: Mapping[str, object], but: Sequence[str] = FREE_KEYS) -> list[str]:
    """The keys by which two recipes (of Recipe.to_dict) train something else.

    All that differ but for FREE_KEYS, and for method.negatives where the new one leaves it to K and Q, a number in the
    recipe of a run.
    """
    one, other = flat(old), flat(new)
    if other.get("method.negatives") == "auto" and "method.negatives" in one:
        other["method.negatives"] = one["method.negatives"]
    free = tuple(f"{key}." for key in but)
    changed = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [key for key in changed if not f"{key}.".startswith(free)]
