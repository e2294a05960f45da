"""The steps of a fit, from images to a run. Each is checked against the one before it."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file

from rescom_timm.config.loading import FREE_KEYS, differences, load_dict
from rescom_timm.config.recipe import Recipe
from rescom_timm.data.broken import unreadable
from rescom_timm.data.index_files import first_few
from rescom_timm.data.sources import Data, load
from rescom_timm.data.splits import Split
from rescom_timm.engine.errors import Stopped
from rescom_timm.engine.features import Features, read_logits
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.errors import InputError
from rescom_timm.fitting import page, plan
from rescom_timm.fitting.backbones import nets
from rescom_timm.fitting.budget import Budget, sampled
from rescom_timm.fitting.candidates import (
    SHARES,
    Candidate,
    Weights,
    best,
    decide,
    encoder_of,
    row,
    score,
    soup_of,
    with_head,
)
from rescom_timm.fitting.choice import (
    ENOUGH,
    FOLDS,
    TENSORS,
    choose,
    cross_validated,
    decides,
    of_tensors,
    repetitions,
    scored,
    temperature_of,
)
from rescom_timm.fitting.features import features_of
from rescom_timm.fitting.inventory import SEEN, changes, inventory
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.fitting.record import FOLDER, Record
from rescom_timm.fitting.soups import loaded
from rescom_timm.fitting.source import joined, read
from rescom_timm.fitting.tasks import Images, read_together, train_elsewhere
from rescom_timm.fitting.training import (
    Kind,
    Outcome,
    floor_of,
    measured,
    size_of,
    trained,
    training_recipe,
)
from rescom_timm.fitting.workers import Workers
from rescom_timm.fitting.writing import write_run
from rescom_timm.io import read_json, write_json, write_tensors
from rescom_timm.methods.heads import KINDS, Fitted, Standard, class_means, named, standard
from rescom_timm.models.classifiers import ClassifierConfig, read_class_features
from rescom_timm.models.net import Net
from rescom_timm.text import counted

SHARED = 5.0
"""Seconds of a pass over images from which on other workers do a part of it."""
NAMES = "class names"
"""The head over CLIP-like nets that class names give."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; `folder` holds the best so far, None where there is nothing yet."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        best = f"the best so far is in {folder}" if folder else "there is no head yet"
        super().__init__(f"stopped; {best}; the same command goes on")


class Steps:
    """The steps, in order; `candidates` are the ones so far, the simplest first."""

    def __init__(self, options: FitOptions, run: Path, record: Record, workers: Workers) -> None:
        self.options, self.run_folder, self.record, self.workers = options, run, record, workers
        self.folder = run / FOLDER
        self.candidates: list[Candidate] = []
        self.base = self._base()
        self.data: Data = load(self.base.data)
        if "frozen" not in record.values:
            self._check_images()
        validation = self.data.validation
        self.enough = validation is not None and decides(validation.labels, len(self.data.counts))
        self.budget = Budget(options, record, self.data, self.enough)
        self.images = self.budget.images
        print(self._summary(), flush=True)

    def _check_images(self) -> None:
        """Raises InputError (image.unreadable) with the images that cannot be read by their headers, of all splits."""
        found: list[str] = []
        for split in (self.data.train, self.data.validation, self.data.test):
            if split is not None:
                found += [problem for _, problem in unreadable(split, False, self.base.loader.reading)]
        if found:
            raise InputError(
                "image.unreadable",
                f"{counted(len(found), 'image')} cannot be read: {'; '.join(found[:3])}{' ...' * (len(found) > 3)}. "
                "Repair or remove them, or fit a recipe without them: rescom-timm init FOLDER --leave-out",
            )

    def _summary(self) -> str:
        """The images, and what decides among methods."""
        how = f"at least {ENOUGH} a class, which choose among methods" if self.enough else "too few to choose methods"
        validation = (
            f"{self.images['validation']:,} validation images, {how}" if self.data.validation else "no validation"
        )
        return f"{self.data.summary()}; {validation}; {self.images['test']:,} test images, used once at the end"

    def _base(self) -> Recipe:
        """The recipe of the images, the same after an interruption. Raises InputError where anything has changed."""
        path, seen = (self.folder / name for name in SEEN)
        files = (self.options.weights_file, self.options.class_features)
        if not seen.is_file():
            recipe = read(self.options, self.folder)
            write_json(path, recipe.to_dict())
            write_json(seen, inventory(load(recipe.data), files))
            return recipe
        recipe = load_dict(read_json(path), str(path))
        with TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            now = read(self.options, Path(scratch))
            found = changes(read_json(seen), inventory(load(now.data), files))
        what = [f"{len(names):,} {how}: {first_few(names, 3)}" for how, names in found.items()]
        what += differences(recipe.to_dict(), now.to_dict(), (*FREE_KEYS, "data"))
        if what:
            raise InputError(
                "fit.changed",
                f"{self.options.source} has changed since {self.run_folder} was begun ({'; '.join(what)}): fit into "
                "another folder with -o",
            )
        return recipe

    def run(self) -> None:
        """All of it. Raises Interrupted, with the best so far handed back."""
        try:
            self.probe()
            self.train()
        except (KeyboardInterrupt, Stopped) as error:
            self.record.save()
            if not self.candidates:
                raise Interrupted(None) from error
            self.finish(last=False)
            raise Interrupted(self.run_folder) from error
        self.finish(last=True)

    # ---------------------------------------------------------------- the frozen net and its heads

    def probe(self) -> None:
        """Features of each backbone, heads over them, and the backbone that goes on."""
        accelerator = new_accelerator("no")
        backbones = list(nets(self.options, self.base, len(self.data.counts), self.record))
        for recipe, net in backbones:
            if recipe.net.backbone not in self.record.values["paces"]:
                trial = training_recipe(recipe, "linear", 1, self.images["train"], self.folder / "start", False)
                self.budget.measured(recipe.net.backbone, measured(accelerator, net, trial, self.data))
        width = max(int(net.classifier.in_features) for _, net in backbones)
        self.repeats = 0 if self.enough else repetitions(self.images["train"], len(self.data.counts), width)
        self.frozen = self.budget.frozen(1 if self.enough else 1 + (FOLDS - 1) * max(self.repeats, 1))
        validation = self.data.validation
        self.validation = None if validation is None else sampled(validation, self.frozen.at_most)
        found: list[tuple[Recipe, Net, Features, list[Candidate]]] = []
        for recipe, net in backbones:
            train = self._features(accelerator, net, recipe, self.data.train)
            heads = self._heads(accelerator, recipe, net, train, partial(encoder_of, net))
            found.append((recipe, net.cpu(), train, heads))
            self.record.save()
        place = best([one[-1][0] for one in found]) if len(found) > 1 else 0
        self.recipe, self.net, self.features, self.candidates = found[place]
        self.backbone = self.recipe.net.backbone
        print(
            f"{self.backbone} at {size_of(self.recipe)} pixels: heads over the frozen net after "
            f"{self.record.seconds / 60:.1f} of {self.options.minutes:g} minutes",
            flush=True,
        )

    def _features(self, accelerator: Accelerator, net: Net, recipe: Recipe, split: Split) -> Features:
        """Of the training images that heads are fitted to."""
        split, versions = sampled(split, self.frozen.at_most), self.frozen.versions
        found = self._pass(accelerator, net, recipe, split, "train", versions == 2)
        if found.seconds:
            self.budget.observed(recipe.net.backbone, found.seconds / (versions * len(found.labels)))
        return found

    def _pass(
        self, accelerator: Accelerator, net: Net, recipe: Recipe, split: Split, name: str, flipped: bool
    ) -> Features:
        """Features of a sampled split of the recipe's data, by all workers where it takes long."""
        net, together = net.to(accelerator.device), None
        seconds = self.budget.pace(recipe.net.backbone).forward * len(split.rows) * (1 + flipped)
        if seconds > SHARED and self.workers.number() > 1:
            images = Images(name, self.frozen.at_most)
            together = partial(read_together, self.workers, accelerator, net, recipe, split, images, flipped)
        return features_of(accelerator, net, recipe, split, flipped, together)

    def _heads(
        self, accelerator: Accelerator, recipe: Recipe, net: Net, train: Features, weights: Callable[[], Weights],
        only: str | None = None,
    ) -> list[Candidate]:  # fmt: skip
        """A head of each kind, at the setting that is best on validation. weights: of the net below the head."""
        validation = None
        if self.validation is not None:
            validation = self._pass(accelerator, net, recipe, self.validation, "validation", False)
        classes = len(self.data.counts)
        counts = train.counts(classes)
        rows = train.rows()
        scale = standard(rows)
        found = []
        for name, (about, fit) in self._kinds(net).items():
            if only not in (None, name) or (name == "logistic regression" and not self.frozen.logistic):
                continue
            began = time.monotonic()
            options = fit(rows, counts, scale)
            if name == "probe":
                self.record.values.setdefault("probe_seconds", time.monotonic() - began)
            if validation is None or self.repeats:
                scores = cross_validated(train, fit, classes, max(self.repeats, 1), self.options.seed)
            else:
                scores = [score(scale.folded(head), validation) for head in options]
            place = choose(scores)[0]
            factor = 1 / temperature_of(scores[place])
            head = scale.folded(options[place]).scaled(factor)
            shown = None if validation is None else score(head, validation)
            own = scores[place].scaled(factor)
            by = "cross-validation" if validation is None or self.repeats else "validation"
            whole = partial(with_head, weights, head.state())
            found.append(
                Candidate(name, about, "linear", whole, own, by, shown, None, (name, place), factor, len(options))
            )
        return found

    def _kinds(self, net: Net) -> dict[str, tuple[str, Fitted]]:
        """The kinds of heads over a net, the simplest first."""
        if (file := self.options.class_features) is None:
            return KINDS
        try:
            features = read_class_features(file, self.data.class_names, int(net.classifier.in_features))
        except ValueError as error:
            raise InputError("fit.weights", f"--class-features: {error}") from error
        probe = {"probe": KINDS["probe"]}
        return probe | {NAMES: ("cosine to the features of class names", named(features))} | KINDS

    # ---------------------------------------------------------------- training from the heads

    def train(self) -> None:
        """Train the candidates of the plan from their heads, with soups with their starts and heads re-fitted on them.

        Other workers train some of them where there are any.
        """
        planned = self.budget.planned(self.backbone, self.workers.number())
        after = self.budget.reserve(self.backbone).after
        starts: dict[Kind, tuple[Candidate, Recipe]] = {}
        for kind, epochs in planned:
            start, path = self._start(kind), self.folder / f"{kind}-start.safetensors"
            if not path.is_file():
                write_tensors(path, start.weights())
            recipe = training_recipe(self.recipe, kind, epochs, self.images["train"], path, self.enough)
            starts[kind] = start, recipe
            if kind not in self.record.values["trained"]:
                left, floor = self.budget.left - after(len(planned)), floor_of(start.shown)
                train_elsewhere(self.workers, kind, recipe, self.data.class_names, floor, left, self.epoch)
        heads, added = self.candidates, dict[Kind, list[Candidate]]()
        for waits in (False, True):  # what is free, then what other workers have
            for kind, (start, recipe) in starts.items():
                remaining = len(planned) - len(added)
                if kind in added or not (found := self._outcome(kind, start, recipe, after(remaining), waits)):
                    continue
                weights = partial(soup_of, Path(str(recipe.init_from)), recipe)
                added[kind] = self._trained(start, weights, kind, after(remaining - 1)) if found["used"] else []
                self.candidates = heads + [one for kind in starts for one in added.get(kind, [])]
                self.record.save()

    @property
    def epoch(self) -> float:
        """Seconds that one is expected to take."""
        return plan.epoch_seconds(self.budget.pace(self.backbone), self.images)

    def _outcome(self, kind: Kind, start: Candidate, recipe: Recipe, after: float, waits: bool) -> Outcome | None:
        """Of a training, done here unless another worker has it; then waited for, or None. after: seconds kept."""
        done: dict[str, Outcome] = self.record.values["trained"]
        if kind not in done:

            def train() -> Outcome:
                print(f"next: {plan.described([plan.Training(kind, recipe.train.epochs)])}", flush=True)
                remaining = sum(one.kind not in done for one in self.budget.planned(self.backbone))
                seconds = (self.budget.left - after) / -(-remaining // self.workers.number())
                return trained(recipe, self.data.class_names, floor_of(start.shown), seconds, self.epoch)

            end = self.budget.reserve(self.backbone).end
            found = self.workers.result(kind, train, lambda: waits and self.budget.left > end)
            if found is None and not waits:
                return None
            done[kind] = found or Outcome(used=False, why="another worker has not finished it in time")
            if not done[kind]["used"]:
                print(f"left out: {plan.SOURCES[kind]}: {done[kind]['why']}", flush=True)
            self.record.save()
        return done[kind]

    def _start(self, kind: Kind) -> Candidate:
        """Where a training begins: the probe or, where better, the head of class names; class means as cosines."""
        if kind == "linear":
            heads = [one for one in self.candidates if one.name in ("probe", NAMES)]
            return heads[best(heads)]
        width = self.features.values.shape[-1]
        plain = Standard(torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64))
        means = class_means(self.features.rows(), len(self.data.counts), plain)
        head = {"classifier.weight": F.normalize(means.weight.cpu(), dim=1)}  # lengths scale the step, not the cosines
        weights = partial(with_head, partial(encoder_of, self.net), head)
        return self._net_candidate("cosine class means", "class means as cosines", "cosine", weights)

    def _trained(self, start: Candidate, soup: Callable[[float], Weights], kind: Kind, after: float) -> list[Candidate]:
        """The soups of start and end, the default first, the end itself, and a head re-fitted on the best of them.

        soup: by the share of the end. All but the first are left out where they do not fit before the last `after`
        seconds.
        """
        source = {"probe": "the probe", "cosine class means": "class means"}.get(start.name, start.name)
        one_pass = self.budget.pace(self.backbone).forward * self.images["validation"]
        added = []
        for share in (*SHARES, 1.0) if self.enough else SHARES[:1]:
            name = f"soup {share:g} from {source}" if share < 1 else f"trained from {source}"
            if share != SHARES[0] and not self.budget.holds(name, one_pass, after):
                continue
            about = f"{share:g} of the net trained from {source}, {1 - share:g} of its start"
            weights = partial(soup, share)
            one = self._net_candidate(name, about if share < 1 else f"all weights trained from {source}", kind, weights)
            added.append(replace(one, start=start.shown, share=share))
        if self.enough and self.budget.holds(f"a head re-fitted on {kind}", self.budget.refit(self.backbone), after):
            base = added[best(added)]
            accelerator = new_accelerator("no")
            net = self._loaded(base)
            train = self._features(accelerator, net, self.recipe, self.data.train)
            refitted = self._heads(accelerator, self.recipe, net, train, base.weights, "probe")[0]
            about = f"Balanced Softmax probe fitted again on the features of: {base.name}"
            added.append(replace(refitted, name=f"re-fitted, {base.name}", about=about))
        return added

    def _net_candidate(self, name: str, about: str, kind: Kind, weights: Callable[[], Weights]) -> Candidate:
        """A candidate that is scored by showing its net the validation images."""
        found = Candidate(name, about, kind, weights, None)
        if self.validation is None:
            return found
        path = self.folder / "scores" / f"{name.replace(' ', '-')}.safetensors"
        if not path.is_file():
            logits = read_logits(new_accelerator("no"), self._loaded(found), self.recipe, self.validation)
            made = scored(logits, torch.as_tensor(self.validation.labels))
            write_tensors(path, {name: getattr(made, name) for name in TENSORS})
        tensors = load_file(path)
        kept = of_tensors([tensors[name] for name in TENSORS])
        return replace(found, scored=kept, shown=kept)

    def _loaded(self, candidate: Candidate) -> Net:
        config = replace(self.recipe.net, classifier=ClassifierConfig(candidate.kind))
        return loaded(config, self.recipe.views, len(self.data.counts), candidate.weights())

    # ---------------------------------------------------------------- the end

    def finish(self, last: bool) -> None:
        """Choose, and write the chosen net as a run, evaluated on the test images where this is the last time."""
        place, why = decide(self.candidates, self.enough)
        chosen = self.candidates[place]
        factor = 1 / temperature_of(chosen.scored) if chosen.scored is not None else 1.0
        again = last and self.options.use_validation and self.data.validation is not None
        weights = self._on_all(chosen) if again else chosen.weights()
        path = self.folder / "chosen.safetensors"
        recipe = training_recipe(self.recipe, chosen.kind, 0, self.images["train"], path, False)
        classifier = replace(self.recipe.net, classifier=ClassifierConfig(chosen.kind))
        recipe = replace(recipe, net=classifier, origin=f"chosen by fit: {chosen.name} ({why})")
        splits = self.record.values["evaluated"] if last else ("validation",)
        write_run(recipe, weights, factor, self.data.class_names, path, self.run_folder, splits)
        self.record.save(chosen=chosen.name, why=why, finished=last, table=[row(one) for one in self.candidates])
        page.write(self.run_folder, self.record, self._summary())
        print(page.text(self.run_folder, self.record))

    def _on_all(self, chosen: Candidate) -> Weights:
        """The chosen candidate made again with the validation images among those that are trained on."""
        config = joined(self.base.data, self.folder)
        if config is None:
            warnings.warn("the validation images are another split, which is not trained on", stacklevel=2)
            return chosen.weights()
        data, recipe = load(config), replace(self.recipe, data=config)
        if chosen.fitted is not None:
            return self._fitted(chosen, recipe, data)
        start = self._start(chosen.kind)
        path = self.folder / "all" / f"{chosen.kind}-start.safetensors"
        write_tensors(path, start.weights() if chosen.kind == "cosine" else self._fitted(start, recipe, data))
        epochs = dict(self.budget.planned(self.backbone))[chosen.kind]
        training = training_recipe(recipe, chosen.kind, epochs, len(data.train.labels), path, False)
        seconds = self.budget.left - self.budget.reserve(self.backbone).end
        if not trained(training, data.class_names, None, seconds, 0.0)["used"]:
            self.budget.leave_out("the last training, with the validation images")
            return chosen.weights()
        return soup_of(path, training, chosen.share)

    def _fitted(self, candidate: Candidate, recipe: Recipe, data: Data) -> Weights:
        """A fitted head of a candidate, fitted at its setting on other images."""
        accelerator, net = new_accelerator("no"), self._loaded(candidate)
        features = self._features(accelerator, net, recipe, data.train)
        scale, (name, place) = standard(features.rows()), candidate.fitted or ("probe", 0)
        fitted = self._kinds(net)[name][1](features.rows(), features.counts(len(data.counts)), scale)
        return with_head(candidate.weights, scale.folded(fitted[place]).scaled(candidate.factor).state())
