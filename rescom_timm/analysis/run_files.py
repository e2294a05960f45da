"""Reads a run folder for plots; needs no model and no data set.

    recipe.yaml  environment.json  metrics.jsonl  evaluation/<split>-<checkpoint>.json and .safetensors

What is missing is None or empty here; the plot that needs it raises Missing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rescom_timm import metrics
from rescom_timm.config.loading import load
from rescom_timm.config.recipe import RecipeError
from rescom_timm.data.index_files import MAX_CLASSES
from rescom_timm.engine.run_folder import CHANGED, Line, check_run, lines
from rescom_timm.errors import InputError
from rescom_timm.io import MAX_RECIPE, read_json, read_text, read_yaml

SAME = ("seed", "name", "output", "hub", "speed", "checkpoint")
"""Keys in which runs of one setting may differ."""
_PREFERRED = ("test-last", "test-best", "validation-last")


class Missing(InputError):
    """A run lacks what a plot needs."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation (<split>-<checkpoint>) of a run: its predictions, and what is known of the classes.

    labels, predicted (N,) int64 (predicted -1: no valid output), confidence (N,) float32 in 0..1, counts (K,) int64
    training images or None, class_names (K), numbers name -> percent, chosen: how the checkpoint was chosen, limits of
    the groups, recorded: the intervals of the numbers that its JSON holds (0.2.0 recorded none), digest: of its labels
    and images, "" if it is not recorded.
    """

    run: str
    name: str
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]
    num_classes: int
    counts: npt.NDArray[np.int64] | None = None
    class_names: Sequence[str] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    chosen: str = ""
    limits: metrics.Limits = metrics.LIMITS
    recorded: Mapping[str, Sequence[float]] = field(default_factory=dict)
    digest: str = ""

    @cached_property
    def tested(self) -> npt.NDArray[np.int64]:
        """Images (K,) of each class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def correct(self) -> npt.NDArray[np.int64]:
        """Of them, those labelled right (K,)."""
        return np.bincount(self.labels[self.labels == self.predicted], minlength=self.num_classes)

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """Class numbers (K,) from most to fewest training images, as they are if these are unknown."""
        return np.arange(self.num_classes) if self.counts is None else metrics.by_count(self.counts)

    @cached_property
    def groups(self) -> npt.NDArray[np.str_]:
        """The group's name of each class (K,), "" if the training counts are unknown."""
        return metrics.group_of(self.counts, self.limits, self.num_classes)

    @cached_property
    def intervals(self) -> Mapping[str, Sequence[float]]:
        """95% of top1, mean_class, many, many_mean_class ...: (low, high) in percent."""
        return self.recorded or metrics.intervals(self.correct, self.tested, self.counts, limits=self.limits)

    def size(self, name: str) -> tuple[int, int]:
        """On how many images, of how many classes, a number such as top1, few or few_mean_class rests."""
        tested, group = self.tested, name.removesuffix("_mean_class")
        if group in metrics.GROUPS:
            members = {} if self.counts is None else metrics.groups(self.counts, self.limits)
            tested = tested[members[group].numpy()] if group in members else tested[:0]
        return int(tested.sum()), int((tested > 0).sum())

    @property
    def title(self) -> str:
        """Run and evaluation, for titles."""
        return f"{self.run}, {self.name}"

    def training_counts(self) -> npt.NDArray[np.int64]:
        """Training images (K,). Raises Missing if they are unknown."""
        if self.counts is None:
            raise Missing("plot.evaluation", f"{self.title} has no training counts (per_class.count in its JSON)")
        return self.counts


class RunFolder:
    """A run folder at `path`; `name` is what the pictures call it.

    Raises MissingFileError if there is no folder, InputError if it has none of a run's files.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        self.path = check_run(path)
        self.name = name or self.path.resolve().name

    def recipe_text(self) -> str:
        """The resolved recipe as it was saved; "" where absent."""
        path = self.path / "recipe.yaml"
        return read_text(path, MAX_RECIPE) if path.is_file() else ""

    def recipe(self) -> dict[str, object]:
        """The recipe as plain values; {} where absent."""
        path = self.path / "recipe.yaml"
        return read_yaml(path) if path.is_file() else {}

    def setting(self) -> tuple[str, str] | None:
        """Return (setting, seed), None without a recipe: the setting is equal for runs that differ only in SAME."""
        recipe = self.recipe()
        with suppress(RecipeError):  # with every key that later versions have added; as it was saved where not ours
            recipe = load(self.path / "recipe.yaml").to_dict()
        if not recipe:
            return None
        kept = {key: value for key, value in recipe.items() if key not in SAME}
        return json.dumps(kept, sort_keys=True, default=str), str(recipe.get("seed", 0))

    def environment(self) -> dict[str, object]:
        """Versions, git state ...; {} where absent."""
        path = self.path / "environment.json"
        return read_json(path) if path.is_file() else {}

    def rows(self) -> list[Line]:
        """The lines of metrics.jsonl, without incomplete ones. Raises Missing if there is none."""
        rows = lines(self.path / "metrics.jsonl")
        if not rows:
            raise Missing("plot.log", f"run {self.name} has no training log (metrics.jsonl)")
        return rows

    def evaluations(self) -> list[str]:
        """Names <split>-<checkpoint> of the evaluations with predictions, the default one first.

        That is the test split at the last checkpoint, else at the best, else by name; evaluations with other data or
        settings than the run's own come last.
        """
        names = sorted(path.stem for path in (self.path / "evaluation").glob("*.safetensors"))
        names = sorted(names, key=lambda name: _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED))
        return sorted(names, key=lambda name: CHANGED in name)

    def evaluation(self, name: str = "") -> Evaluation:
        """The evaluation of this name, or the default one. Raises Missing if there is none."""
        known = self.evaluations()
        if not known or (name and name not in known) or (not name and CHANGED in known[0]):
            wanted = name or "with predictions"
            raise Missing(
                "plot.evaluation", f"run {self.name} has no evaluation {wanted}, only {known}: rescom-timm evaluate"
            )
        stem = self.path / "evaluation" / (name or known[0])
        predictions, json_path = (stem.with_name(stem.name + ending) for ending in (".safetensors", ".json"))
        try:
            arrays = load_file(predictions)
            if missing := {"labels", "predicted", "confidence"} - arrays.keys():
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except (SafetensorError, ValueError, OSError) as error:
            raise Missing(
                "plot.evaluation", f"cannot read {predictions} ({error}): rescom-timm evaluate {self.path} writes it"
            ) from error
        record = read_json(json_path) if json_path.is_file() else {}
        counts = record.get("per_class", {}).get("count")
        class_names = [str(name) for name in record.get("class_names") or ()]
        highest = 1 + max(int(arrays[key].max(initial=-1)) for key in ("labels", "predicted"))
        if highest > MAX_CLASSES:
            raise InputError("plot.evaluation", f"{predictions}: class {highest - 1} is above {MAX_CLASSES:,} classes")
        num_classes = len(counts or class_names) or highest
        if num_classes < highest or (counts and class_names and len(counts) != len(class_names)):
            raise InputError("plot.evaluation", f"{json_path} and its predictions have different numbers of classes")
        return Evaluation(
            self.name,
            stem.name,
            arrays["labels"].astype(np.int64),
            arrays["predicted"].astype(np.int64),
            arrays["confidence"].astype(np.float32),
            num_classes,
            np.asarray(counts, dtype=np.int64) if counts else None,
            class_names or [str(k) for k in range(num_classes)],
            record.get("numbers", {}),
            str(record.get("chosen", "")),
            metrics.read_limits(record.get("group_limits")),
            record.get("intervals", {}),
            str(record.get("data") or ""),
        )


def open_runs(paths: Iterable[str | Path]) -> list[RunFolder]:
    """The run folders, with unique names: the folder's, preceded by its parents' if two would be equal."""
    runs = [RunFolder(path) for path in paths]
    names = names_of(run.path for run in runs)
    return [RunFolder(run.path, name) for run, name in zip(runs, names, strict=True)]


def names_of(paths: Iterable[Path]) -> list[str]:
    """The last part of each path, with its parents' where two would be the same."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, 8):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names
