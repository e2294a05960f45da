"""What the verb predict does with its words."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rescom_timm.api import Run
from rescom_timm.class_names import as_spelled, nfc
from rescom_timm.data.index_files import first_few
from rescom_timm.data.sources import Data, labelled
from rescom_timm.data.splits import DataConfig
from rescom_timm.inference.neighbours import Embeddings, Gatherer
from rescom_timm.inference.predict import Prediction, Prior, Reader, calibrate, embed, predictions
from rescom_timm.inference.predictions_table import write_csv
from rescom_timm.inference.pretrained import Pretrained, from_pretrained
from rescom_timm.io import read_text
from rescom_timm.metrics import groups


def predict(options: argparse.Namespace) -> int:
    """Raises ValueError and OSError for what cannot be."""
    model = from_pretrained(options.model, revision=options.revision)
    prior, names = read_prior(options.prior, model.class_names), None
    images: Any = options.images
    if options.data:
        images, names = labelled(DataConfig(options.data, train=options.split, index=options.list or "all"))
        names = as_spelled(names or model.class_names, model.class_names)
        if model.class_names and not set(names) & set(model.class_names):
            raise ValueError(
                f"none of the classes of {options.data} ({', '.join(names[:3])} ...) is one of the model's "
                f"({', '.join(model.class_names[:3])} ...)"
            )
    reading = {"batch_size": options.batch_size, "workers": options.workers, "device": options.device}
    data = (
        _data(options.model, model.class_names) if options.coverage is not None or _makes_embeddings(options) else None
    )
    sets = among = None
    if options.coverage is not None:
        assert data is not None
        if data.validation is None:
            raise ValueError(
                f"{options.model} has no validation images, by which prediction sets are found: train it with "
                "data.validation=holdout(0.1)"
            )
        sets = calibrate(
            model, data.validation, options.coverage, by_group=options.by_group, prior=prior,
            class_names=data.class_names, **reading,
        )  # fmt: skip
        print(f"prediction sets: {sets.guarantee}")
    if options.nearest:
        among = _among(options, model, data, reading)
    gatherer = Gatherer() if options.embeddings else None
    reader = Reader(model, images, prior, class_names=names, crops=options.five_crops, **reading)
    found = predictions(reader, options.top_k, sets=sets, among=among, nearest=options.nearest, gatherer=gatherer)
    score = Score(model, sets is not None, options.five_crops)
    number, broken = write_csv(
        score.count(found), options.output, options.top_k, sets=sets is not None, nearest=options.nearest,
        crops=options.five_crops,
    )  # fmt: skip
    if gatherer is not None:
        gatherer.gathered().save(options.embeddings)
    print(f"{number} images, {broken} unreadable: {options.output}{score.told()}")
    return 0


def _makes_embeddings(options: argparse.Namespace) -> bool:
    return bool(options.nearest) and not (options.among and Path(options.among).is_file())


def _data(run: str, class_names: Sequence[str]) -> Data:
    """The data that a run was trained on, its classes numbered as in the run. Raises ValueError for a model that is no
    run."""
    if not (Path(run) / "checkpoints").is_dir():
        raise ValueError(f"{run} is no run's folder, so its training and validation images are not known")
    return Run(run).data()


def _among(options: argparse.Namespace, model: Pretrained, data: Data | None, reading: dict[str, Any]) -> Embeddings:
    if data is None or not _makes_embeddings(options):
        return Embeddings.load(options.among)
    found = embed(model, data.train, class_names=data.class_names, **reading)
    if options.among:
        found.save(options.among)
        print(f"{options.among}: embeddings of {len(found.images):,} training images")
    return found


class Score:
    """How many of the images whose class is known were labelled right."""

    def __init__(self, model: Pretrained, sets: bool = False, crops: bool = False) -> None:
        self.names = model.class_names
        self.counts, self.limits = model.counts, model.limits
        self.sets, self.crops = sets, crops
        self.right: dict[str, list[tuple[bool, bool, int, bool]]] = {}

    def count(self, found: Iterable[Prediction]) -> Iterator[Prediction]:
        for one in found:
            if one.label and one.labels:
                inside = one.inside or []
                crops = one.five_crops is not None and one.five_crops[0] == one.label
                row = (one.labels[0] == one.label, one.label in inside, len(inside), crops)
                self.right.setdefault(one.label, []).append(row)
            yield one

    def told(self) -> str:
        if not self.right:
            return ""
        rows = {label: np.array(found, dtype=float) for label, found in self.right.items()}
        every = np.concatenate(list(rows.values()))
        lines = [f"; top-1 {100 * every[:, 0].mean():.2f} % of {len(every)}"]
        lines.append(f"mean of {len(rows)} classes {100 * np.mean([one[:, 0].mean() for one in rows.values()]):.2f} %")
        if self.counts is not None:
            for group, classes in groups(self.counts, self.limits).items():
                own = [rows[self.names[k]] for k in classes.tolist() if self.names[k] in rows]
                if own:
                    lines.append(f"{group} {100 * np.concatenate(own)[:, 0].mean():.2f} %")
        if self.crops:
            lines.append(f"five crops {100 * every[:, 3].mean():.2f} %")
        if self.sets:
            lines.append(f"sets hold the class {100 * every[:, 1].mean():.2f} %, of {every[:, 2].mean():.2f} classes")
        if unknown := sum(len(found) for label, found in rows.items() if label not in self.names and self.names):
            lines.append(f"{unknown} are of classes that the model does not have, and count as wrong")
        return ", ".join(lines)


def read_prior(word: str | None, class_names: Sequence[str] = ()) -> Prior | None:
    """train, uniform, or the numbers of a file in the order of the K class names. The file has lines name,number in any
    order, or K numbers alone, of which the order is printed. Raises FileNotFoundError or ValueError."""
    if word is None or word == "train" or word == "uniform":
        return word  # type: ignore[return-value]
    try:
        text = read_text(Path(word).expanduser())
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {word}: --prior is train, uniform or a file of one number a class") from None
    if "," in text:
        return _named_prior(word, text, class_names)
    try:
        prior = [float(number) for number in text.split()]
    except ValueError as error:
        raise ValueError(f"{word} is not one number a class: {error}") from None
    if len(prior) == len(class_names):
        pairs = [f"{name} {number:g}" for name, number in zip(class_names, prior, strict=True)]
        print(f"prior, in the order of the model's classes: {first_few(pairs, 20)}")
    return prior


def _named_prior(word: str, text: str, class_names: Sequence[str]) -> list[float]:
    """The numbers of lines name,number; a first line of headings is passed over."""
    known = {nfc(name): name for name in class_names}
    found: dict[str, float] = {}
    for place, row in enumerate(csv.reader(text.splitlines(), skipinitialspace=True)):
        if not row:
            continue
        name = known.get(nfc(row[0].strip()))
        try:
            if len(row) != 2:
                raise ValueError
            number = float(row[1])
        except ValueError:
            if place == 0 and name is None:
                continue
            raise ValueError(f"{word}: line {place + 1} is not name,number: {','.join(row)!r}") from None
        if name is None:
            raise ValueError(
                f"{word}: line {place + 1}: the model has no class {row[0]!r}; it has {first_few(class_names)}"
            )
        if name in found:
            raise ValueError(f"{word}: line {place + 1}: class {name!r} is given twice")
        found[name] = number
    if missing := [name for name in class_names if name not in found]:
        raise ValueError(f"{word} has no number for {first_few(missing)}")
    return [found[name] for name in class_names]
