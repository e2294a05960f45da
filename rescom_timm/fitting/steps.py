"""The steps of a fit, from images to a run. Each is checked against the one before it."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file

from rescom_timm.config.loading import FREE_KEYS, differences, load_dict
from rescom_timm.config.recipe import EvaluationConfig, Recipe, RecipeError
from rescom_timm.data.index_files import first_few
from rescom_timm.data.sources import Data, load
from rescom_timm.engine.build import build_net
from rescom_timm.engine.errors import NonFiniteLoss, Stopped, one_line
from rescom_timm.engine.features import Features, read_logits
from rescom_timm.engine.launch import new_accelerator
from rescom_timm.engine.trainer import SPLITS
from rescom_timm.errors import InputError
from rescom_timm.fitting import page, plan
from rescom_timm.fitting.candidates import SHARES, Candidate, Weights, best, decide, row, score
from rescom_timm.fitting.choice import ENOUGH, Scored, choose, cross_validated, decides, repetitions, temperature_of
from rescom_timm.fitting.features import features_of
from rescom_timm.fitting.inventory import changes, inventory
from rescom_timm.fitting.plan import FitOptions
from rescom_timm.fitting.record import FOLDER, Record
from rescom_timm.fitting.soups import loaded, soup
from rescom_timm.fitting.source import is_recipe, joined, read
from rescom_timm.fitting.training import Diverged, Kind, Pace, floor_of, measured, size_of, trained, training_recipe
from rescom_timm.fitting.writing import write_run
from rescom_timm.io import read_json, write_json, write_tensors
from rescom_timm.methods.heads import KINDS, Fitted, Standard, class_means, named, standard
from rescom_timm.models.classifiers import ClassifierConfig, read_class_features
from rescom_timm.models.net import Net, NetConfig, check_backbone

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

    def __init__(self, options: FitOptions, run: Path, record: Record) -> None:
        self.options, self.run_folder, self.record = options, run, record
        self.folder = run / FOLDER
        self.candidates: list[Candidate] = []
        self.base = self._base()
        self.data: Data = load(self.base.data)
        validation = self.data.validation
        splits = {"train": self.data.train, "test": self.data.test, "validation": validation}
        self.images = {name: 0 if split is None else len(split.labels) for name, split in splits.items()}
        self.enough = validation is not None and decides(validation.labels, len(self.data.counts))
        print(self._summary(), flush=True)

    def _summary(self) -> str:
        """The images, and what decides among methods."""
        how = f"at least {ENOUGH} a class, which choose among methods" if self.enough else "too few to choose methods"
        validation = (
            f"{self.images['validation']:,} validation images, {how}" if self.data.validation else "no validation"
        )
        return f"{self.data.summary()}; {validation}; {self.images['test']:,} test images, used once at the end"

    def _base(self) -> Recipe:
        """The recipe of the images, the same after an interruption. Raises InputError where anything has changed."""
        path, seen = self.folder / "images.json", self.folder / "inventory.json"
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
            self.train(self.planned())
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
        found: list[tuple[Recipe, Net, Features, list[Candidate]]] = []
        for recipe, net in self._nets():
            accelerator = new_accelerator("no")
            net.to(accelerator.device)
            flipped = self._measure(accelerator, recipe, net)
            train = features_of(accelerator, net, recipe, self.data.train, flipped)
            found.append((recipe, net.cpu(), train, self._heads(accelerator, recipe, net, train)))
            self.record.save()
        place = best([one[-1][0] for one in found]) if len(found) > 1 else 0
        self.recipe, self.net, self.features, self.candidates = found[place]
        print(
            f"{self.recipe.net.backbone} at {size_of(self.recipe)} pixels: heads over the frozen net after "
            f"{self.record.seconds / 60:.1f} of {self.options.minutes:g} minutes",
            flush=True,
        )

    def _nets(self) -> Iterator[tuple[Recipe, Net]]:
        """The backbones to probe: those that are named, else the first of the default ones whose weights are here."""
        if self.options.backbones:
            yield from map(self._net, self.options.backbones)
            return
        device, file = new_accelerator("no").device.type, self.options.weights_file
        rows = plan.default_backbones(device, self.options.minutes)
        known = self.record.values.get("backbone")
        for name in [known] if known else [one.name for one in rows[: None if file is None else 1]]:
            with contextlib.suppress(InputError):
                found = self._net(name)
                self.record.save(backbone=name)
                yield found
                return
        raise InputError("fit.weights", _no_weights(f"{rows[0].name} ({rows[0].megabytes} MB)", file))

    def _net(self, name: str) -> tuple[Recipe, Net]:
        """A net with its weights and a new head, and its recipe. Raises InputError where the weights cannot be had."""
        file = self.options.weights_file
        config = NetConfig(name, pretrained=file != "none", weights_file=None if file == "none" else file)
        check_backbone(config.backbone)
        classes, views = len(self.data.counts), self.base.views
        try:
            with self.record.uncounted():
                set_seed(self.options.seed)  # of weights from scratch
                net = build_net(config, views, classes)
            cfg: Any = net.encoder.pretrained_cfg
            size = self.options.size or cfg["input_size"][1]
            if cfg.get("fixed_input_size") and size != cfg["input_size"][1]:
                config = replace(config, options={"img_size": size})
                set_seed(self.options.seed)
                net = build_net(config, views, classes)
        except (OSError, RuntimeError, LookupError, RecipeError) as error:  # no network, no file, or one of another net
            raise InputError("fit.weights", f"{_no_weights(name, file)}: {one_line(error)}") from error
        if not is_recipe(self.options.source):
            views = replace(views, mean=cfg["mean"], std=cfg["std"])
        net.mean.copy_(torch.tensor(views.mean).view_as(net.mean))
        net.std.copy_(torch.tensor(views.std).view_as(net.std))
        net.drop_projector()
        how = cfg["interpolation"] if cfg["interpolation"] in ("bicubic", "bilinear") else "bicubic"
        views = replace(
            views, train="flip", eval=f"resize({round(size / cfg['crop_pct'])},{how}) | center_crop({size})"
        )
        recipe = replace(
            self.base, net=config, views=views, seed=self.options.seed, evaluation=EvaluationConfig(batch_size=64)
        )
        return recipe, net

    def _measure(self, accelerator: Accelerator, recipe: Recipe, net: Net) -> bool:
        """Measure the pace, once; returns whether there is time for the features of flipped images too.

        Raises InputError where there is none for one pass over the images.
        """
        known = self.record.values.setdefault("paces", {})
        if recipe.net.backbone not in known:
            trial = training_recipe(recipe, "linear", 1, self.images["train"], self.folder / "start", False)
            pace = measured(accelerator, net, trial, self.data)
            one = pace.forward * sum(self.images.values())
            left = 60 * self.options.minutes - self.record.seconds
            if one > left:
                needed = (self.record.seconds + one) / 60
                raise InputError(
                    "fit.minutes",
                    f"one pass over {sum(self.images.values()):,} images takes longer than --minutes "
                    f"{self.options.minutes:g} on this machine: give {math.ceil(1.2 * needed)}, a smaller --size than "
                    f"{size_of(recipe)}, or a smaller --backbone",
                )
            flipped = one + pace.forward * self.images["train"] < left
            known[recipe.net.backbone] = {**asdict(pace), "flipped": flipped}
            self.record.save()
        return bool(known[recipe.net.backbone]["flipped"])

    @property
    def _flipped(self) -> bool:
        """Whether heads are fitted over flipped images too."""
        return bool(self.record.values["paces"][self.recipe.net.backbone]["flipped"])

    def _heads(
        self, accelerator: Accelerator, recipe: Recipe, net: Net, train: Features, only: str | None = None
    ) -> list[Candidate]:
        """A head of each kind, at the setting that is best on validation."""
        validation = None
        if self.data.validation is not None:
            validation = features_of(accelerator, net, recipe, self.data.validation, False)
        counts, classes = torch.as_tensor(self.data.counts), len(self.data.counts)
        rows = train.rows()
        scale = standard(rows)
        encoder = {f"encoder.{name}": value.clone() for name, value in net.encoder.state_dict().items()}
        repeats = 0 if self.enough else repetitions(train, classes)
        found = []
        for name, (about, fit) in self._kinds(net).items():
            if only not in (None, name):
                continue
            options = [scale.folded(head) for head in fit(rows, counts, scale)]
            if validation is None or repeats:
                scored = cross_validated(train, fit, classes, max(repeats, 1), self.options.seed)
            else:
                scored = [score(head, validation) for head in options]
            place = choose(scored)[0]
            factor = 1 / temperature_of(scored[place])
            head = options[place].scaled(factor)
            shown = None if validation is None else score(head, validation)
            own = scored[place].scaled(factor)
            by = "cross-validation" if validation is None or repeats else "validation"
            weights = encoder | {"classifier.weight": head.weight, "classifier.bias": head.bias}
            found.append(
                Candidate(name, about, "linear", weights, own, by, shown, None, (name, place), factor, len(options))
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

    def planned(self) -> list[plan.Training]:
        """What the rest of the budget holds; fixed at the first time it is asked."""
        known = self.record.values
        if "plan" not in known:
            forward, step = (known["paces"][self.recipe.net.backbone][name] for name in ("forward", "step"))
            pace, images = Pace(forward, step), self.images
            left = 60 * self.options.minutes - self.record.seconds - plan.reserve(pace, images, self.enough)
            twice = 2 if self.options.use_validation else 1  # trained again at the end
            chosen, more = (
                plan.trainings(seconds / twice, pace, images)
                for seconds in (left, left + 9 * 60 * self.options.minutes)
            )
            self.record.save(plan=[one._asdict() for one in chosen], more=plan.described(more))
        return [plan.Training(**one) for one in known["plan"]]

    def train(self, planned: Sequence[plan.Training]) -> None:
        """Train each candidate of the plan from its head; its soups with its start, and a head re-fitted on it."""
        done = self.record.values.setdefault("trained", {})
        for kind, epochs in planned:
            print(f"next: {plan.described([plan.Training(kind, epochs)])}", flush=True)
            if kind in done:
                continue
            start = self._start(kind)
            path = self.folder / f"{kind}-start.safetensors"
            if not path.is_file():
                write_tensors(path, start.weights)
            recipe = training_recipe(self.recipe, kind, epochs, self.images["train"], path, self.enough)
            try:
                end = trained(recipe, self.data.class_names, floor_of(start.shown))
            except (Diverged, NonFiniteLoss) as error:
                done[kind] = f"diverged and left out ({one_line(error)})"
                self.record.save()
                continue
            self._add_trained(kind, start, end)

    def _start(self, kind: Kind) -> Candidate:
        """Where a training begins: the probe or, where better, the head of class names; class means as cosines."""
        if kind == "linear":
            heads = [one for one in self.candidates if one.name in ("probe", NAMES)]
            return heads[best(heads)]
        width = self.features.values.shape[-1]
        plain = Standard(torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64))
        means = class_means(self.features.rows(), len(self.data.counts), plain)
        weights = {n: v for n, v in self.candidates[0].weights.items() if n.startswith("encoder.")}
        weights["classifier.weight"] = means.weight
        return self._net_candidate("cosine class means", "class means as cosines", "cosine", weights)

    def _add_trained(self, kind: Kind, start: Candidate, end: Weights) -> None:
        """The soups of start and end, the default first, the end itself, and a head re-fitted on the best of them."""
        source = {"probe": "the probe", "cosine class means": "class means"}.get(start.name, start.name)
        added = []
        for share in SHARES if self.enough else SHARES[:1]:
            about = f"{share:g} of the net trained from {source}, {1 - share:g} of its start"
            weights = soup([start.weights, end], [1 - share, share])
            one = self._net_candidate(f"soup {share:g} from {source}", about, kind, weights)
            added.append(replace(one, start=start.shown, share=share))
        if self.enough:
            added.append(self._net_candidate(f"trained from {source}", f"all weights trained from {source}", kind, end))
            base = added[best(added)]
            accelerator = new_accelerator("no")
            net = self._loaded(base).to(accelerator.device)
            train = features_of(accelerator, net, self.recipe, self.data.train, self._flipped)
            refitted = self._heads(accelerator, self.recipe, net, train, "probe")[0]
            about = f"Balanced Softmax probe fitted again on the features of: {base.name}"
            added.append(replace(refitted, name=f"re-fitted, {base.name}", about=about))
        self.candidates += added
        self.record.save()

    def _net_candidate(self, name: str, about: str, kind: Kind, weights: Weights) -> Candidate:
        """A candidate that is scored by showing its net the validation images."""
        found = Candidate(name, about, kind, weights, None)
        if self.data.validation is None:
            return found
        path = self.folder / "scores" / f"{name.replace(' ', '-')}.safetensors"
        if not path.is_file():
            logits = read_logits(new_accelerator("no"), self._loaded(found), self.recipe, self.data.validation)
            write_tensors(path, {"logits": logits})
        scored = Scored(load_file(path)["logits"], torch.as_tensor(self.data.validation.labels))
        return replace(found, scored=scored, shown=scored)

    def _loaded(self, candidate: Candidate) -> Net:
        config = replace(self.recipe.net, classifier=ClassifierConfig(candidate.kind))
        return loaded(config, self.recipe.views, len(self.data.counts), candidate.weights)

    # ---------------------------------------------------------------- the end

    def finish(self, last: bool) -> None:
        """Choose, and write the chosen net as a run, evaluated on the test images where this is the last time."""
        place, why = decide(self.candidates, self.enough)
        chosen = self.candidates[place]
        factor = 1 / temperature_of(chosen.scored) if chosen.scored is not None else 1.0
        weights = chosen.weights
        if last and self.options.use_validation and self.data.validation is not None:
            weights = self._on_all(chosen)
        path = self.folder / "chosen.safetensors"
        recipe = training_recipe(self.recipe, chosen.kind, 0, self.images["train"], path, False)
        recipe = replace(recipe, net=replace(self.recipe.net, classifier=ClassifierConfig(chosen.kind)))
        splits = SPLITS if last else ("validation",)
        write_run(recipe, weights, factor, self.data.class_names, path, self.run_folder, splits)
        self.record.save(chosen=chosen.name, why=why, finished=last, table=[row(one) for one in self.candidates])
        page.write(self.run_folder, self.record.values, self._summary())
        print(page.text(self.run_folder, self.record.values))

    def _on_all(self, chosen: Candidate) -> Weights:
        """The chosen candidate made again with the validation images among those that are trained on."""
        config = joined(self.base.data, self.folder)
        if config is None:
            warnings.warn("the validation images are another split, which is not trained on", stacklevel=2)
            return chosen.weights
        data, recipe = load(config), replace(self.recipe, data=config)
        if chosen.fitted is not None:
            return self._fitted(chosen, recipe, data)
        start = (
            self._start(chosen.kind).weights
            if chosen.kind == "cosine"
            else self._fitted(self._start("linear"), recipe, data)
        )
        path = self.folder / "all" / f"{chosen.kind}-start.safetensors"
        write_tensors(path, start)
        epochs = dict(self.planned())[chosen.kind]
        end = trained(
            training_recipe(recipe, chosen.kind, epochs, len(data.train.labels), path, False), data.class_names, None
        )
        return soup([start, end], [1 - chosen.share, chosen.share])

    def _fitted(self, candidate: Candidate, recipe: Recipe, data: Data) -> Weights:
        """A fitted head of a candidate, fitted at its setting on other images."""
        accelerator = new_accelerator("no")
        net = self._loaded(candidate).to(accelerator.device)
        rows = features_of(accelerator, net, recipe, data.train, self._flipped).rows()
        scale, (name, place) = standard(rows), candidate.fitted or ("probe", 0)
        head = scale.folded(self._kinds(net)[name][1](rows, torch.as_tensor(data.counts), scale)[place]).scaled(
            candidate.factor
        )
        return candidate.weights | {"classifier.weight": head.weight, "classifier.bias": head.bias}


def _no_weights(what: str, file: str | None) -> str:
    if file is not None:
        return f"the weights of {what} cannot be read from --weights-file {file} (--backbone NAME says whose they are)"
    return (
        f"the weights of {what} cannot be downloaded and are not in timm's cache: give them with --weights-file FILE "
        "(and --backbone NAME), or train from scratch with --weights-file none"
    )
