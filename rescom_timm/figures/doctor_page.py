"""What the doctor found, as text and as one HTML page with thumbnails that opens offline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from rescom_timm.data.decoding import BrokenImage
from rescom_timm.data.doctor import Examined, Finding

SIDE = 96
"""Pixels of a thumbnail's longer side."""
MOST = 40
"""Groups shown of each finding."""
MOST_OF_A_GROUP = 8

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; }
.groups { display: flex; flex-wrap: wrap; gap: 12px; }
.group { display: flex; gap: 6px; background: #f5f5f5; padding: 6px; }
figure { margin: 0; width: 100px; font-size: 11px; overflow-wrap: anywhere; } .advice { color: #8a4b00; }
"""


def told(images: Examined, found: Sequence[Finding], class_names: Sequence[str], examples: int = 3) -> str:
    """The findings as text, each with a few examples."""
    lines = []
    for finding in found:
        lines.append(f"{finding.title}: {finding.count:,}; {finding.advice}")
        for group in finding.groups[:examples]:
            if finding.key == "broken":
                lines.append(f"    {images.broken[group[0]]}")
            else:
                lines.append("    " + "  ~  ".join(_name(images, i, class_names) for i in group[:MOST_OF_A_GROUP]))
        lines += [f"    {line}" for line in finding.lines[:examples]]
        if finding.count > examples:
            lines.append(f"    and {finding.count - examples:,} more")
    return "\n".join(lines) or "nothing found"


def page(images: Examined, found: Sequence[Finding], class_names: Sequence[str], title: str) -> str:
    """The findings as HTML, with thumbnails of at most MOST groups each; everything from the data is escaped."""
    counts = ", ".join(f"{(images.split == name).sum():,} in {name}" for name in images.splits)
    parts = [f"<h1>{html.escape(title)}</h1>\n<p>{len(images):,} images: {html.escape(counts)}.</p>"]
    if not found:
        parts.append("<p>Nothing found.</p>")
    else:
        items = "".join(f'<li><a href="#{f.key}">{html.escape(f.title)}</a>: {f.count:,}</li>' for f in found)
        parts.append(f"<ul>{items}</ul>")
    for finding in found:
        parts.append(
            f'<h2 id="{finding.key}">{html.escape(finding.title)}: {finding.count:,}</h2>\n'
            f'<p class="advice">{html.escape(finding.advice)}.</p>'
        )
        if finding.lines:
            parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in finding.lines[:1000]) + "</ul>")
        groups = "".join(_group(images, group, class_names) for group in finding.groups[:MOST])
        parts.append(f'<div class="groups">{groups}</div>')
        if len(finding.groups) > MOST:
            parts.append(f"<p>and {len(finding.groups) - MOST:,} more.</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _group(images: Examined, group: Sequence[int], class_names: Sequence[str]) -> str:
    return '<div class="group">' + "".join(_figure(images, i, class_names) for i in group[:MOST_OF_A_GROUP]) + "</div>"


def _figure(images: Examined, i: int, class_names: Sequence[str]) -> str:
    caption = html.escape(_name(images, i, class_names))
    try:
        image = images.image(i)
    except BrokenImage:
        return f"<figure><figcaption>{caption}</figcaption></figure>"
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=80)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _name(images: Examined, i: int, class_names: Sequence[str]) -> str:
    label = int(images.label[i])
    named = class_names[label] if label < len(class_names) else str(label)
    return f"{images.split[i]} {images.name[i]} ({named})"
