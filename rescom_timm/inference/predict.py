"""Labels with probabilities for images, by a trained model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rescom_timm.class_names import as_spelled
from rescom_timm.data.loaders import one_ahead
from rescom_timm.data.progress import progress
from rescom_timm.data.shared_memory import worker_options
from rescom_timm.data.splits import Split
from rescom_timm.engine.allocator import keep_freed_memory
from rescom_timm.engine.build import prefers_channels_last
from rescom_timm.engine.evaluate import five_crops
from rescom_timm.errors import InputError
from rescom_timm.inference.conformal import Kind, PredictionSets
from rescom_timm.inference.decisions import estimated_prior, even_shift, frequencies, sets_of, shift_of
from rescom_timm.inference.images import Images, ImageSource
from rescom_timm.inference.neighbours import Embeddings, Gatherer, Neighbour
from rescom_timm.inference.pretrained import Pretrained, from_pretrained
from rescom_timm.inference.rules import Rule
from rescom_timm.models.net import Net

Prior = Sequence[float] | Tensor | Literal["uniform", "train", "estimate"]
Temperature = float | Literal["fitted"]
CPU_PART = 16
"""Images that go through the net at a time on a CPU, whose caches hold little more: 64 at once take 1.7 x as long."""
MOST = 2**28
"""Logits, images times classes, from which a prior is estimated."""


@dataclass(frozen=True)
class Prediction:
    """The k most probable classes of one image, most probable first."""

    image: str
    """Its path, or its position among the images given."""
    labels: list[str]
    probabilities: list[float]
    error: str = ""
    """Why the image could not be read; labels and probabilities are empty then."""
    label: str = ""
    """Its true class, if the images are of a data set."""
    inside: list[str] | None = None
    """The classes of its prediction set, most probable first; None without `sets`."""
    nearest: list[Neighbour] = field(default_factory=list)
    """The nearest of the images of `among`."""
    decision: str | None = None
    """The class that the rule decides for; None without `rule`."""
    five_crops: tuple[str, float] | None = None
    """The most probable class by the mean of five crops, with its probability; None without `five_crops`."""


def predict(
    model: str | Path | Pretrained,
    images: ImageSource,
    *,
    top_k: int = 5,
    prior: Prior | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    class_names: Sequence[str] | None = None,
    five_crops: bool = False,
    sets: PredictionSets | None = None,
    among: Embeddings | None = None,
    nearest: int = 0,
    temperature: Temperature = 1.0,
    rule: Rule | None = None,
) -> list[Prediction]:
    """The top-k classes of every image, in order; the error of an unreadable image is in its Prediction.

    model: as in from_pretrained, or its result. images: a file, a folder (recursive, sorted), a list of files, PIL
    images or arrays, or a Split of a data set. prior: how frequent the K classes are among the images, as K counts or
    probabilities, "uniform", "train" (as in training) or "estimate" (by EM over the images themselves, in a pass of its
    own; Saerens et al. 2002); None: the model's own logits. The logits s of Balanced
    Softmax and its relatives are those of equally frequent classes (the training frequencies are in the loss), so by
    Bayes' rule s + log prior are those of the prior (Ren et al. 2020, eq. 3; Menon et al. 2021); for a model trained
    with plain cross-entropy the log of the sampled frequencies is subtracted first.
    temperature: T of softmax(s / T + log prior), or "fitted": the one of the run's validation images (Guo et al. 2017).
    class_names: of the labels of a Split; None: the model's. five_crops: also the mean of five crops. sets: prediction
    sets made by `calibrate`. nearest: how many nearest images of `among`, made by `embed`, to return.
    rule: an operating point or costs (`rules`), which gives each image a decision beside its probabilities.
    Raises MissingFileError and InputError (predict.images, predict.value, predict.prior, predict.embeddings, and those
    of from_pretrained).
    """
    reader = Reader(model, images, prior, batch_size, workers, device, class_names, five_crops, temperature)
    return list(predictions(reader, top_k, sets=sets, among=among, nearest=nearest, rule=rule))


def predictions(
    reader: Reader,
    top_k: int = 5,
    *,
    sets: PredictionSets | None = None,
    among: Embeddings | None = None,
    nearest: int = 0,
    gatherer: Gatherer | None = None,
    rule: Rule | None = None,
) -> Iterator[Prediction]:
    """The predictions of a reader's images one by one, for more images than results fit in memory.

    Arguments and errors as in predict. gatherer: collects the embeddings of all images that can be read.
    """
    if top_k < 1:
        raise InputError("predict.value", f"top_k must be at least 1, not {top_k}")
    if nearest < 0 or bool(nearest) != (among is not None):
        message = "nearest and among go together: the number of nearest images, and the embeddings to search"
        raise InputError("predict.value", message)

    def found() -> Iterator[Prediction]:
        for batch in reader.batches(embed=among is not None or gatherer is not None):
            answered = iter(_answers(batch, reader.names, top_k, sets, among, nearest, rule))
            read = [about for about in batch.about if "error" not in about]
            if gatherer is not None and read:
                images, labels = ([about.get(key, "") for about in read] for key in ("image", "label"))
                gatherer.add(batch.features, batch.embeddings, images, labels)
            for about in batch.about:
                fields: dict[str, Any] = {"labels": [], "probabilities": [], **about}
                yield Prediction(**(fields if "error" in about else fields | next(answered)))

    return found()


def _answers(
    batch: _Batch, names: Sequence[str], top_k: int, sets: PredictionSets | None, among: Embeddings | None,
    nearest: int, rule: Rule | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Fields of the Predictions of a batch's readable images."""
    if not len(batch.logits):
        return []
    top = batch.probabilities.topk(min(top_k, len(names)))
    columns: dict[str, Sequence[object]] = {
        "labels": [[names[k] for k in row] for row in top.indices.tolist()],
        "probabilities": top.values.tolist(),
    }
    if sets is not None:
        inside = sets.of_logits(batch.logits, batch.probabilities)
        order = batch.probabilities.masked_fill(~inside, -1).argsort(dim=1, descending=True, stable=True).tolist()
        sizes = inside.sum(dim=1).tolist()
        columns["inside"] = [[names[k] for k in row[:size]] for row, size in zip(order, sizes, strict=True)]
    if rule is not None:
        columns["decision"] = [names[k] for k in rule.decide(batch.logits, batch.probabilities).tolist()]
    if among is not None:
        columns["nearest"] = among.nearest(batch.features, nearest)
    if batch.crops is not None:
        best = batch.crops.max(dim=1)
        columns["five_crops"] = [
            (names[k], share) for k, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def embed(
    model: str | Path | Pretrained,
    images: ImageSource,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    class_names: Sequence[str] | None = None,
) -> Embeddings:
    """Features and embeddings of all images that can be read; arguments and errors as in predict."""
    gatherer = Gatherer()
    reader = Reader(model, images, None, batch_size, workers, device, class_names)
    for _ in predictions(reader, 1, gatherer=gatherer):
        pass
    return gatherer.gathered()


def calibrate(
    model: str | Path | Pretrained,
    split: Split,
    coverage: float,
    *,
    by_group: bool = False,
    prior: Prior | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    class_names: Sequence[str] | None = None,
    temperature: Temperature = 1.0,
    kind: Kind = "marginal",
) -> PredictionSets:
    """Prediction sets that contain the true class with probability `coverage`.

    split: labelled images that the model was not trained on, such as a run's validation split. by_group: separately for
    many, medium and few. prior, temperature: as later in predict. kind: "prevalence" makes prevalence-adjusted sets,
    which have the prior of these images and the fitted temperature, if there is one, unless others are given. Raises
    InputError (predict.calibration) for too few or unreadable images and for unknown classes.
    """
    reader = Reader(model, split, prior, batch_size, workers, device, class_names, temperature=temperature)
    numbers = {name: k for k, name in enumerate(reader.names)}
    logits, labels = [], []
    for batch in reader.batches():
        for about in batch.about:
            if "error" in about:
                raise InputError("predict.calibration", f"{about['error']}: repair it or leave it out")
            if about["label"] not in numbers:
                message = f"{about['image']} is of class {about['label']!r}, which the model does not have"
                raise InputError("predict.calibration", message)
            labels.append(numbers[about["label"]])
        logits.append(batch.logits.cpu())
    read, classes = reader.model, len(reader.names)
    if by_group and read.counts is None:
        raise InputError("predict.prior", "this model has no class counts of its training, so it has no groups")
    fitted = kind == "prevalence" and reader.temperature == 1 and read.temperature is not None
    own = reader.prior if prior == "estimate" else None if prior is None else frequencies(prior, read.counts, classes)
    even = reader.even if kind == "marginal" else even_shift(read.recipe, read.counts, classes)
    return sets_of(
        torch.cat(logits), torch.tensor(labels), coverage, even, kind,
        read.temperature if fitted and read.temperature else reader.temperature,
        own, read.counts if by_group else None, read.limits,
    )  # fmt: skip


class _Batch(NamedTuple):
    """about: fields of each image's Prediction, with `error` if it could not be read.

    The tensors are of the R others: logits (R, K) of the net, probabilities (R, K), and if requested features (R, F),
    embeddings (R, D), the mean of five crops (R, K).
    """

    about: list[dict[str, str]]
    logits: Tensor
    probabilities: Tensor
    features: Tensor
    embeddings: Tensor
    crops: Tensor | None


class Reader:
    """A model on its device, and the images to predict."""

    def __init__(
        self,
        model: str | Path | Pretrained,
        images: ImageSource,
        prior: Prior | None = None,
        batch_size: int = 64,
        workers: int = 0,
        device: str | torch.device | None = None,
        class_names: Sequence[str] | None = None,
        crops: bool = False,
        temperature: Temperature = 1.0,
    ) -> None:
        """Arguments and errors as in predict; crops is its five_crops."""
        if batch_size < 1:
            raise InputError("predict.value", f"batch_size must be at least 1, not {batch_size}")
        self.source = Images(images)
        self.model = model if isinstance(model, Pretrained) else from_pretrained(model)
        self.names = self.model.class_names or [str(k) for k in range(self.model.net.classifier.out_features)]
        self.temperature = read_temperature(self.model, temperature)
        plain = prior is None and self.temperature == 1
        self.even = (
            torch.zeros(len(self.names)) if plain else even_shift(self.model.recipe, self.model.counts, len(self.names))
        )
        if prior == "estimate" and len(self.source) * len(self.names) > MOST:
            message = (
                f"a prior is estimated from at most {MOST // len(self.names):,} images of {len(self.names):,} classes"
            )
            raise InputError("predict.prior", f"{message}: estimate it from some, and give it as a file for all")
        self.shift = self._shift(prior if prior != "estimate" else "uniform")
        self.batch_size, self.workers = batch_size, workers
        policies = five_crops(self.model.eval_policy) if crops else []
        self.source.prepare(self.model, as_spelled(class_names or self.names, self.names), policies)
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            net = copy.deepcopy(model.net) if isinstance(model, Pretrained) else self.model.net  # a caller's stays
            self.net = net.to(self.device).eval()
            chosen = None if self.model.recipe is None else self.model.recipe.speed.channels_last
            if prefers_channels_last(self.net, self.device, "no") if chosen is None else chosen:  # as evaluate does
                self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
            message = f"device {device} cannot be used here: {str(error).splitlines()[0]}"
            raise InputError("predict.value", message) from None
        self.part = batch_size * (1 + len(policies))
        if self.device.type == "cpu":
            keep_freed_memory()
            self.part = min(self.part, CPU_PART)
        self.prior: Tensor | None = None
        """(K,), where it was estimated from the images."""
        if prior == "estimate":
            self._estimate()

    def _shift(self, prior: Prior | None) -> Tensor:
        """What is added to s / T, (K,), for a prior; None: as the model was trained to answer."""
        share = None if prior is None else frequencies(prior, self.model.counts, len(self.names))
        return shift_of(share, self.even, self.temperature)

    def _estimate(self) -> None:
        """The prior of the images, in a pass over them of its own, by the fitted temperature if there is one."""
        if self.temperature == 1 and self.model.temperature is not None:
            self.temperature = self.model.temperature
        found = [batch.logits.cpu() for batch in self.batches() if len(batch.logits)]
        self.prior = estimated_prior(torch.cat(found) + self.even.float(), self.temperature) if found else None
        self.shift = self._shift("uniform" if self.prior is None else self.prior)

    @torch.inference_mode()
    def batches(self, embed: bool = False) -> Iterator[_Batch]:
        """Yield the predictions batch by batch, in order. embed: with features and embeddings."""
        image = 3 * math.prod(self.source.size) * len(self.source.policies)  # bytes
        options = worker_options(self.workers, 2, self.batch_size * image)
        loader = DataLoader(self.source, self.batch_size, collate_fn=list, **options)
        batches = one_ahead(loader) if self.workers == 0 and self.source.from_disk else loader
        for batch in progress(batches, "predict", len(self.source), len):
            read = [views for views, _ in batch if views is not None]
            features = embeddings = probabilities = found = torch.empty(0, 0)
            crops = None
            if read:
                views = torch.stack(read).to(self.device)  # (R, 1 or 6, 3, H, W)
                if embed:
                    parts = map(self._embed, views[:, 0].split(self.part))
                    features, found, embeddings = (torch.cat(column) for column in zip(*parts, strict=True))
                else:
                    found = self._classify(views[:, 0])
                found = found.float()
                probabilities = self._answer(found)
                if views.shape[1] > 1:
                    each = self._classify(views[:, 1:].flatten(0, 1))
                    crops = self._answer(each.unflatten(0, (len(views), -1)).float().mean(dim=1))
            yield _Batch([about for _, about in batch], found, probabilities, features, embeddings, crops)

    def _classify(self, images: Tensor) -> Tensor:
        return torch.cat([self.net.classify(part) for part in images.split(self.part)])

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features, logits and embeddings, float32; the logits as from `classify`."""
        features, _, embeddings, *_ = self.net(images)
        plain = type(self.net) is Net  # subclasses, such as experts, override classify
        logits = self.net.classify_features(features) if plain else self.net.classify(images)
        return features.float().cpu(), logits, embeddings.cpu()

    def _answer(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature + self.shift.to(self.device)).softmax(dim=1)


def read_temperature(model: Pretrained, temperature: Temperature) -> float:
    """The number, or the one fitted on validation images. Raises InputError (predict.value)."""
    if temperature == "fitted":
        if model.temperature is None:
            raise InputError(
                "predict.value",
                "this model has no fitted temperature: train it with validation images (data.validation=holdout(0.1)), "
                "or give a number",
            )
        return model.temperature
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise InputError("predict.value", f"temperature must be a number above 0, or fitted, not {temperature!r}")
    return float(temperature)
