"""Samples: the views of each image of a split, made in batches."""

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from rescom_timm.data.batched_transforms import BatchedPolicy
from rescom_timm.data.config import LoaderConfig as LoaderConfig  # where it was in 0.2.0
from rescom_timm.data.config import LoadingConfig
from rescom_timm.data.decoding import BrokenImage, ReadConfig, decode, where
from rescom_timm.data.draws import Draws, Size
from rescom_timm.data.plane_transforms import PlanePolicy
from rescom_timm.data.progress import image_bar
from rescom_timm.data.sampling import Item
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import Policy, seed_all
from rescom_timm.errors import CodedError, InputError, WorkerError

Batch = dict[str, torch.Tensor]


class ViewsDataset(Dataset[Batch]):
    """Reads items of a split in batches: decodes each image once and draws its views.

    B pairs of items give a batch of 2B rows: the first items of the pairs, then the second. `replaced` (N,) int32,
    shared by all workers, counts how often an unreadable image was replaced (None with broken="stop"). With device=True
    a batch holds, for `complete_views`, the images (B, V, 3, H, W) after the policy's first steps (V = 1 without any)
    and the draws of the rest as NumPy arrays, which stay on the host: words (B, num_views, k), notes (B, num_views, m).
    With speed.resident it holds, for `Resident`, only the draws. Raises InputError (recipe.conflict) if images and
    policy do not allow that.
    """

    def __init__(
        self,
        split: Split,
        policy: Policy,
        num_views: int | None,
        broken: str = "stop",
        reading: ReadConfig = ReadConfig(),
        speed: LoadingConfig = LoadingConfig(cache=0),
        device: bool = False,
        contrast: Policy | None = None,
    ) -> None:
        """Prepare to read the views of a split, all but the first by a policy of their own where it is given.

        contrast: policy of all views but the first, which draw from a seed of their own, so that the first views are
        the same with and without it. None: that of the first. Otherwise as said above.
        """
        self.images = split.dataset.select_columns("image")
        self.labels = np.asarray(split.labels, dtype=np.int64)
        self.rows = np.asarray(split.rows, dtype=np.int64)
        self.num_views = num_views
        self.reading = reading
        self.device = device
        self.batch_policy = device or speed.batched
        self.policy = policy
        self.replaced = torch.zeros(len(self.labels), dtype=torch.int32).share_memory_() if broken == "skip" else None
        self.cache = self._decode_all(speed.cache * 2**20)
        self.rest: ViewsDataset | None = None
        if contrast is not None and num_views is not None:
            self.rest = copy.copy(self)
            self.rest.policy, self.rest.num_views, self.num_views = contrast, num_views - 1, 1
        self.resident = speed.resident
        if self.resident:
            self.size = self._refuse_residence(speed)

    def _refuse_residence(self, speed: LoadingConfig) -> Size:
        """The one size (H, W) of all images. Raises InputError if they cannot stay on the device."""
        if self.cache is None:
            raise InputError(
                "recipe.conflict",
                f"speed.resident needs images of one size that fit into speed.cache ({speed.cache} MB): turn it "
                "off, or increase speed.cache",
            )
        pixels, readable = self.cache
        if not readable.all():
            row = int(self.rows[np.flatnonzero(~readable)[0]])
            raise InputError(
                "image.unreadable", f"speed.resident: cannot read the image of row {row}: leave it out of the index"
            )
        size = (pixels.shape[1], pixels.shape[2])
        if not self.device and (self.batched is None or not self.batched.serves(self.policy, size)):
            raise InputError(
                "recipe.conflict",
                f"speed.resident: a device gives other pixels than Pillow for {self.policy.text!r}: turn it off, or "
                "allow differences of a level or two with loader.device_views=true",
            )
        assert self.batched is not None
        if self.batched.head:
            raise InputError(
                "recipe.conflict",
                f"speed.resident: a device cannot do the first step of {self.policy.text!r}: turn it off",
            )
        return size

    @property
    def policy(self) -> Policy:
        """The policy; setting it makes its fast forms."""
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

    def __getitems__(self, items: list[Item] | list[tuple[Item, Item]]) -> Batch:
        """Items as a batch: image (B, V, 3, H, W), or (B, 3, H, W) in evaluation; label and row (B,)."""
        try:
            return self._batch(unpaired(items))
        except BrokenImage:
            raise
        except CodedError as error:
            if get_worker_info() is None:
                raise
            raise WorkerError(error.code, f"error[{error.code}]: {error}") from None

    def _batch(self, items: list[Item]) -> Batch:
        rows: list[int] = []
        if self.resident:
            rows = [position for position, _ in items]
            return self._draw([seed for _, seed in items]) | self._about(rows)

        def images() -> Iterator[Any]:
            for position, image in self._read(items):
                rows.append(position)
                yield image

        with random_state_kept():
            seeds = [seed for _, seed in items]
            if self.rest is not None:
                decoded = list(images())
                parts = self._augment(decoded, seeds), self.rest._augment(decoded, [seed ^ 1 for seed in seeds])
                views = {"image": torch.cat([part["image"] for part in parts], dim=1)}
            else:
                views = (self._begin if self.device else self._augment)(images(), seeds)
        return views | self._about(rows)

    def _about(self, positions: list[int]) -> Batch:
        labels, rows = torch.from_numpy(self.labels[positions]), torch.from_numpy(self.rows[positions])
        return {"label": labels, "row": rows} | ({"position": torch.tensor(positions)} if self.resident else {})

    def _draw(self, seeds: list[int]) -> Batch:
        """The draws of all views of a batch whose images are on the device."""
        assert self.batched is not None and self.num_views is not None
        with random_state_kept():
            return _drawn(self.batched.draw(seeds, self.num_views, self.size), self.num_views)

    def _augment(self, images: Iterable[Any], seeds: list[int]) -> Batch:
        """Read `images` one by one if each can be freed before the next, which reuses cached memory."""
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
        """The images (N, H, W, 3) and which are readable (N,); None if sizes differ or exceed `limit` bytes.

        Plain memory, which forked workers share; shared memory is often limited to 64 MB in containers.
        """
        if not limit:
            return None
        with image_bar(len(self.labels), "decoding") as bar:
            return self._decoded(limit, bar.update)

    def _decoded(self, limit: int, progress: Callable[[int], Any]) -> tuple[np.ndarray, np.ndarray] | None:
        count = len(self.labels)
        pixels, readable = np.empty(0, np.uint8), np.zeros(count, bool)
        for start in range(0, count, 1024):
            positions = list(range(start, min(start + 1024, count)))
            progress(len(positions))
            for position, value in zip(positions, self.images.__getitems__(positions), strict=True):
                try:
                    image = np.asarray(self._rgb(value["image"], position))
                except BrokenImage:
                    continue  # reported when it is drawn
                if pixels.size == 0:
                    if count * image.nbytes > limit:
                        return None
                    pixels = np.zeros((count, *image.shape), np.uint8)
                if image.shape != pixels.shape[1:]:
                    return None
                pixels[position], readable[position] = image, True
        return (pixels, readable) if readable.any() else None

    def _decode(self, position: int, seed: int, value: Any) -> tuple[int, Any]:
        """(position, image); with broken="skip" an unreadable image is replaced by another of its class."""
        try:
            return position, self._rgb(value, position)
        except BrokenImage as error:
            if self.replaced is None:
                or_skip = "" if self.num_views is None else ", or set loader.broken=skip"
                raise BrokenImage(f"{error}; repair it or leave it out of the index{or_skip}") from error
            self._note(position, error)
        others = np.flatnonzero(self.labels == self.labels[position])
        for other in np.roll(others, -(seed % len(others))).tolist():  # from a place that the sample's seed decides
            value = self.images[other]["image"]
            with contextlib.suppress(BrokenImage):
                return other, self._rgb(value, other)
        raise BrokenImage(
            f"no image of class {self.labels[position]} can be read; the last one tried is {where(value, other)}"
        )

    def _rgb(self, value: Any, position: int) -> Image.Image:
        return decode(value, int(self.rows[position]), self.reading)

    def _note(self, position: int, error: BrokenImage) -> None:
        assert self.replaced is not None
        if self.replaced[position] == 0:
            warnings.warn(f"{error}; another image of its class takes its place", RuntimeWarning, stacklevel=2)
        self.replaced[position] += 1


def unpaired(items: list[Item] | list[tuple[Item, Item]]) -> list[Item]:
    """Pairs of items as a list: all first items, then all second ones. Items are returned as they are."""
    if items and isinstance(items[0][0], tuple):
        return [item for drawn in zip(*items, strict=True) for item in cast(tuple[Item, ...], drawn)]
    return cast(list[Item], items)


def _drawn(draws: Draws, num_views: int) -> Batch:
    """Draws by image, (B, num_views, ...), in a batch."""
    both = {"words": draws.words, "notes": draws.notes}
    return {n: cast(Any, a.reshape(len(a) // num_views, num_views, a.shape[1])) for n, a in both.items()}


def _one_size(images: list[Any]) -> tuple[int, int] | None:
    """(H, W), if all images have it."""
    sizes = {i.shape[:2] if isinstance(i, np.ndarray) else (i.height, i.width) for i in images}
    return sizes.pop() if len(sizes) == 1 else None


def _stack(views: Iterable[Any], policy: Policy) -> torch.Tensor:
    """Images or arrays (H, W, 3) to uint8 (len(views), 3, H, W)."""
    arrays = [np.asarray(view) for view in views]
    sizes = {array.shape for array in arrays}
    if len(sizes) > 1:
        (h0, w0, _), (h1, w1, _) = sorted(sizes)[:2]
        raise InputError(
            "image.size",
            f"images differ in size ({w0} x {h0} and {w1} x {h1}) after {policy.text!r}: end it with one size, such as "
            "center_crop(224) or upscale(32)",
        )
    height, width, channels = arrays[0].shape
    stacked = np.empty((len(arrays), channels, height, width), np.uint8)
    np.stack([array.transpose(2, 0, 1) for array in arrays], out=stacked)  # torch's permute takes four times as long
    return torch.from_numpy(stacked)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Draws within change none of this process afterwards, by Python, NumPy and torch on the CPU (dropout ...)."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
