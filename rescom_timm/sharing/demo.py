"""What the demo page shows, without the page: answers as HTML, nearest training images.

N images, F features, K classes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rescom_timm.data.decoding import decode
from rescom_timm.data.splits import Split
from rescom_timm.sharing.predict import Prediction, Prior, Reader, predict
from rescom_timm.sharing.pretrained import Pretrained

OWN_NUMBERS = "my own numbers"
PRIORS: dict[str, Prior | None] = {
    "as the model answers by itself": None,
    "as frequent as in training": "train",
    "all classes equally frequent": "uniform",
    OWN_NUMBERS: None,
}
"""How frequent the classes are where the images come from: in words, and as predict takes it."""


def prior_of(choice: str, numbers: str) -> Prior | None:
    """numbers: text with one number a class, at commas, spaces or lines. Raises ValueError for what is none."""
    if choice != OWN_NUMBERS:
        return PRIORS[choice]
    words = [word for word in re.split(r"[\s,;]+", numbers) if word]
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError("own numbers are one number a class, such as  10, 3, 0.5") from None


def answers(model: Pretrained, files: Sequence[str], choice: str, numbers: str, top_k: int) -> str:
    """HTML: the most probable classes of each file, with the training images of each class; what cannot be answered is
    told in its place. Names of files and classes may be anything: they are escaped."""
    if not files:
        return "<p>Drop images above.</p>"
    try:
        found = predict(model, list(files), top_k=top_k, prior=prior_of(choice, numbers))
    except (ValueError, OSError) as error:
        return f"<p><b>{escape(str(error))}</b></p>"
    return f'<div class="answers">{"".join(_answer(model, one) for one in found)}</div>'


def _answer(model: Pretrained, found: Prediction) -> str:
    name = escape(Path(found.image).name)
    if found.error:
        return f"<h3>{name}</h3><p><b>cannot be read: {escape(found.error)}</b></p>"
    counts = dict(zip(model.class_names, [] if model.counts is None else model.counts.tolist(), strict=False))
    head = "<tr><th>class</th><th>probability</th><th>training images</th></tr>"
    rows = [
        f"<tr><td>{escape(label)}</td><td>{100 * share:.1f} %</td><td>{counts.get(label, '?')}</td></tr>"
        for label, share in zip(found.labels, found.probabilities, strict=True)
    ]
    picture = f'<img alt="" style="height: 96px" src="{_thumbnail(found.image)}">'
    return f"<h3>{name}</h3>{picture}<table>{head}{''.join(rows)}</table>"


def _thumbnail(path: str, side: int = 96) -> str:
    """A data: address, so that the page needs no other file."""
    image = decode(path, 0)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def features(model: Pretrained, images: Any, batch_size: int = 64) -> tuple[Tensor, list[int]]:
    """Unit vectors (N, F) of the encoder, and which of the images they are of: those that can be read. images: as
    predict takes them."""
    reader = Reader(model, images, batch_size=batch_size, device="cpu")
    vectors, positions = [torch.zeros(0, model.net.classifier.in_features)], []
    for start, batch in enumerate(reader.batches(embed=True)):
        read = [start * batch_size + i for i, about in enumerate(batch.about) if "error" not in about]
        if read:
            positions += read
            vectors.append(F.normalize(batch.features, dim=1))
    return torch.cat(vectors), positions


class TrainingImages:
    """The training images of a run, to find those that are nearest to an image by the cosine of the features."""

    def __init__(self, model: Pretrained, split: Split) -> None:
        self.model, self.split = model, split
        self.vectors, self.positions = features(model, split)

    def nearest(self, file: str, number: int = 5) -> list[tuple[Image.Image, str]]:
        """Images with captions, the nearest first; none for a file that cannot be read."""
        vector, read = features(self.model, [file])
        if not read:
            return []
        closeness, found = (self.vectors @ vector[0]).topk(min(number, len(self.vectors)))
        return [
            (self._image(self.positions[i]), f"{self._label(self.positions[i])} ({cosine:.2f})")
            for cosine, i in zip(closeness.tolist(), found.tolist(), strict=True)
        ]

    def _image(self, position: int) -> Image.Image:
        return decode(self.split.dataset[position]["image"], position)

    def _label(self, position: int) -> str:
        number = int(self.split.labels[position])
        return self.model.class_names[number] if self.model.class_names else str(number)
