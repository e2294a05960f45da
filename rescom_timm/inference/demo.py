"""Predictions of the demo page as HTML, with the nearest training images. N images, K classes."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rescom_timm.data.decoding import decode
from rescom_timm.data.splits import Split
from rescom_timm.engine.errors import message
from rescom_timm.errors import InputError
from rescom_timm.inference.conformal import PredictionSets
from rescom_timm.inference.decisions import leans
from rescom_timm.inference.images import image_name
from rescom_timm.inference.neighbours import Gatherer
from rescom_timm.inference.predict import Prediction, Prior, Reader, embed, predictions
from rescom_timm.inference.pretrained import Pretrained
from rescom_timm.text import counted
from rescom_timm.text.pages import render

OWN_NUMBERS = "my own numbers"
PRIORS: dict[str, Prior | None] = {
    "as the model answers by itself": None,
    "as frequent as in training": "train",
    "all classes equally frequent": "uniform",
    OWN_NUMBERS: None,
}
"""Choices of the class prior, and each as predict takes it."""

COVERAGE = 0.9
"""Of the sets that are shown."""

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
    training: TrainingImages | None = None, gatherer: Gatherer | None = None,
) -> str:  # fmt: skip
    """The predictions of uploaded files as HTML.

    For each file: its most probable classes, whether the model is sure, the decision by its operating point, the
    training images of each class and the nearest training images, or its error. Names of files and classes are escaped.
    gatherer: collects the features of the files that can be read.
    """
    if not files:
        return render("demo.html", note="Drop images above.")
    among, nearest = (training.embeddings, 5) if training else (None, 0)
    try:
        prior = prior_of(choice, numbers)
        reader = Reader(model, list(files), prior, temperature=model.temperature or 1.0)
        shown = predictions(
            reader, top_k, sets=sets_of(model), among=among, nearest=nearest, gatherer=gatherer,
            rule=model.rule,
        )  # fmt: skip
        cards = [_card(model, *pair, training) for pair in zip(titles(files), shown, strict=True)]
    except (ValueError, OSError) as error:
        return render("demo.html", error=message(error))
    return render("demo.html", cards=cards)


def sets_of(model: Pretrained) -> PredictionSets | None:
    """The prediction sets that the page shows: prevalence-adjusted, if the model keeps them."""
    return model.sets.get(("prevalence", COVERAGE))


def titles(files: Sequence[str]) -> list[str]:
    """The files' names; of equal ones with a number, in the order given."""
    names, seen = [Path(file).name for file in files], Counter[str]()
    repeated = Counter(names)
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]} of {repeated[name]})" if repeated[name] > 1 else name)
    return found


def introduction(model: Pretrained, source: str) -> str:
    """Which model this is, and what its probabilities, sets and decisions mean, as HTML. source: its path or id."""
    recipe, lines = model.recipe, [counted(len(model.class_names), "class")]
    if model.counts is not None:
        images = counted(int(model.counts.sum()), "training image")
        lines.append(f"{images}, {model.counts.max()} to {model.counts.min()} a class")
    if recipe is not None:
        lines.insert(0, f"{recipe.net.backbone} trained with {recipe.method.name}")
    told = [f"{', '.join(lines)}."]
    by_itself = "as frequent as in training" if recipe is not None and leans(recipe) else "equally frequent"
    told.append(
        f"Class frequencies: by itself this model takes the classes for {by_itself}. Where your images come from, they "
        "may be others: choose them below, and the probability of each class is weighted by its frequency."
    )
    if model.temperature is None:
        told.append("Probabilities are not calibrated: the model has no validation images.")
    else:
        told.append(f"Probabilities are calibrated on validation images, with temperature {model.temperature:.3g}.")
    sets = sets_of(model)
    if sets is None:
        told.append("The page cannot say when the model is unsure: there were too few validation images, or none.")
    else:
        told.append(
            f"Unsure: the prediction set of the image has several classes ({sets.guarantee}). Sets do not depend on "
            "the frequencies that you choose."
        )
    if model.rule is not None:
        told.append(f"The decision is made for {model.rule.text}.")
    return render("demo.html", model=source, about=told)


def _card(model: Pretrained, name: str, found: Prediction, training: TrainingImages | None) -> dict[str, Any]:
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
        "inside": found.inside,
        "decision": found.decision,
        "near": near,
    }


def _picture(image: Image.Image, side: int) -> str:
    """A thumbnail as PNG in base64, so that the page needs no other file."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
