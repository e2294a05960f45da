"""The part of the views that is made on the device, in batches."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from rescom_timm.data.batched_transforms import BatchedPolicy
from rescom_timm.data.config import LoaderConfig, ViewsConfig
from rescom_timm.data.draws import Draws
from rescom_timm.data.samples import Batch, ViewsDataset
from rescom_timm.data.transforms import parse


def complete(
    loader: DataLoader[Batch], views: ViewsConfig, config: LoaderConfig, device: torch.device
) -> Callable[[Iterable[Batch]], Iterable[Batch]]:
    """The function that completes batches of a training loader on the device they were moved to."""
    dataset = cast(ViewsDataset, loader.dataset)
    return Resident(dataset, device) if dataset.resident else functools.partial(map, complete_views(views, config))


def complete_views(views: ViewsConfig, config: LoaderConfig) -> Callable[[Batch], Batch]:
    """The function that completes a training batch on its device: with config.device_views the rest of the policy."""
    if not config.device_views:
        return lambda batch: batch
    policy = BatchedPolicy(parse(views.train, views.mean), near=True)

    def rest(batch: Batch) -> Batch:
        drawn = cast(dict[str, Any], batch)
        words, notes = drawn["words"], drawn["notes"]
        draws = Draws(np.concatenate(words), np.concatenate(notes))
        finished = policy(batch["image"].flatten(0, 1), draws).unflatten(0, words.shape[:2])
        return {"image": finished, "label": batch["label"], "row": batch["row"]}

    return rest


class Resident:
    """The images of a training split on a device, and their views made there.

    Several batches at once, up to `pixels` pixels, because the many small calls of a policy cost the same for one
    batch.
    """

    def __init__(self, dataset: ViewsDataset, device: torch.device, pixels: int = 2**24) -> None:
        """dataset: with speed.resident; its decoded images are moved to the device."""
        assert dataset.num_views is not None
        assert dataset.cache is not None and dataset.batched is not None
        images, dataset.cache = dataset.cache[0], None
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
        self.policy = dataset.batched
        self.at_once = pixels // (dataset.size[0] * dataset.size[1] * dataset.num_views)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches with their views, image (B, V, 3, h, w)."""
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
