"""Loaders: from a split to batches, the same ones on any number of workers and processes.

A training sample is an item (position in the split, seed of its draws). `Order` gives the items of an epoch as a pure
function of (seed, epoch); the generators are re-seeded for each item; torch's own BatchSampler cuts the items into
GLOBAL batches; accelerate (`split_batches=True`) gives each process its slice of every batch. So the images depend
neither on workers nor on processes, and a resumed epoch (`accelerate.skip_first_batches`) continues bit for bit.

A batch is {"image": uint8 (B, V, 3, H, W), "label": int64 (B,), "row": int64 (B,)}, V views an image; in evaluation
image is (B, 3, H, W). `row` is the row of the source.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from rescom_timm.data.fast_views import BatchedPolicy, Draws, Size
from rescom_timm.data.planes import PlanePolicy, near_resized
from rescom_timm.data.views import BrokenImage, Policy, ViewsConfig, decode, parse, seed_all, where

if TYPE_CHECKING:
    from rescom_timm.data.sources import Split

Item = tuple[int, int]
Batch = dict[str, torch.Tensor]
SamplerName = Literal["uniform", "class_balanced", "square_root", "progressive"]


@dataclass(frozen=True)
class LoaderConfig:
    """How training samples are drawn and read. These keys change results."""

    sampler: SamplerName = "uniform"
    """uniform: every image once an epoch. The others make as many draws, with replacement, and choose the class first:
    evenly (class_balanced), by the root of its count (square_root), or by its count in the first epoch and evenly in
    the last (progressive). See `class_probabilities`."""
    broken: Literal["stop", "skip"] = "stop"
    """An unreadable training image stops the run, or is skipped: another of its class takes its place and a warning
    names it. Evaluation always stops, for its figures are those of the whole split."""
    exif: bool = False
    """Turn images as their EXIF tag says. The papers' pipelines do not."""
    device_views: bool = False
    """The workers only decode and do a policy's first steps (random_resized_crop, say); flip, jitter, grayscale,
    randaugment, autoaugment and cutout follow on the device, in batches. The same is drawn, but jitter and randaugment
    come out a level or two away from Pillow's in some pixels. For GPUs that wait for their images."""
    near_resize: bool = False
    """random_resized_crop (bilinear) by torch instead of Pillow: half the time, the same draws, and a level off in 1 to
    3 of 100 numbers of a photograph, which later steps may widen. For CPUs that cannot keep up."""

    def __post_init__(self) -> None:
        if self.sampler not in get_args(SamplerName):
            raise ValueError(f"sampler must be one of {', '.join(get_args(SamplerName))}, not {self.sampler!r}")
        if self.broken not in ("stop", "skip"):
            raise ValueError(f"broken must be stop or skip, not {self.broken!r}")


@dataclass(frozen=True)
class SpeedConfig:
    """Keys that change the speed of loading, never what is loaded."""

    workers: int = 4
    """Worker processes of each training process, at most its cores; 0 loads in the training process itself."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    pin_memory: bool = True
    """Page-locked batches, for whose copy to a GPU the host does not wait; without a GPU nothing is pinned."""
    batched: bool = True
    """Augment a whole batch at once where its images have one size, at most 128 x 128 pixels, and every step of the
    policy is crop, flip, autoaugment, grayscale or cutout; else do jitter and randaugment in NumPy instead of Pillow.
    Pixels are the same as without; see fast_views.py and planes.py."""
    cache: int = 256
    """Megabytes. Training images that are all of one size and fit in when decoded are decoded once, at the start, and
    kept in memory, which forked workers share (CIFAR: 150). 0 keeps none."""
    resident: bool = False
    """Training images of one size (within `cache`) stay on the device and are augmented there, some batches at once;
    the workers only draw. For small images on a GPU, which is done with a batch before a CPU has made the next."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, not {self.workers}")
        if not 1 <= self.prefetch <= 1000:
            raise ValueError(f"prefetch must be from 1 to 1,000 batches, not {self.prefetch}")
        if self.cache < 0:
            raise ValueError(f"cache must be 0 or more megabytes, not {self.cache}")


def train_loader(
    split: "Split",
    views: ViewsConfig,
    num_views: int,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = None,
    config: LoaderConfig = LoaderConfig(),
    speed: SpeedConfig = SpeedConfig(),
) -> DataLoader[Batch]:
    """Batches of `num_views` views each; the last incomplete batch of an epoch is dropped.

    `batch_size` counts the images of all processes together. `epochs`, the length of the run, is needed by the
    progressive sampler. Call `set_epoch(loader, epoch)` before each epoch, on the loader as accelerate prepared it and
    before `skip_first_batches`. `finish` completes the batches, on their device. Raises ValueError if the split has
    fewer images than one batch, no step of the policy can be done on the device (config.device_views), or its images
    and policy are none for speed.resident.
    """
    if num_views < 1:
        raise ValueError(f"an image needs at least 1 view, not {num_views}")
    if not 1 <= batch_size <= len(split.labels):
        raise ValueError(
            f"a batch of {batch_size} images cannot be drawn from the {len(split.labels)} images of {split.name}: "
            f"choose a batch size from 1 to {len(split.labels)}"
        )
    policy = parse(views.train, views.mean)
    if config.near_resize:
        policy = near_resized(policy)
    if config.device_views and not BatchedPolicy(policy, near=True).steps:
        raise ValueError(f"loader.device_views: the end of {policy.text!r} cannot be done on the device; turn it off")
    dataset = ViewsDataset(split, policy, num_views, config.broken, config.exif, speed, config.device_views)
    order = Order(split.labels, config.sampler, seed, epochs)
    return _loader(dataset, order, batch_size, speed, drop_last=True, persistent=True)


def eval_loader(
    split: "Split",
    views: ViewsConfig,
    batch_size: int,
    config: LoaderConfig = LoaderConfig(),
    speed: SpeedConfig = SpeedConfig(),
) -> DataLoader[Batch]:
    """Every image of the split once, in order; an unreadable one raises BrokenImage whatever `config.broken` says.
    With several processes accelerate fills up the last batch, and its `gather_for_metrics` drops the filling."""
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, not {batch_size}")
    speed = dataclasses.replace(speed, cache=0, resident=False)
    dataset = ViewsDataset(split, parse(views.eval, views.mean), None, "stop", config.exif, speed)
    items = [(position, position) for position in range(len(dataset))]
    return _loader(dataset, items, batch_size, speed, drop_last=False, persistent=False)


def finish(
    loader: DataLoader[Batch], views: ViewsConfig, config: LoaderConfig, device: torch.device
) -> Callable[[Iterable[Batch]], Iterable[Batch]]:
    """What completes the batches of a training loader on the device that they were moved to."""
    dataset = cast(ViewsDataset, loader.dataset)
    return Resident(dataset, device) if dataset.resident else functools.partial(map, finish_views(views, config))


def finish_views(views: ViewsConfig, config: LoaderConfig) -> Callable[[Batch], Batch]:
    """What completes a training batch on the device that it was moved to: the rest of the policy with
    config.device_views, else nothing."""
    if not config.device_views:
        return lambda batch: batch
    policy = BatchedPolicy(parse(views.train, views.mean), near=True)

    def finish(batch: Batch) -> Batch:
        drawn = cast(dict[str, Any], batch)
        words, notes = drawn["words"], drawn["notes"]
        draws = Draws(np.concatenate(words), np.concatenate(notes))
        finished = policy(batch["image"].flatten(0, 1), draws).unflatten(0, words.shape[:2])
        return {"image": finished, "label": batch["label"], "row": batch["row"]}

    return finish


def last_words(error: BaseException) -> str:
    """An error's name and message, in one line; of one that a loader's worker sends, without the worker's traceback."""
    text = str(error)
    if worker_was_lost(error):
        return (
            f"{type(error).__name__}: a worker of the loader was ended from outside, most likely for want of memory "
            f"({text.splitlines()[0]}): use fewer speed.workers, or less speed.prefetch or speed.cache"
        )
    return text.strip().splitlines()[-1] if "Original Traceback" in text else f"{type(error).__name__}: {text}"


def worker_was_lost(error: BaseException) -> bool:
    """Whether torch says that a worker process of a loader is gone."""
    lost = r"DataLoader worker \(pid.*(is killed by|exited unexpectedly)"
    return isinstance(error, RuntimeError) and re.search(lost, str(error)) is not None


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a training loader, plain or prepared by accelerate, which epoch comes next."""
    if hasattr(loader, "set_epoch"):  # accelerate's wrapper, which otherwise sets the epoch by its own count
        loader.set_epoch(epoch)
    else:
        loader.sampler.set_epoch(epoch)


def _loader(
    dataset: "ViewsDataset", sampler: Any, batch_size: int, speed: SpeedConfig, drop_last: bool, persistent: bool
) -> DataLoader[Batch]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(speed.workers, cores)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=workers,
        prefetch_factor=speed.prefetch if workers else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=speed.pin_memory and torch.cuda.is_available(),
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else DataLoader draws its workers' base seed from the global generator
    )


def _as_it_is(batch: Any) -> Any:
    return batch  # the dataset's __getitems__ has stacked it


# ------------------------------------------------------------------------------------------------------------- order


class Order(Sampler[Item]):
    """The items (position, seed) of an epoch, a pure function of (seed, epoch)."""

    def __init__(self, labels: np.ndarray, sampler: SamplerName, seed: int = 0, epochs: int | None = None) -> None:
        if sampler == "progressive" and epochs is None:
            raise ValueError("the progressive sampler moves over the whole run: give the number of epochs")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
        self.labels = np.asarray(labels)
        self.sampler: SamplerName = sampler
        self.seed = seed
        self.epochs = epochs
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Item]:
        seeds = _random_bits(len(self), self.seed, self.epoch, stream=1) >> np.uint64(1)  # torch takes 63 bits
        yield from zip(self.positions().tolist(), seeds.tolist(), strict=True)

    def positions(self) -> np.ndarray:
        """The positions (N,) int64 that this epoch visits, in order."""
        bits = _random_bits(len(self), self.seed, self.epoch, stream=0)
        if self.sampler == "uniform":
            return np.argsort(bits, kind="stable")
        counts = np.bincount(self.labels)
        share = class_probabilities(counts, self.sampler, self.epoch, self.epochs) / np.maximum(counts, 1)
        ends = np.cumsum(share[self.labels])
        uniform = (bits >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(ends, uniform * ends[-1], side="right")


def class_probabilities(
    counts: np.ndarray, sampler: SamplerName, epoch: int = 0, epochs: int | None = None
) -> np.ndarray:
    """Probability (K,) that a draw comes from each class: p_k ~ N_k^q (Kang et al. 2020, arXiv 1910.09217, eq. 1) with
    q = 1 uniform, 1/2 square root, 0 class-balanced; progressive mixes q = 1 and q = 0 by 1 - t/T and t/T (eq. 2),
    t/T from 0 in the first epoch to 1 in the last. Classes without images get 0."""
    if sampler == "progressive":
        t = min(epoch / max((epochs or 1) - 1, 1), 1.0)
        return (1 - t) * class_probabilities(counts, "uniform") + t * class_probabilities(counts, "class_balanced")
    power = {"uniform": 1.0, "square_root": 0.5, "class_balanced": 0.0}[sampler]
    weights = np.where(counts > 0, np.asarray(counts, dtype=np.float64) ** power, 0.0)
    return weights / weights.sum()


def _random_bits(size: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """uint64 (size,) from Philox, a counter-based generator whose raw stream NumPy promises never to change."""
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return philox.random_raw(size)


# ----------------------------------------------------------------------------------------------------------- samples


class ViewsDataset(Dataset[Batch]):
    """Reads items of a split in batches: decodes each image once and draws its views.

    `replaced` (N,) int32, shared by all workers, counts how often the image at each position could not be read and gave
    its place to another (None with broken="stop"). With device=True a batch holds, for `finish_views`, the images
    (B, V, 3, H, W) as they are after the policy's first steps (V = 1 where it has none) and the draws of the rest as
    NumPy arrays, which stay on the host: words (B, num_views, k), notes (B, num_views, m). With speed.resident it
    holds, for `Resident`, the draws alone. Raises ValueError where images and policy are none for that.
    """

    def __init__(
        self,
        split: "Split",
        policy: Policy,
        num_views: int | None,
        broken: str = "stop",
        exif: bool = False,
        speed: SpeedConfig = SpeedConfig(cache=0),
        device: bool = False,
    ) -> None:
        self.images = split.dataset.select_columns("image")
        self.labels = np.asarray(split.labels, dtype=np.int64)
        self.rows = np.asarray(split.rows, dtype=np.int64)
        self.num_views = num_views
        self.exif = exif
        self.device = device
        self.batch_policy = device or speed.batched
        self.policy = policy
        self.replaced = torch.zeros(len(self.labels), dtype=torch.int32).share_memory_() if broken == "skip" else None
        self.cache = self._decode_all(speed.cache * 2**20)
        self.resident = speed.resident
        if self.resident:
            self.size = self._refuse_residence(speed)

    def _refuse_residence(self, speed: SpeedConfig) -> Size:
        """The one size (H, W) of all images. Raises ValueError where they cannot stay on the device."""
        if self.cache is None:
            raise ValueError(
                f"speed.resident is for training images of one size that fit into speed.cache ({speed.cache} MB), "
                "which these do not; turn it off, or raise speed.cache"
            )
        pixels, readable = self.cache
        if not readable.all():
            row = int(self.rows[np.flatnonzero(~readable)[0]])
            raise ValueError(f"speed.resident: the image of row {row} cannot be read; leave it out of the index")
        size = (pixels.shape[1], pixels.shape[2])
        if not self.device and (self.batched is None or not self.batched.serves(self.policy, size)):
            raise ValueError(
                f"speed.resident: {self.policy.text!r} has a step that a device does not do as Pillow does; turn it "
                "off, or let such steps come out a level or two away (loader.device_views=true)"
            )
        assert self.batched is not None
        if self.batched.head:
            raise ValueError(
                f"speed.resident: {self.policy.text!r} begins with a step that a device cannot do; turn it off"
            )
        return size

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy
        self.batched = BatchedPolicy(policy, near=self.device) if self.batch_policy else None
        self.planes = PlanePolicy(policy) if self.batch_policy else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: Item) -> Batch:
        """One item as a sample: image (V, 3, H, W), or (3, H, W) in evaluation; label and row ()."""
        return {key: value[0] for key, value in self.__getitems__([item]).items()}

    def __getitems__(self, items: list[Item]) -> Batch:
        rows: list[int] = []
        if self.resident:
            rows = [position for position, _ in items]
            return self._draw([seed for _, seed in items]) | self._about(rows)

        def images() -> Iterator[Any]:
            for position, image in self._read(items):
                rows.append(position)
                yield image

        with _random_state_kept():
            views = (self._begin if self.device else self._augment)(images(), [seed for _, seed in items])
        return views | self._about(rows)

    def _about(self, positions: list[int]) -> Batch:
        labels, rows = torch.from_numpy(self.labels[positions]), torch.from_numpy(self.rows[positions])
        return {"label": labels, "row": rows} | ({"position": torch.tensor(positions)} if self.resident else {})

    def _draw(self, seeds: list[int]) -> Batch:
        """The draws of all views of a batch whose images are on the device."""
        assert self.batched is not None and self.num_views is not None
        with _random_state_kept():
            return _drawn(self.batched.draw(seeds, self.num_views, self.size), self.num_views)

    def _augment(self, images: Iterable[Any], seeds: list[int]) -> Batch:
        """`images` are read one by one where each can be forgotten before the next: memory is used again while warm."""
        num_views, size = self.num_views or 1, None
        if self.batched is not None and not self.batched.head:
            images = list(images)
            size = _one_size(images)
        if self.batched is not None and size and self.batched.serves(self.policy, size):
            views = self.batched(_stack(images, self.policy), self.batched.draw(seeds, num_views, size))
        else:
            serves = self.planes is not None and self.planes.serves(self.policy)
            augment: Any = self.planes if serves else self.policy.augment
            views = _stack(self._view_by_view(images, seeds, augment), self.policy)
        return {"image": views if self.num_views is None else views.unflatten(0, (len(seeds), num_views))}

    def _begin(self, images: Iterable[Any], seeds: list[int]) -> Batch:
        """The policy's first steps, and the draws of the others."""
        assert self.batched is not None and self.num_views is not None
        batched, drawn = self.batched, []
        if not batched.head:
            views = _stack(images, self.policy)
            draws = batched.draw(seeds, self.num_views, (views.shape[2], views.shape[3]))
        else:

            def begin(image: Image.Image) -> Image.Image:
                for step in batched.head:
                    image = step(image)
                drawn.append(batched.draw_next((image.height, image.width)))
                return image

            views = _stack(self._view_by_view(images, seeds, begin), self.policy)
            draws = Draws(*(np.stack(parts) for parts in zip(*drawn, strict=True)))
        return {"image": views.unflatten(0, (len(seeds), -1)), **_drawn(draws, self.num_views)}

    def _view_by_view(
        self, images: Iterable[Any], seeds: list[int], augment: Callable[[Image.Image], Any]
    ) -> list[np.ndarray]:
        views = []
        for image, seed in zip(images, seeds, strict=True):
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            seed_all(seed)
            views += [np.asarray(augment(image)) for _ in range(self.num_views or 1)]
        return views

    def _read(self, items: list[Item]) -> Iterator[tuple[int, Any]]:
        """(position, image) of each item: a PIL image, or an array (H, W, 3) from the cache."""
        if self.cache is None:
            values = self.images.__getitems__([position for position, _ in items])
            for (position, seed), value in zip(items, values, strict=True):
                yield self._decode(position, seed, value["image"])
            return
        pixels, readable = self.cache
        for position, seed in items:
            if readable[position]:
                yield position, pixels[position]
            else:
                yield self._decode(position, seed, self.images.__getitems__([position])[0]["image"])

    def _decode_all(self, limit: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The images (N, H, W, 3) and which of them could be read (N,), if they have one size and fit into `limit`
        bytes. Plain memory, which forked workers share; shared memory is often limited to 64 MB in containers."""
        count = len(self.labels)
        pixels, readable = np.empty(0, np.uint8), np.zeros(count, bool)
        for start in range(0, count if limit else 0, 1024):
            positions = list(range(start, min(start + 1024, count)))
            for position, value in zip(positions, self.images.__getitems__(positions), strict=True):
                try:
                    image = np.asarray(decode(value["image"], int(self.rows[position]), self.exif))
                except BrokenImage:
                    continue  # told when it is drawn
                if pixels.size == 0:
                    if count * image.nbytes > limit:
                        return None
                    pixels = np.zeros((count, *image.shape), np.uint8)
                if image.shape != pixels.shape[1:]:
                    return None
                pixels[position], readable[position] = image, True
        return (pixels, readable) if readable.any() else None

    def _decode(self, position: int, seed: int, value: Any) -> tuple[int, Any]:
        """The image at `position`, or, broken images being skipped, another of its class: (its position, the image)."""
        try:
            return position, decode(value, int(self.rows[position]), self.exif)
        except BrokenImage as error:
            if self.replaced is None:
                or_skip = "" if self.num_views is None else ", or say loader.broken=skip"
                raise BrokenImage(f"{error}; mend it or leave it out of the index{or_skip}") from error
            self._note(position, error)
        others = np.flatnonzero(self.labels == self.labels[position])
        for other in np.roll(others, -(seed % len(others))).tolist():  # from a place that the sample's seed decides
            value = self.images[other]["image"]
            with contextlib.suppress(BrokenImage):
                return other, decode(value, int(self.rows[other]), self.exif)
        raise BrokenImage(
            f"no image of class {self.labels[position]} can be read, the last one tried is {where(value, other)}"
        )

    def _note(self, position: int, error: BrokenImage) -> None:
        assert self.replaced is not None
        if self.replaced[position] == 0:
            warnings.warn(f"{error}; another image of its class takes its place", RuntimeWarning, stacklevel=2)
        self.replaced[position] += 1


class Resident:
    """The images of a training split on a device, and what makes views of them there: some batches at once, up to so
    many `pixels`, for a policy's many small calls take as long for one."""

    def __init__(self, dataset: ViewsDataset, device: torch.device, pixels: int = 2**24) -> None:
        """dataset: with speed.resident; it gives its decoded images away."""
        assert dataset.num_views is not None
        assert dataset.cache is not None and dataset.batched is not None
        images, dataset.cache = dataset.cache[0], None
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
        self.policy = dataset.batched
        self.at_once = pixels // (dataset.size[0] * dataset.size[1] * dataset.num_views)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        waiting = iter(batches)
        for first in waiting:
            more = itertools.islice(waiting, max(0, self.at_once // len(first["label"]) - 1))
            group = [first, *more]
            drawn = [np.concatenate([cast(Any, b[name]) for b in group]) for name in ("words", "notes")]
            draws = Draws(*(array.reshape(array.shape[0] * array.shape[1], array.shape[2]) for array in drawn))
            images = self.images[torch.cat([batch["position"] for batch in group])]
            views = self.policy(images, draws).unflatten(0, (len(images), -1))
            for batch, image in zip(group, views.split([len(b["label"]) for b in group]), strict=True):
                yield {"image": image, "label": batch["label"], "row": batch["row"]}


def _drawn(draws: Draws, num_views: int) -> Batch:
    """Draws by image, (B, num_views, ...), in a batch."""
    both = {"words": draws.words, "notes": draws.notes}
    return {n: cast(Any, a.reshape(len(a) // num_views, num_views, a.shape[1])) for n, a in both.items()}


def _one_size(images: list[Any]) -> tuple[int, int] | None:
    """(H, W), if it is that of all images."""
    sizes = {i.shape[:2] if isinstance(i, np.ndarray) else (i.height, i.width) for i in images}
    return sizes.pop() if len(sizes) == 1 else None


def _stack(views: Iterable[Any], policy: Policy) -> torch.Tensor:
    """Images or arrays (H, W, 3) to uint8 (len(views), 3, H, W)."""
    arrays = [np.asarray(view) for view in views]
    sizes = {array.shape for array in arrays}
    if len(sizes) > 1:
        (h0, w0, _), (h1, w1, _) = sorted(sizes)[:2]
        raise ValueError(
            f"the images of a batch differ in size ({w0} x {h0} and {w1} x {h1}) after the policy {policy.text!r}: "
            "let it end in one size, for instance with center_crop(224) or upscale(32)"
        )
    height, width, channels = arrays[0].shape
    stacked = np.empty((len(arrays), channels, height, width), np.uint8)
    np.stack([array.transpose(2, 0, 1) for array in arrays], out=stacked)  # torch's permute takes four times as long
    return torch.from_numpy(stacked)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Without workers a batch is made in the training process, whose own draws (dropout ...) must not depend on it."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
