"""Loaders: from a split to batches, the same ones on any number of workers and processes.

A training sample is an item (position in the split, seed of its draws). `Order` gives the items of an epoch as a pure
function of (seed, epoch); the generators are re-seeded for each item; torch's own BatchSampler cuts the items into
GLOBAL batches; accelerate (`split_batches=True`) gives each process its slice of every batch. So the images depend
neither on workers nor on processes, and a resumed epoch (`accelerate.skip_first_batches`) continues bit for bit.

A batch is {"image": uint8 (B, V, 3, H, W), "label": int64 (B,), "row": int64 (B,)}, V views an image; in evaluation
image is (B, 3, H, W). `row` is the row of the source.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from rescom_timm.data.batched_transforms import BatchedPolicy
from rescom_timm.data.config import LoaderConfig, LoadingConfig, ViewsConfig
from rescom_timm.data.samples import Batch, ViewsDataset
from rescom_timm.data.sampling import InOrder, Order, SamplerName
from rescom_timm.data.shared_memory import worker_options
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import parse
from rescom_timm.errors import InputError
from rescom_timm.text import counted

T = TypeVar("T")


def train_loader(
    split: Split,
    views: ViewsConfig,
    num_views: int,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = None,
    config: LoaderConfig = LoaderConfig(),
    speed: LoadingConfig = LoadingConfig(),
    second: SamplerName | None = None,
) -> DataLoader[Batch]:
    """Return batches of `num_views` views per image; the last incomplete batch of an epoch is dropped.

    All views but the first are by views.contrast where it is set.

    With a `second` sampler each batch has twice the rows: those drawn by config.sampler, then as many drawn by the
    second; each of several processes gets both halves of its part. `batch_size` counts the images of all processes
    together, without the second draw. `epochs`, the length of the run, is needed by the progressive sampler. Call
    `set_epoch(loader, epoch)` before each epoch, on the loader that accelerate prepared and before
    `skip_first_batches`. `device_transforms.complete` completes the batches on their device. Raises InputError:
    recipe.value for a batch larger than the split, recipe.conflict if config.device_views or speed.resident do not fit
    images and policy.
    """
    if num_views < 1:
        raise InputError("recipe.value", f"an image needs at least 1 view, not {num_views}")
    if not 1 <= batch_size <= len(split.labels):
        raise InputError(
            "recipe.value",
            f"a batch of {batch_size} cannot be drawn from {counted(len(split.labels), 'image')} of {split.name}: "
            "set a smaller train.batch_size",
        )
    policy = parse(views.train, views.mean)
    if config.device_views and not BatchedPolicy(policy, near=True).steps:
        raise InputError(
            "recipe.conflict", f"loader.device_views: a device cannot do the last step of {policy.text!r}: turn it off"
        )
    contrast = None if views.contrast is None or num_views == 1 else parse(views.contrast, views.mean)
    dataset = ViewsDataset(
        split, policy, num_views, config.broken, config.reading, speed, config.device_views, contrast
    )
    moving = [one for one in (policy, contrast) if one is not None and one.moves]
    if moving and epochs is None:
        raise InputError("recipe.value", f"{moving[0].text!r} moves over the whole run: give the number of epochs")

    def progress(t: float) -> None:
        for one in moving:
            one.set_progress(t)

    order = Order(split.labels, config.sampler, seed, epochs, second, progress if moving else None)
    return _loader(dataset, order, batch_size, speed, drop_last=True, persistent=True)


def eval_loader(
    split: Split,
    views: ViewsConfig,
    batch_size: int,
    config: LoaderConfig = LoaderConfig(),
    speed: LoadingConfig = LoadingConfig(),
    together: int = 1,
    cache: int = 0,
) -> DataLoader[Batch]:
    """Every image of the split once, in order; an unreadable image raises BrokenImage in any case.

    together: how many such loaders run at the same time. cache: megabytes in which decoded images of one size are
    kept for the next pass, as in speed.cache. With several processes accelerate pads the last batch, and its
    `gather_for_metrics` drops the padding.
    """
    if batch_size < 1:
        raise InputError("recipe.value", f"the batch size must be at least 1, not {batch_size}")
    speed = dataclasses.replace(speed, cache=cache, resident=False)
    policy = parse(views.eval, views.mean)
    dataset = ViewsDataset(split, policy, None, "stop", config.reading, speed)
    return _loader(
        dataset, InOrder(len(dataset)), batch_size, speed, drop_last=False, persistent=False, together=together
    )


def set_epoch(loader: DataLoader[Batch], epoch: int) -> None:
    """Set the next epoch of a training loader, plain or prepared by accelerate."""
    if hasattr(loader, "set_epoch"):  # accelerate's wrapper, which otherwise sets the epoch by its own count
        loader.set_epoch(epoch)
    else:
        cast(Order, loader.sampler).set_epoch(epoch)


def _loader(
    dataset: ViewsDataset, sampler: Any, batch_size: int, speed: LoadingConfig, drop_last: bool, persistent: bool,
    together: int = 1,
) -> DataLoader[Batch]:  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows = batch_size * (2 if isinstance(sampler, Order) and sampler.second is not None else 1)
    batch_bytes = rows * _sample_bytes(dataset) if speed.workers else 0
    options = worker_options(min(speed.workers, cores), speed.prefetch, batch_bytes, together, speed.timeout)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        persistent_workers=persistent and options["num_workers"] > 0,
        pin_memory=speed.pin_memory and torch.cuda.is_available(),
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else DataLoader draws its workers' base seed from the global generator
        **options,
    )


def _sample_bytes(dataset: ViewsDataset) -> int:
    """Bytes of one sample; 0 if the first image cannot be read, which is reported when it is drawn."""
    replaced, dataset.replaced = dataset.replaced, None  # no other image takes its place here
    try:
        sample = dataset[0, 0]
    except Exception:  # whatever a reader raises
        return 0
    finally:
        dataset.replaced = replaced
    return sum(value.nbytes for value in sample.values() if isinstance(value, np.ndarray | torch.Tensor))


def _as_it_is(batch: Any) -> Any:
    return batch  # the dataset's __getitems__ has stacked it


def one_ahead(loader: Iterable[T]) -> Iterator[T]:
    """The batches of a loader, each read in a thread while the one before it is used."""
    batches = iter(loader)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
