"""The doctor's findings as text, as one HTML page with thumbnails, which opens offline, and as CSV and JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rescom_timm.analysis import pages
from rescom_timm.data.doctor import Examined, Finding
from rescom_timm.text.pages import render

GROUPS_SHOWN = 40
"""Groups shown of each finding."""
IMAGES_SHOWN = 8
COLUMNS = ("finding", "title", "group", "split", "row", "image", "class", "note")
"""Of the CSV. Images of one group belong together, such as duplicates. A finding about classes or names has a row for
each note, without an image."""


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
    findings = []
    for one in found:
        notes = [f": {note}" for note in one.notes] or [""] * len(one.groups)
        groups = [
            [
                pages.thumbnail(images.stored(i), i, images.reading, _name(images, i, class_names, pages.short) + note)
                for i in group[:IMAGES_SHOWN]
            ]
            for group, note in list(zip(one.groups, notes, strict=True))[:GROUPS_SHOWN]
        ]
        more = len(one.groups) - GROUPS_SHOWN
        findings.append({"about": one, "lines": one.lines[:1000], "groups": groups, "more": more})
    return render("doctor.html", title=title, images=len(images), counts=counts, findings=findings)


def write(
    path: str | Path, images: Examined, found: Sequence[Finding], class_names: Sequence[str], title: str
) -> list[Path]:
    """Write the page, and all findings as CSV (COLUMNS) and JSON (`pages.files`); returns the paths."""
    rows = [(one, list(_rows(images, one, class_names))) for one in found]
    every = [row for _, part in rows for row in part]
    record = [
        {"finding": one.key, "title": one.title, "advice": one.advice, "count": one.count}
        | {"rows": [dict(zip(COLUMNS[2:], row[2:], strict=True)) for row in part]}
        for one, part in rows
    ]
    return pages.write(
        path,
        page(images, found, class_names, title),
        {name: [row[k] for row in every] for k, name in enumerate(COLUMNS)},
        {"title": title, "images": len(images), "findings": record},
    )


def _rows(images: Examined, finding: Finding, class_names: Sequence[str]) -> Iterator[tuple[str | int | None, ...]]:
    """Of COLUMNS."""
    for number, group in enumerate(finding.groups):
        note = finding.notes[number] if finding.notes else None
        for i in group:
            split, place = str(images.split[i]), int(images.position[i])
            row = int(images.splits[split].rows[place])
            yield (
                finding.key, finding.title, number, split, row, images.name[i], _class(images, i, class_names),
                images.broken.get(i, note),
            )  # fmt: skip
    for number, line in enumerate(finding.lines):
        yield (finding.key, finding.title, number, None, None, None, None, line)


def _name(images: Examined, i: int, class_names: Sequence[str], shown: Callable[[str], str] = str) -> str:
    return f"{images.split[i]} {shown(images.name[i])} ({_class(images, i, class_names)})"


def _class(images: Examined, i: int, class_names: Sequence[str]) -> str:
    label = int(images.label[i])
    return class_names[label] if label < len(class_names) else str(label)
