"""train.fit_batch: how many passes a step is cut into, so that each fits the memory of its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, find_executable_batch_size, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.modules.batchnorm import _BatchNorm

from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.data.samples import ViewsDataset
from rescom_timm.data.sources import Data
from rescom_timm.data.transforms import parse
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import build_method, build_optimizer
from rescom_timm.engine.prepare import average_of, to_device
from rescom_timm.engine.run_folder import Resume, RunElsewhere, resumed


def fitted(recipe: Recipe, accelerator: Accelerator, data: Data, resume: Resume) -> Recipe:
    """The recipe with the train.accumulate that train.fit_batch asks for, the same in all processes.

    A resumed run keeps its value. Leaves the random generators as they were.

    Raises RecipeError where no pass fits, where FSDP shards the net, or where the run to go on with is elsewhere.
    """
    if not recipe.train.fit_batch:
        return recipe
    if accelerator.is_fsdp2:
        raise RecipeError(
            "train.distributed",
            "train.fit_batch does not support FSDP: set train.accumulate",
        )
    if isinstance(resume, RunElsewhere):
        raise RecipeError(
            "recipe.conflict",
            f"train.fit_batch: set train.accumulate to the value of {resume}, which is resumed",
        )
    run = resumed(recipe, resume) if accelerator.is_main_process else None
    accumulate = broadcast_object_list([run.train.accumulate if run else None])[0]
    if accumulate is None:
        before = checkpoint.random_state()
        accumulate = _tried(recipe, accelerator, data)
        checkpoint.set_random_state(before)
        clear_device_cache(garbage_collection=True)
    return replace(recipe, train=replace(recipe.train, accumulate=accumulate, fit_batch=False))


def _tried(recipe: Recipe, accelerator: Accelerator, data: Data) -> int:
    step = recipe.train.batch_size // accelerator.num_processes
    passes, views, batchnorm = _passes(recipe, accelerator, data)
    # BatchNorm takes no single vector.
    sizes = iter([n for n in range(step // recipe.train.accumulate, 0, -1) if step % n == 0 and n * views > 1])

    @find_executable_batch_size(starting_batch_size=next(sizes, 0), reduce_batch_size_fn=lambda: next(sizes, 0))
    def largest(batch_size: int) -> int:
        full = False
        try:
            passes(batch_size * views)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            full = True
        if any(gather_object([full])):
            raise torch.OutOfMemoryError("a process is out of memory.")
        return batch_size

    try:
        size = largest()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise RecipeError(
            "train.memory", "train.fit_batch: one image does not fit the device's memory: use a smaller net"
        ) from error
    accumulate = step // size
    if accelerator.is_main_process:
        seen = f", and BatchNorm sees {size} images at once" if batchnorm and accumulate > 1 else ""
        print(f"train.fit_batch: {size} images of a process fit its memory: train.accumulate={accumulate}{seen}")
    return accumulate


def _passes(recipe: Recipe, accelerator: Accelerator, data: Data) -> tuple[Callable[[int], None], int, bool]:
    """(the passes around an optimizer step of so many views each, an image's views, whether there is BatchNorm)."""
    method = build_method(replace(recipe, net=recipe.net.untrained()), data)
    to_device(accelerator, replace(recipe, speed=replace(recipe.speed, compile=False)), method)
    net, optimizer = method.net, build_optimizer(recipe.optimizer, method.net)
    policy, config = parse(recipe.views.train), recipe.loader
    shape = ViewsDataset(data.train, policy, 1, config.broken, config.reading)[0, 0]["image"].shape[-3:]
    held: list[object] = [average_of(net, recipe.train.ema)] if recipe.train.ema is not None else []
    if recipe.optimizer.sam is not None:  # weights once more
        held += [parameter.detach().clone() for parameter in net.parameters() if parameter.requires_grad]
    if accelerator.num_processes > 1:  # gradients once more, as DistributedDataParallel's buckets
        held += [torch.empty_like(parameter) for parameter in net.parameters() if parameter.requires_grad]

    def passes(views: int, held: list[object] = held) -> None:
        images = torch.zeros(views, *shape, dtype=torch.uint8, device=accelerator.device)
        labels = torch.zeros(views, dtype=torch.long, device=accelerator.device)
        method.train()
        try:
            for _ in range(2):  # the second beside gradients and the optimizer's moments
                with accelerator.autocast():
                    logits = net(images).logits
                F.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
        finally:
            optimizer.zero_grad()

    return passes, method.views, any(isinstance(module, _BatchNorm) for module in net.modules())
