"""Problems of a data set: duplicates, leaks between splits, label errors, odd images, small classes.

Every image is decoded once, and those that may be exact duplicates, which have equal pixels, a second time. Near
duplicates have perceptual hashes (pHash, 64 bits) that differ in at most four bits and similar gray thumbnails; people
must judge them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rescom_timm.class_names import nfc
from rescom_timm.data.broken import IMAGES_AT_ONCE
from rescom_timm.data.decoding import BrokenImage, ReadConfig, inspect, name_of
from rescom_timm.data.splits import Split
from rescom_timm.text import counted

BITS = 4
"""Hashes of near duplicates differ in at most this many of 64 bits."""
BANDS = np.array_split(np.arange(64), BITS + 1)
"""Of two hashes that differ in BITS bits, one of these is the same in both."""
LEVELS = 10.0
"""Thumbnails of near duplicates differ by at most this many levels on average."""
CROWD = 200
"""A band that more images share is skipped."""
REDUCED = 128
"""Pixels of the shorter side, at least, of the image that is hashed: block means of a larger image."""
SMALL, LONG, FLAT, GRAY = 32, 3.0, 2.0, 4
DEPTHS = (8, 10, 12, 14)
"""Bits of cameras and microscopes whose images are stored with 16."""


@dataclass(frozen=True, eq=False)
class Examined:
    """N images of all splits, in their order."""

    splits: Mapping[str, Split]
    split: np.ndarray
    """(N,) the split's name."""
    position: np.ndarray
    """(N,) int64 in its split."""
    label: np.ndarray
    name: list[str]
    size: np.ndarray
    """(N, 2) int64: width, height; 0 where it cannot be read."""
    digest: np.ndarray
    """(N,) of the pixels, as bytes."""
    hashed: np.ndarray
    """(N, 64) bool: pHash."""
    thumbnail: np.ndarray
    """(N, 16, 16) uint8 of gray."""
    gray: np.ndarray
    flat: np.ndarray
    """(N,) bool each: has no colour; is all but one level."""
    broken: dict[int, str]
    turned: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """(N,) bool: has an EXIF orientation other than upright."""
    levels: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(N, 2) int64: lowest and highest level of images of 16 bits; -1 for others."""
    reading: ReadConfig = ReadConfig()

    def __len__(self) -> int:
        return len(self.label)

    def stored(self, i: int) -> object:
        """The i-th image as its data set stores it."""
        return self.splits[str(self.split[i])].dataset[int(self.position[i])]["image"]


@dataclass(frozen=True)
class Finding:
    """A kind of problem and the images that have it."""

    key: str
    title: str
    advice: str
    groups: list[list[int]]
    """Images that belong together, as positions in Examined; empty for findings about classes or names."""
    lines: tuple[str, ...] = ()
    """Text lines of a finding without images."""
    notes: tuple[str, ...] = ()
    """A caption for each group, or empty."""

    @property
    def count(self) -> int:
        """Number of groups of images, or of lines."""
        return len(self.groups) or len(self.lines)


def examine(
    splits: Mapping[str, Split],
    progress: Callable[[int], object] | None = None,
    reading: ReadConfig = ReadConfig(),
) -> Examined:
    """Read every image of the splits as training reads it.

    progress: called with the number of images just read.
    """

    def seen(row: int, value: object) -> _Seen | str:
        try:
            image, orientation, levels = inspect(value, row, reading)
        except BrokenImage as error:
            return str(error)
        reduced = image.reduce(max(1, min(image.size) // REDUCED))
        small = np.asarray(reduced.resize((32, 32), Image.Resampling.BOX))
        gray = np.asarray(reduced.convert("L").resize((32, 32), Image.Resampling.LANCZOS))
        return image.size, small, gray, orientation != 1, levels or (-1, -1)

    def pixels(i: int) -> bytes:
        split, at, _ = places[i]
        image = inspect(splits[split].dataset[at]["image"], None, reading).image
        return hashlib.sha256(image.tobytes()).digest()

    names: list[str] = []
    places: list[tuple[str, int, int]] = []
    broken: dict[int, str] = {}
    batches: list[tuple[np.ndarray, ...]] = []
    with ThreadPoolExecutor() as pool:
        for name, split in splits.items():
            for start in range(0, len(split.rows), IMAGES_AT_ONCE):
                values = split.dataset[start : start + IMAGES_AT_ONCE]["image"]
                numbers = split.rows[start : start + IMAGES_AT_ONCE].tolist()
                rows = list(pool.map(seen, numbers, values))
                broken |= {len(places) + i: row for i, row in enumerate(rows) if isinstance(row, str)}
                batches.append(_measured([_NOTHING if isinstance(row, str) else row for row in rows]))
                names += [name_of(value) or f"row {row}" for row, value in zip(numbers, values, strict=True)]
                labels = split.labels[start : start + IMAGES_AT_ONCE].tolist()
                places += [(name, start + i, label) for i, label in enumerate(labels)]
                if progress is not None:
                    progress(len(values))
        size, digest, *measured = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        digest[list(broken)] = b""
        times = Counter(digest)
        alike = [i for i, one in enumerate(digest) if one and times[one] > 1]
        digest[alike] = list(pool.map(pixels, alike))
    split_names, positions, labels = (np.array(column) for column in zip(*places, strict=True))
    hashed, thumbnail, gray, flat, turned, levels = measured
    return Examined(
        dict(splits), split_names, positions, labels, names, size, digest, hashed, thumbnail, gray, flat, broken,
        turned, levels, reading,
    )  # fmt: skip


_Seen = tuple[tuple[int, int], np.ndarray, np.ndarray, bool, tuple[int, int]]
"""Size, (32, 32, 3) uint8 of colour and (32, 32) of gray, whether it is turned, levels."""
_NOTHING: _Seen = ((0, 0), np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8), False, (-1, -1))


def _measured(rows: Sequence[_Seen]) -> tuple[np.ndarray, ...]:
    """Size, digest, hash, thumbnail, gray, flat, turned and levels of B images, (B, ...) each.

    The hash is imagehash.phash: which of the lowest 8 x 8 frequencies are above their median.
    """
    size, small, gray, turned, levels = (np.array(column) for column in zip(*rows, strict=True))
    low = dctn(gray.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    hashed = low > np.median(low, axis=1, keepdims=True)
    thumbnail = gray.reshape(-1, 16, 2, 16, 2).mean((2, 4)).astype(np.uint8)
    digest = [
        hashlib.sha256(one.tobytes() + repr(sides).encode()).digest()
        for one, (sides, *_) in zip(small, rows, strict=True)
    ]
    flat = small.std(axis=(1, 2)).max(axis=1) < FLAT
    colourless = np.ptp(small, axis=3).max(axis=(1, 2)) <= GRAY
    return size, np.array(digest, dtype=object), hashed, thumbnail, colourless, flat, turned, levels


def findings(images: Examined, class_names: Sequence[str], counts: np.ndarray) -> list[Finding]:
    """Problems, the most important first. counts: (K,) training images of each class."""
    exact = exact_duplicates(images)
    near = near_duplicates(images, exact)
    found = [
        Finding("broken", "Images that cannot be read", "repair or remove them, or leave them out with "
                "rescom-timm index check -o", [[i] for i in images.broken]),
        *_of_duplicates(images, exact, "exact", "the same image"),
        *_of_duplicates(images, near, "near", "nearly the same image"),
        *_odd_images(images),
        *_of_classes(images, class_names, counts),
        _of_names(class_names),
    ]  # fmt: skip
    return [finding for finding in found if finding.count]


def exact_duplicates(images: Examined) -> list[list[int]]:
    """Groups of images with equal pixels, without dim 16-bit images, whose levels may differ."""
    alike: dict[bytes, list[int]] = defaultdict(list)
    dim = set(np.flatnonzero(_dim(images)[0]).tolist())
    for i, digest in enumerate(images.digest):
        if digest and i not in dim:
            alike[digest].append(i)
    return [group for group in alike.values() if len(group) > 1]


def near_duplicates(images: Examined, exact: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """Groups of similar images, each exact duplicate counted once, without single-coloured images."""
    twice = {i for group in exact for i in group[1:]}
    out = twice | set(images.broken) | set(np.flatnonzero(images.flat).tolist())
    usable = np.array([i for i in range(len(images)) if i not in out], dtype=np.int64)
    hashed = images.hashed[usable].reshape(len(usable), 64)
    words = np.packbits(hashed, axis=1).view(np.uint64).ravel()
    thumbnails = images.thumbnail[usable].reshape(len(usable), 256)
    labels = np.arange(len(usable))  # of the components so far
    for band in BANDS:
        keys = hashed[:, band] @ (1 << np.arange(len(band), dtype=np.int64))
        order = np.argsort(keys, kind="stable")
        pairs = [np.zeros((2, 0), np.int64)]
        for members in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            if 2 <= len(members) <= CROWD:
                pairs.append(_near_pairs(members, words, thumbnails, labels))
        links = labels[np.concatenate(pairs, axis=1)]
        labels = connected_components(coo_array((np.ones(links.shape[1]), links), (len(usable),) * 2))[1][labels]
    groups: dict[int, list[int]] = defaultdict(list)
    for i, label in zip(usable.tolist(), labels.tolist(), strict=True):
        groups[label].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _near_pairs(members: np.ndarray, words: np.ndarray, thumbnails: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Near pairs (2, P) of images in a band that are not in one component yet. words: (N,) hashes of 64 bits."""
    apart = np.bitwise_count(words[members][:, None] ^ words[members])
    new = labels[members][:, None] != labels[members]
    one, other = members[np.stack(np.nonzero(np.triu((apart <= BITS) & new, 1)))]
    if not len(one):
        return np.zeros((2, 0), np.int64)
    high, low = np.maximum(thumbnails[one], thumbnails[other]), np.minimum(thumbnails[one], thumbnails[other])
    near = (high - low).sum(axis=1, dtype=np.int64) <= LEVELS * 256
    return np.stack([one[near], other[near]])


def _of_duplicates(images: Examined, groups: list[list[int]], kind: str, what: str) -> Iterator[Finding]:
    leaks, torn, rest = [], [], []
    for group in groups:
        leaks += [group] if (leak := len(set(images.split[group])) > 1) else []
        torn += [group] if (tear := len(set(images.label[group])) > 1) else []
        rest += [] if leak or tear else [group]
    what = what.capitalize()
    advice = "accuracy on images that were trained on is too high: remove one of the two"
    yield Finding(f"{kind}_leak", f"{what} in two splits", advice, leaks)
    yield Finding(f"{kind}_label", f"{what} under two labels", "one of the labels is wrong, or classes overlap", torn)
    advice = "a class has fewer different images than its count"
    yield Finding(f"{kind}_twice", f"{what} more than once in a split", advice, rest)


def _odd_images(images: Examined) -> Iterator[Finding]:
    width, height = images.size.T if len(images) else np.zeros((2, 0))
    there = np.array([i not in images.broken for i in range(len(images))], dtype=bool)
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    usual = float(np.median(shorter[there])) if there.any() else 0.0
    tiny = there & (shorter < min(SMALL, usual)) & (shorter < usual / 2)
    share = images.gray[there].mean() if there.any() else 0.0
    gray = there & images.gray & ~images.flat & (share < 0.5)

    def finding(key: str, title: str, advice: str, chosen: np.ndarray) -> Finding:
        return Finding(key, title, advice, [[int(i)] for i in np.flatnonzero(chosen)])

    title = f"Images below {SMALL} pixels, half of the usual {usual:.0f} and less"
    yield finding("tiny", title, "they are enlarged to the size of the views", tiny)
    dim, most = _dim(images)
    title = f"16-bit images whose levels stay below {most + 1:,} ({most.bit_length()}-bit data)"
    advice = (
        f"they come out dark, or black: loader.white_level={most} reads {most:,} as white in gray images; scale colour "
        "images and save them with 8 bits"
    )
    yield finding("dim", title, advice, dim)
    yield finding("flat", "Images of a single colour", "they hold nothing to learn from", there & images.flat & ~dim)
    advice = "where one class has most of them, a net may learn grey instead of the class"
    yield finding("gray", "Grey images among coloured ones", advice, gray)
    title = f"Images more than {LONG:g} times as long as wide"
    yield finding("shape", title, "crops show little of them", there & (longer > LONG * shorter))
    advice = "loader.exif=true turns them upright; without it they are read as they are stored, but for TIFF"
    if images.reading.exif:
        advice = "they are turned upright (loader.exif=true)"
    yield finding("turned", "Images with an EXIF orientation tag", advice, images.turned)


def _dim(images: Examined) -> tuple[np.ndarray, int]:
    """16-bit images that hold fewer bits: (mask (N,), highest level of those bits).

    As many bits as the brightest image needs, 12 if some images use all 16. Single-coloured images are left out.
    """
    lowest, highest = images.levels.T
    several = (highest >= 0) & (lowest < highest)
    top = int(highest[several].max()) if several.any() else 0
    most = next((2**bits - 1 for bits in DEPTHS if top < 2**bits), 4095)
    white = images.reading.white_level or 65535
    return several & (highest <= most) & (most < white), most


def _of_classes(images: Examined, names: Sequence[str], counts: np.ndarray) -> Iterator[Finding]:
    small = tuple(f"{names[k]}: {counted(counts[k], 'training image')}" for k in np.flatnonzero(counts < 5).tolist())
    advice = "too few to hold any out for validation, and their accuracy is noise"
    yield Finding("small", "Classes with fewer than five training images", advice, [], small)
    for split in images.splits:
        if split != "train":
            there = np.bincount(images.label[images.split == split], minlength=len(counts))
            absent = tuple(names[k] for k in np.flatnonzero(there[: len(counts)] == 0).tolist())
            title = f"Classes without an image in {split}"
            yield Finding(f"absent_{split}", title, "their accuracy is not measured", [], absent)


def _of_names(names: Sequence[str]) -> Finding:
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[nfc("".join(nfc(name).split()).replace("_", "").replace("-", "").casefold())].append(name)
    lines = []
    for group in alike.values():
        if len(group) > 1:
            show = ascii if len(set(map(nfc, group))) < len(group) else repr  # names that look the same
            lines.append(", ".join(map(show, group)))
    title = "Class names that differ in case, blanks, dashes or Unicode form alone"
    return Finding("names", title, "they may be one class", [], tuple(lines))


HELD_OUT = 10
"""Images that a class needs for a reliable mean probability."""


def disputed(labels: np.ndarray, probabilities: np.ndarray, least: int = HELD_OUT) -> list[tuple[int, int]]:
    """(image, its more probable class) of labels that the net disagrees with, the surest first.

    Confident learning (Northcutt et al. 2021, arXiv 1911.00068): another class j reaches the mean probability that the
    net gives j on images labelled j, and the label's class does not reach its own. A class of fewer than `least` images
    is never j. labels: (N,). probabilities: (N, K), of images that the net was not trained on.
    """
    classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=classes)
    means = np.bincount(labels, own, minlength=classes) / np.maximum(counts, 1)
    threshold = np.where(counts > 0, means, np.inf)
    reached = np.where((probabilities >= threshold) & (counts >= least), probabilities, -1.0)
    reached[np.arange(len(labels)), labels] = -1.0
    other = reached.argmax(axis=1)
    best = reached[np.arange(len(labels)), other]
    suspects = np.flatnonzero((best > own) & (own < threshold[labels]) & (best >= 0))
    order = suspects[np.argsort(own[suspects] - best[suspects], kind="stable")]
    return [(int(i), int(other[i])) for i in order]
