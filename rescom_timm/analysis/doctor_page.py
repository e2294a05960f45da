"""The doctor's findings as text and as one HTML page with thumbnails, which opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import repeat

from PIL import Image

from rescom_timm.data.decoding import BrokenImage
from rescom_timm.data.doctor import Examined, Finding
from rescom_timm.text.pages import render

SIDE = 96
"""Pixels of a thumbnail's longer side."""
GROUPS_SHOWN = 40
"""Groups shown of each finding."""
IMAGES_SHOWN = 8


def as_text(images: Examined, found: Sequence[Finding], class_names: Sequence[str], examples: int = 3) -> str:
    """The findings as text, each with a few examples."""
    lines = []
    for finding in found:
        lines.append(f"{finding.title}: {finding.count:,}; {finding.advice}")
        for i, group in enumerate(finding.groups[:examples]):
            if finding.key == "broken":
                lines.append(f"    {images.broken[group[0]]}")
            else:
                names = "  ~  ".join(_name(images, one, class_names) for one in group[:IMAGES_SHOWN])
                lines.append(f"    {names}" + (f": {finding.notes[i]}" if finding.notes else ""))
        lines += [f"    {line}" for line in finding.lines[:examples]]
        if finding.count > examples:
            lines.append(f"    and {finding.count - examples:,} more")
    return "\n".join(lines) or "nothing found"


def page(images: Examined, found: Sequence[Finding], class_names: Sequence[str], title: str) -> str:
    """The findings as HTML, with thumbnails of GROUPS_SHOWN groups at most; everything from the data is escaped."""
    counts = ", ".join(f"{(images.split == name).sum():,} in {name}" for name in images.splits)
    findings = [
        {
            "about": one,
            "lines": one.lines[:1000],
            "groups": [
                [_figure(images, i, class_names, note) for i in group[:IMAGES_SHOWN]]
                for group, note in zip(one.groups[:GROUPS_SHOWN], one.notes or repeat(""), strict=False)
            ],
            "more": len(one.groups) - GROUPS_SHOWN,
        }
        for one in found
    ]
    return render("doctor.html", title=title, images=len(images), counts=counts, findings=findings)


def _figure(images: Examined, i: int, class_names: Sequence[str], note: str) -> dict[str, str]:
    """caption, and the thumbnail as JPEG in base64; empty for an image that cannot be read."""
    caption = _name(images, i, class_names) + (f": {note}" if note else "")
    try:
        image = images.image(i)
    except BrokenImage:
        return {"caption": caption, "jpeg": ""}
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=80)
    return {"caption": caption, "jpeg": base64.b64encode(file.getvalue()).decode("ascii")}


def _name(images: Examined, i: int, class_names: Sequence[str]) -> str:
    label = int(images.label[i])
    named = class_names[label] if label < len(class_names) else str(label)
    return f"{images.split[i]} {images.name[i]} ({named})"
