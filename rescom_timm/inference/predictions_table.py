"""The CSV of predictions that `rescom-timm predict` writes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from rescom_timm.errors import MissingFileError
from rescom_timm.inference.predict import Prediction
from rescom_timm.io import atomic_path, errors_named, write_rows


def write_csv(
    found: Iterable[Prediction],
    path: str | Path,
    top_k: int,
    *,
    sets: bool = False,
    nearest: int = 0,
    crops: bool = False,
    decisions: bool = False,
) -> tuple[int, int]:
    """Write predictions as CSV.

    The columns are image, label_1, probability_1 ... label_k, probability_k, error, true_label, and on request
    decision, set_size and set (a JSON list of classes), nearest_1, nearest_label_1, similarity_1 ..., five_crops_label
    and five_crops_probability. On a failure other than a full disk, the rows so far stay in PATH.partial and an earlier
    table stays. Returns (images, unreadable). Raises OSError, which names `path`.
    """
    images = broken = 0

    def rows() -> Iterator[list[str]]:
        nonlocal images, broken
        pairs = [f"{name}_{k}" for k in range(1, top_k + 1) for name in ("label", "probability")]
        near = [f"{name}_{k}" for k in range(1, nearest + 1) for name in ("nearest", "nearest_label", "similarity")]
        further = ["decision"] * decisions + ["set_size", "set"] * sets + near
        yield [
            "image",
            *pairs,
            "error",
            "true_label",
            *further,
            *["five_crops_label", "five_crops_probability"] * crops,
        ]
        for one in found:
            top = zip(one.labels, one.probabilities, strict=True)
            row = [one.image, *_cells(top, len(pairs)), one.error, one.label]
            row += [one.decision or ""] * decisions
            if sets:
                row += ["", ""] if one.inside is None else [f"{len(one.inside)}", json.dumps(one.inside)]
            row += _cells(one.nearest, len(near))
            yield row + (_cells([one.five_crops] if one.five_crops else [], 2) if crops else [])
            images, broken = images + 1, broken + bool(one.error)

    # Row by row. A name that is not UTF-8 keeps its bytes.
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write the table: a folder has its name", str(path))
    if not (parent := Path(path).absolute().parent).is_dir():
        raise MissingFileError("file.missing", f"no folder {parent} for the table: make it first")
    with errors_named(path), atomic_path(path) as beside:
        with beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            try:
                write_rows(file, rows())
                file.flush()
            except BaseException as error:
                if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # free a full disk
                    file.close()
                    os.replace(beside, f"{path}.partial")
                raise
        Path(f"{path}.partial").unlink(missing_ok=True)  # of an earlier attempt
    return images, broken


def _cells(rows: Iterable[tuple[str | float, ...]], number: int) -> list[str]:
    """The cells of all rows, and empty ones up to `number`."""
    cells = [cell if isinstance(cell, str) else f"{cell:.6f}" for row in rows for cell in row]
    return cells + [""] * (number - len(cells))
