"""What `predict` does."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rescom_timm.api import Run
from rescom_timm.class_names import as_spelled, nfc
from rescom_timm.data.config import DataConfig
from rescom_timm.data.index_files import first_few
from rescom_timm.data.sources import Data, labelled
from rescom_timm.errors import InputError, MissingFileError
from rescom_timm.inference.export import kept_validation
from rescom_timm.inference.neighbours import Embeddings, Gatherer
from rescom_timm.inference.predict import Prediction, Prior, Reader, calibrate, embed, predictions, read_temperature
from rescom_timm.inference.predictions_table import write_csv
from rescom_timm.inference.pretrained import Pretrained, from_pretrained
from rescom_timm.inference.rules import Costs, Rule, operating_point, price, read_costs
from rescom_timm.io import read_text, write_json
from rescom_timm.metrics import groups


def predict(options: argparse.Namespace) -> int:
    """Write the CSV and print the accuracy if the labels are known. Raises InputError, and as from_pretrained does."""
    model = from_pretrained(options.model, revision=options.revision)
    prior, names = read_prior(options.prior, model.class_names), None
    by_costs = options.costs or (not options.recall and model.rule is model.costs is not None and model.temperature)
    temperature = read_temperature(model, options.temperature or ("fitted" if by_costs else 1.0))
    images: Any = options.images
    if options.data:
        images, names = labelled(DataConfig(options.data, train=options.split, index=options.list or "all"))
        names = as_spelled(names or model.class_names, model.class_names)
        if model.class_names and not set(names) & set(model.class_names):
            raise InputError(
                "data.classes",
                f"the classes of {options.data} ({', '.join(names[:3])} ...) and of the model "
                f"({', '.join(model.class_names[:3])} ...) have no name in common",
            )
    reading = {"batch_size": options.batch_size, "workers": options.workers, "device": options.device}
    search_run = bool(options.nearest) and not (options.among and Path(options.among).is_file())
    calibrates = options.coverage is not None and (_is_run(options.model) or not model.sets or options.by_group)
    data = _run_data(options.model) if calibrates or search_run else None
    rule = read_rule(options, model)
    reader = Reader(
        model, images, prior, class_names=names, crops=options.five_crops, temperature=temperature, **reading
    )
    known = prior if reader.prior is None else reader.prior
    temperature = reader.temperature  # an estimated prior takes the fitted one
    if reader.prior is not None:
        print(prior_line(reader))
    sets = among = None
    if options.coverage is not None and not calibrates:
        sets = model.prediction_sets(options.coverage, options.sets)
    elif options.coverage is not None and data is not None:
        if data.validation is None:
            raise InputError(
                "data.split",
                f"{options.model} has no validation images to calibrate prediction sets on: train it with "
                "data.validation=holdout(0.1)",
            )
        sets = calibrate(
            model, data.validation, options.coverage, by_group=options.by_group, prior=known, temperature=temperature,
            class_names=data.class_names, kind=options.sets, **reading,
        )  # fmt: skip
    if sets is not None:
        print(f"{options.sets} prediction sets: {sets.guarantee}")
    if search_run and data is not None:
        among = embed(model, data.train, class_names=data.class_names, **reading)
        if options.among:
            among.save(options.among)
            print(f"{options.among}: embeddings of {len(among.images):,} training images")
    elif options.nearest:
        among = Embeddings.load(options.among)
    gatherer = Gatherer() if options.embeddings else None
    found = predictions(
        reader, options.top_k, sets=sets, among=among, nearest=options.nearest, gatherer=gatherer, rule=rule
    )
    score = Score(model, sets is not None, options.five_crops, rule)
    number, broken = write_csv(
        score.count(found), options.output, options.top_k, sets=sets is not None, nearest=options.nearest,
        crops=options.five_crops, decisions=rule is not None,
    )  # fmt: skip
    if gatherer is not None:
        gatherer.gathered().save(options.embeddings)
    print(f"{number} images, {broken} unreadable: {options.output}{score.summary()}")
    return 0


def read_rule(options: argparse.Namespace, model: Pretrained) -> Rule | None:
    """The rule of --costs or --recall, else the one that an export keeps.

    Raises InputError (predict.classes, predict.costs, predict.calibration, data.split).
    """
    if options.costs:
        return read_costs(options.costs, model.class_names)
    if not options.recall:
        if model.rule is not None:
            print(f"decided by the rule that the model keeps: {model.rule.text}")
        return model.rule
    if not _is_run(options.model):
        message = (
            f"{options.model} is not a run's folder, so it has no validation images: use export --recall on the run"
        )
        raise InputError("run.missing", message)
    kept = kept_validation(Path(options.model))
    point = operating_point(*kept.whole(), options.recall, model.class_names)
    found, path = price(point, kept, model.class_names, model.counts, model.limits), price_file(options.output)
    print(f"{point.text}; on the validation images ({path}):\n{found.text}")
    write_json(path, {"rule": point.text, "validation": found.record()})
    return point


def price_file(table: str) -> Path:
    """The JSON of a rule's price beside the table of predictions: NAME-price.json."""
    return Path(table).with_name(f"{Path(table).stem}-price.json")


def _is_run(model: str) -> bool:
    """Whether a model is a run's folder, not an export or a Hub id."""
    return (Path(model) / "checkpoints").is_dir()


def _run_data(model: str) -> Data:
    """The data of a run. Raises InputError (run.missing) for an export or a Hub id, which has none."""
    if not _is_run(model):
        raise InputError("run.missing", f"{model} is not a run's folder, so its training data is not known")
    return Run(model).data()


class Score:
    """Accuracy over predictions of images whose class is known."""

    def __init__(
        self, model: Pretrained, sets: bool = False, crops: bool = False, rule: Rule | None = None
    ) -> None:  # fmt: skip
        self.names = model.class_names
        self.counts, self.limits = model.counts, model.limits
        self.sets, self.crops, self.rule = sets, crops, rule
        self.rows: dict[str, list[tuple[bool, bool, int, bool, bool, float]]] = {}
        """Class -> (top-1 right, class in the set, size of the set, five crops right, decision right, its cost)."""

    def count(self, found: Iterable[Prediction]) -> Iterator[Prediction]:
        """Pass the predictions on, counting those with a label."""
        for one in found:
            if one.label and one.labels:
                inside = one.inside or []
                crops = one.five_crops is not None and one.five_crops[0] == one.label
                decided, cost = one.decision == one.label, math.nan
                if isinstance(self.rule, Costs) and one.label in self.names and one.decision is not None:
                    cost = float(self.rule.matrix[self.names.index(one.label), self.names.index(one.decision)])
                row = (one.labels[0] == one.label, one.label in inside, len(inside), crops, decided, cost)
                self.rows.setdefault(one.label, []).append(row)
            yield one

    def summary(self) -> str:
        """The accuracies, in percent, as the end of a line; empty without labels."""
        if not self.rows:
            return ""
        rows = {label: np.array(found, dtype=float) for label, found in self.rows.items()}
        every = np.concatenate(list(rows.values()))
        parts = [f"; top-1 {100 * every[:, 0].mean():.2f} % of {len(every)}"]
        parts.append(f"mean of {len(rows)} classes {100 * np.mean([one[:, 0].mean() for one in rows.values()]):.2f} %")
        if self.counts is not None:
            for group, classes in groups(self.counts, self.limits).items():
                own = [rows[self.names[k]] for k in classes.tolist() if self.names[k] in rows]
                if own:
                    parts.append(f"{group} {100 * np.concatenate(own)[:, 0].mean():.2f} %")
        if self.crops:
            parts.append(f"five crops {100 * every[:, 3].mean():.2f} %")
        if self.rule is not None:
            parts.append(f"decided right {100 * every[:, 4].mean():.2f} %")
        if isinstance(self.rule, Costs):
            parts.append(f"mean cost {np.nanmean(every[:, 5]):.4g}")
        if self.sets:
            parts.append(f"sets hold the class {100 * every[:, 1].mean():.2f} %, of {every[:, 2].mean():.2f} classes")
        if unknown := sum(len(found) for label, found in rows.items() if label not in self.names and self.names):
            parts.append(f"{unknown} are of classes that the model does not have, and count as wrong")
        return ", ".join(parts)


def prior_line(reader: Reader) -> str:
    """The estimated prior, the most frequent classes first."""
    assert reader.prior is not None
    order = reader.prior.argsort(descending=True).tolist()
    shares = [f"{reader.names[k]} {100 * float(reader.prior[k]):.1f}%" for k in order]
    about = f"{len(reader.source):,} images, temperature {reader.temperature:g}"
    return f"prior estimated from {about}: {first_few(shares, 20)}"


def read_prior(text: str | None, class_names: Sequence[str] = ()) -> Prior | None:
    """`train`, `uniform`, or the K numbers of a file in the order of the K class names.

    The file has lines name,number in any order, or K numbers, whose order is then printed.
    Raises MissingFileError (file.missing) and InputError (predict.prior).
    """
    if text is None or text in ("train", "uniform", "estimate"):
        return text  # type: ignore[return-value]
    try:
        content = read_text(Path(text).expanduser())
    except FileNotFoundError:
        raise MissingFileError(
            "file.missing", f"no file {text}: give --prior train, uniform, estimate or a file of one number a class"
        ) from None
    if "," in content:
        return _named_prior(text, content, class_names)
    try:
        prior = [float(number) for number in content.split()]
    except ValueError as error:
        raise InputError("predict.prior", f"{text} is not one number a class: {error}") from None
    if len(prior) == len(class_names):
        pairs = [f"{name} {number:g}" for name, number in zip(class_names, prior, strict=True)]
        print(f"prior, in the order of the model's classes: {first_few(pairs, 20)}")
    return prior


def _named_prior(path: str, content: str, class_names: Sequence[str]) -> list[float]:
    """The numbers of lines name,number; the first line may be a header."""
    known = {nfc(name): name for name in class_names}
    found: dict[str, float] = {}
    for line, row in enumerate(csv.reader(content.splitlines(), skipinitialspace=True), start=1):
        if not row:
            continue
        name = known.get(nfc(row[0].strip()))
        try:
            number = float(",".join(row[1:]))
        except ValueError:
            if line == 1 and name is None:
                continue
            raise InputError("predict.prior", f"{path}: line {line} is not name,number: {','.join(row)!r}") from None
        if name is None:
            raise InputError(
                "predict.prior",
                f"{path}: line {line}: the model has no class {row[0]!r}; it has {first_few(class_names)}",
            )
        if name in found:
            raise InputError("predict.prior", f"{path}: line {line}: class {name!r} is given twice")
        found[name] = number
    if missing := [name for name in class_names if name not in found]:
        raise InputError("predict.prior", f"{path} has no number for {first_few(missing)}")
    return [found[name] for name in class_names]
