"""The embedded data set."""

import functools
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from rescom_timm.data.index_files import NoSplit


@functools.cache
def digits(split: str) -> Dataset:
    """scikit-learn's digits, 1,797 gray 8 x 8 images, as PNG.

    Of each class, in file order, the images 0, 3, 6 ... 147 are the test split (50 per class, spread over all writers)
    and the others the training split (124 to 133 per class).
    """
    import PIL.Image

    if split not in ("train", "test"):
        raise NoSplit("data.split", f"digits has no split {split!r}, only 'train' and 'test'")
    table = _table()  # (1797, 65): 64 levels and the label of each image
    labels = table[:, -1].astype(np.int64)
    rank = np.empty_like(labels)  # number of the image in its class
    for k in range(10):
        rank[labels == k] = np.arange((labels == k).sum())
    is_test = (rank % 3 == 0) & (rank < 150)
    rows = np.flatnonzero(is_test if split == "test" else ~is_test)
    grey = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # levels 0 .. 16
    images = []
    for row in rows:
        png = io.BytesIO()
        PIL.Image.fromarray(grey[row]).save(png, "png")
        images.append({"bytes": png.getvalue(), "path": f"digit_{row:04d}.png"})
    features = Features(image=Image(decode=False), label=ClassLabel(names=list("0123456789")))
    return Dataset.from_dict({"image": images, "label": labels[rows]}, features=features)


@functools.cache
def _table() -> np.ndarray:
    """The table of scikit-learn's package, without the second that importing scikit-learn takes."""
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # a package that keeps the table elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])
