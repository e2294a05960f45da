"""Predictions of the demo page as HTML, with the nearest training images. N images, K classes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rescom_timm.data.decoding import decode
from rescom_timm.data.splits import Split
from rescom_timm.engine.errors import message
from rescom_timm.errors import InputError
from rescom_timm.inference.images import image_name
from rescom_timm.inference.predict import Prediction, Prior, embed, predict
from rescom_timm.inference.pretrained import Pretrained
from rescom_timm.text.pages import render

OWN_NUMBERS = "my own numbers"
PRIORS: dict[str, Prior | None] = {
    "as the model answers by itself": None,
    "as frequent as in training": "train",
    "all classes equally frequent": "uniform",
    OWN_NUMBERS: None,
}
"""Choices of the class prior, and each as predict takes it."""

Numbers = Sequence[Sequence[object]]
"""K rows: a class name and the number that the user wrote."""


class TrainingImages:
    """The training images of a run and their embeddings, to show the nearest ones."""

    def __init__(self, model: Pretrained, split: Split) -> None:
        """Raises InputError (predict.images) if none can be read."""
        self.split, self.reading = split, model.reading
        self.embeddings = embed(model, split)
        self.positions = {image_name(split, position): position for position in range(len(split.labels))}

    def image(self, name: str) -> Image.Image:
        """name: as in the embeddings."""
        position = self.positions[name]
        return decode(self.split.dataset[position]["image"], position, self.reading)


def first_numbers(model: Pretrained) -> list[list[object]]:
    """Rows for the user to edit: the counts in training, or 1 each if the model does not have them."""
    counts = [1] * len(model.class_names) if model.counts is None else model.counts.tolist()
    return [[name, count] for name, count in zip(model.class_names, counts, strict=True)]


def prior_of(choice: str, numbers: Numbers) -> Prior | None:
    """A choice as predict takes it. Raises InputError (predict.prior), which names the class of an invalid number."""
    if choice != OWN_NUMBERS:
        return PRIORS[choice]
    return [_number(str(name), written) for name, written in numbers]


def _number(name: str, written: object) -> float:
    try:
        number = float(str(written))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(
            "predict.prior",
            f"{name}: {'nothing' if written in (None, '') else written} is not a number of at least 0; "
            "write how frequent each class is, as counts or shares",
        )
    return number


def answers(
    model: Pretrained, files: Sequence[str], choice: str, numbers: Numbers, top_k: int,
    training: TrainingImages | None = None,
) -> str:  # fmt: skip
    """The predictions of uploaded files as HTML.

    For each file: its most probable classes, the training images of each class and the nearest training images, or its
    error. Names of files and classes are escaped.
    """
    if not files:
        return render("demo.html", note="Drop images above.")
    among, nearest = (training.embeddings, 5) if training else (None, 0)
    try:
        prior = prior_of(choice, numbers)
        found = predict(model, list(files), top_k=top_k, prior=prior, among=among, nearest=nearest)
    except (ValueError, OSError) as error:
        return render("demo.html", error=message(error))
    return render("demo.html", cards=[_card(model, one, training) for one in found])


def _card(model: Pretrained, found: Prediction, training: TrainingImages | None) -> dict[str, Any]:
    name = Path(found.image).name
    if found.error:
        return {"name": name, "error": found.error}
    counts = dict(zip(model.class_names, [] if model.counts is None else model.counts.tolist(), strict=False))
    rows = [
        (label, f"{100 * share:.1f} %", counts.get(label, "?"))
        for label, share in zip(found.labels, found.probabilities, strict=True)
    ]
    near = [] if training is None else [
        {"caption": f"{one.label} ({one.similarity:.2f})", "png": _picture(training.image(one.image), 64)}
        for one in found.nearest
    ]  # fmt: skip
    return {
        "name": name,
        "error": "",
        "png": _picture(decode(found.image, 0, model.reading), 96),
        "rows": rows,
        "near": near,
    }


def _picture(image: Image.Image, side: int) -> str:
    """A thumbnail as PNG in base64, so that the page needs no other file."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
