"""Soups of trained runs, chosen on validation images, and the temperature of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rescom_timm.class_names import numbers_in
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.sources import Data
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import base_net, build_net, whole_weights
from rescom_timm.engine.evaluate import data_of, open_checkpoint
from rescom_timm.engine.features import read_logits
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.engine.run_folder import run_recipe
from rescom_timm.errors import InputError
from rescom_timm.fitting.choice import Scored, scored, temperature_of
from rescom_timm.fitting.soups import loaded, soup
from rescom_timm.fitting.writing import write_run
from rescom_timm.methods.baselines import BalancedSoftmaxConfig, CrossEntropyConfig

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Soup:
    """The shares of the averaged runs, and how the runs and their soup score on validation.

    Scores are means over classes, in percent; None without validation images.
    """

    shares: list[float]
    alone: list[float | None]
    together: float | None
    temperature: float


class _Nets:
    """The weights of runs of one net and the same classes, and what scores them."""

    def __init__(self, runs: Sequence[Path], which: str) -> None:
        self.recipe = run_recipe(runs[0])
        self.names: list[str] | None = None
        self.weights: list[Weights] = []
        self.data: Data | None = None
        for run in runs:
            self._add(run, which)

    def _add(self, run: Path, which: str) -> None:
        own = run_recipe(run)
        found = checkpoint.newest(run / "checkpoints") if which == "best" else None
        if found is not None and found[2]["progress"]["best_checkpoint"] is None:
            which = "last"
        path, tensors, state, _ = open_checkpoint(run, which, own.evaluation.select)
        names = checkpoint.class_names(path, state)
        if self.data is None:
            self.names, self.data = names, data_of(run, self.recipe, self.recipe, names)
        elif numbers_in(self.names, names, "the first run", str(run), ordered=True) is not None:
            raise InputError("fit.soup", f"{run} numbers its classes otherwise than the first run")
        net = build_net(base_net(own, state), own.views, len(self.data.counts))
        weights = whole_weights(net, tensors, state, path)
        head = {name for name in weights if name.startswith("classifier.")}
        if not head <= {"classifier.weight", "classifier.bias"}:
            raise InputError("fit.soup", f"{run} has a classifier of its own ({own.method.name}), not a linear layer")
        weights = {n: v for n, v in weights.items() if n.startswith(("encoder.", "classifier."))}
        first = self.weights[0] if self.weights else weights
        if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in first.items()}:
            raise InputError("fit.soup", f"{run} is another net than the first run, and nets of one kind are averaged")
        if own.net.classifier != self.recipe.net.classifier:
            kinds = f"{own.net.classifier.kind}, of the first run {self.recipe.net.classifier.kind}"
            raise InputError("fit.soup", f"the classifier of {run} is {kinds}: equal ones are averaged")
        self.weights.append(weights)

    def scored(self, weights: Weights) -> Scored | None:
        """On validation; None without such images."""
        assert self.data is not None
        if self.data.validation is None:
            return None
        accelerator = new_accelerator(self.recipe.train.precision)
        net = loaded(self.recipe.net, self.recipe.views, len(self.data.counts), weights)
        logits = read_logits(accelerator, net, self.recipe, self.data.validation)
        return scored(logits, torch.as_tensor(self.data.validation.labels))


def average_runs(
    runs: Sequence[str | Path], output: str | Path, shares: Sequence[float] | None = None, checkpoint: str = "best",
    temperature: bool = False,
) -> Soup:  # fmt: skip
    """Average the weights of runs of one net, and write the soup as a run.

    shares: of each run, of sum 1; None: the greedy soup on the validation images of the first run (Wortsman et al.
    2022, arXiv 2203.05482, recipe 1, by the mean over classes): from the best run on, each next one is added to an even
    average where that is no worse. checkpoint: best (the last where none was selected), last, or a name. temperature:
    scale the logits to the least loss on validation. Raises InputError where runs cannot be averaged, or nothing says
    how much of each is taken.
    """
    folders, run = [Path(one) for one in runs], Path(output)
    if run.exists():
        raise InputError("file.exists", f"{run} is there: name another folder with -o")
    nets = _Nets(folders, checkpoint)
    scores = [nets.scored(weights) for weights in nets.weights]
    alone = [None if one is None else one.mean_class for one in scores]
    if shares is None:
        if len(folders) > 1 and scores[0] is None:
            raise InputError("fit.soup", f"{folders[0]} has no validation images to choose by: say --shares")
        shares = greedy(nets, [one or 0.0 for one in alone])
    try:
        weights = soup(nets.weights, shares)
    except ValueError as error:
        raise InputError("fit.soup", f"{', '.join(map(str, folders))}: {error}") from None
    together = nets.scored(weights)
    if temperature and together is None:
        raise InputError("fit.soup", f"{folders[0]} has no validation images, and the temperature is fitted on them")
    degree = temperature_of(together) if temperature and together is not None else 1.0
    assert nets.data is not None
    parts = (f"{share:.2f} of {one.name}" for share, one in zip(shares, folders, strict=True) if share)
    origin = f"soup: {', '.join(parts)}" if len(folders) > 1 else f"{folders[0].name} with a fitted temperature"
    recipe = replace(without_training(nets.recipe), origin=origin)
    write_run(recipe, weights, 1 / degree, nets.data.class_names, run / "soup.safetensors", run)
    return Soup(list(shares), alone, None if together is None else together.mean_class, degree)


def greedy(nets: _Nets, alone: Sequence[float]) -> list[float]:
    """Even shares of the runs that the greedy soup takes, 0 of the others."""
    order = sorted(range(len(alone)), key=lambda i: -alone[i])
    taken, top = order[:1], alone[order[0]]
    for i in order[1:]:
        trial = [*taken, i]
        scored = nets.scored(soup([nets.weights[k] for k in trial], [1 / len(trial)] * len(trial)))
        if scored is not None and scored.mean_class >= top:
            taken, top = trial, scored.mean_class
    return [1 / len(taken) if i in taken else 0.0 for i in range(len(alone))]


def without_training(recipe: Recipe) -> Recipe:
    """Return the recipe of weights that need no training.

    It has no epochs, and a method with a plain classifier whose logits mean the same.
    """
    return replace(
        recipe,
        method=CrossEntropyConfig() if recipe.method.long_tailed else BalancedSoftmaxConfig(),
        train=replace(recipe.train, epochs=0, ema=None),
        evaluation=replace(recipe.evaluation, patience=None),
        hub=type(recipe.hub)(),
        track=replace(recipe.track, log_with=()),
    )
