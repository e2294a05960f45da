"""What the demo page shows, without the page: answers as HTML, with the nearest training images.

N images, K classes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from rescom_timm.data.decoding import decode
from rescom_timm.data.splits import Split
from rescom_timm.sharing.neighbours import Neighbour
from rescom_timm.sharing.predict import Prediction, Prior, embed, image_name, predict
from rescom_timm.sharing.pretrained import Pretrained

OWN_NUMBERS = "my own numbers"
PRIORS: dict[str, Prior | None] = {
    "as the model answers by itself": None,
    "as frequent as in training": "train",
    "all classes equally frequent": "uniform",
    OWN_NUMBERS: None,
}
"""How frequent the classes are where the images come from: in words, and as predict takes it."""

Numbers = Sequence[Sequence[object]]
"""K rows: a class's name, and what was written beside it."""


class TrainingImages:
    """The training images of a run, to show those that are nearest to an image."""

    def __init__(self, model: Pretrained, split: Split) -> None:
        """Raises ValueError where none can be read."""
        self.split, self.reading = split, model.reading
        self.embeddings = embed(model, split)
        self.positions = {image_name(split, position): position for position in range(len(split.labels))}

    def image(self, name: str) -> Image.Image:
        """name: as the embeddings have it."""
        position = self.positions[name]
        return decode(self.split.dataset[position]["image"], position, self.reading)


def first_numbers(model: Pretrained) -> list[list[object]]:
    """Rows to change: the counts in training, or 1 each where the model does not tell them."""
    counts = [1] * len(model.class_names) if model.counts is None else model.counts.tolist()
    return [[name, count] for name, count in zip(model.class_names, counts, strict=True)]


def prior_of(choice: str, numbers: Numbers) -> Prior | None:
    """As predict takes it. Raises ValueError, naming the class, for what is no number of at least 0."""
    if choice != OWN_NUMBERS:
        return PRIORS[choice]
    return [_number(str(name), written) for name, written in numbers]


def _number(name: str, written: object) -> float:
    try:
        number = float(str(written))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"{name}: {'nothing' if written in (None, '') else written} is no number of at least 0; "
            "write how frequent each class is, as counts or shares"
        )
    return number


def answers(
    model: Pretrained, files: Sequence[str], choice: str, numbers: Numbers, top_k: int,
    training: TrainingImages | None = None,
) -> str:  # fmt: skip
    """HTML: for each file a card with its most probable classes, the training images of each class, and the nearest
    training images; what cannot be answered is told in its place. Names of files and classes may be anything: they are
    escaped."""
    if not files:
        return "<p>Drop images above.</p>"
    among, nearest = (training.embeddings, 5) if training else (None, 0)
    try:
        prior = prior_of(choice, numbers)
        found = predict(model, list(files), top_k=top_k, prior=prior, among=among, nearest=nearest)
    except (ValueError, OSError) as error:
        return f"<p><b>{escape(str(error))}</b></p>"
    cards = (_card(model, one, training) for one in found)
    return f'<div class="answers" style="display: flex; flex-wrap: wrap; gap: 2em">{"".join(cards)}</div>'


def _card(model: Pretrained, found: Prediction, training: TrainingImages | None) -> str:
    name = f"<h3>{escape(Path(found.image).name)}</h3>"
    if found.error:
        return f'<div class="answer">{name}<p><b>cannot be read: {escape(found.error)}</b></p></div>'
    counts = dict(zip(model.class_names, [] if model.counts is None else model.counts.tolist(), strict=False))
    head = "<tr><th>class</th><th>probability</th><th>training images</th></tr>"
    rows = [
        f"<tr><td>{escape(label)}</td><td>{100 * share:.1f} %</td><td>{counts.get(label, '?')}</td></tr>"
        for label, share in zip(found.labels, found.probabilities, strict=True)
    ]
    near = "".join(_near(training.image(one.image), one) for one in found.nearest) if training else ""
    if near:
        near = f'nearest training images<div style="display: flex; gap: 0.5em">{near}</div>'
    picture = _picture(decode(found.image, 0, model.reading), 96)
    return f'<div class="answer">{name}{picture}<table>{head}{"".join(rows)}</table>{near}</div>'


def _near(image: Image.Image, about: Neighbour) -> str:
    caption = f"{escape(about.label)} ({about.similarity:.2f})"
    return f'<figure style="margin: 0">{_picture(image, 64)}<figcaption>{caption}</figcaption></figure>'


def _picture(image: Image.Image, side: int) -> str:
    """With a data: address, so that the page needs no other file."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" style="height: {side}px" src="data:image/png;base64,{data}">'
