"""How a run is started: one process or many, and what cannot be."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import nn

from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.engine.allocator import keep_freed_memory
from rescom_timm.methods import Method
from rescom_timm.methods.parts import ClassProjector

STARTED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which launchers say how many processes they started."""


def new_accelerator(precision: str, **options: object) -> Accelerator:
    """An Accelerator, whatever the one before it in this process was for.

    By itself accelerate keeps the precision of the first.
    """
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, **options)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def launch(recipe: Recipe) -> Accelerator:
    """An Accelerator for this recipe. Raises RecipeError where recipe and launch do not fit together."""
    train = recipe.train
    accelerator = new_accelerator(
        train.precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    processes = accelerator.num_processes
    name, started = max(((name, int(os.environ.get(name) or 1)) for name in STARTED), key=lambda pair: pair[1])
    if started > processes:
        raise RecipeError(
            "train.distributed",
            f"{started} processes were started ({name}), but each would train alone ({processes} seen by accelerate). "
            f"Start them with: torchrun --nproc_per_node {started} -m rescom_timm train RECIPE "
            "(ACCELERATE_USE_CPU=1 torchrun ... on a machine without GPUs)",
        )
    if recipe.speed.capture and (processes > 1 or accelerator.is_fsdp2):
        raise RecipeError("recipe.conflict", "speed.capture needs a single process without FSDP; turn it off")
    if train.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("train.device", "train.precision: fp16 is not supported on a CPU; use bf16 or no")
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all training batches have one shape
        if train.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            warnings.warn("this GPU computes bf16 without its tensor cores: fp16 is faster here", stacklevel=2)
    per_step = processes * train.accumulate
    if train.batch_size % per_step:
        lower = train.batch_size // per_step * per_step
        raise RecipeError(
            "recipe.conflict",
            f"train.batch_size {train.batch_size} is for all processes together and is not divisible by {processes} "
            f"processes x {train.accumulate} accumulated; the nearest are {lower or per_step}, {lower + per_step}",
        )
    return accelerator


def leave(accelerator: Accelerator) -> None:
    """End the launch: its trackers and its group of processes."""
    if accelerator.num_processes > 1:
        # gloo's threads need the GIL to let go of the last tensors. This one holds it while it destroys the group and
        # waits for them (torch 2.11): a process hung so, once.
        time.sleep(0.1)
    accelerator.end_training()


def refuse_what_cannot_be_sharded(accelerator: Accelerator, recipe: Recipe, method: Method) -> None:
    """Raises RecipeError for a way of launching that this loop cannot train or save right."""
    way = accelerator.distributed_type
    if way in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        way == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise RecipeError(
            "train.distributed",
            f"{way.value} is not supported; use several processes (the default) or FSDP2 (--fsdp_version 2)",
        )
    if way == DistributedType.FSDP:
        outside = [name for name, _ in method.named_parameters() if not name.startswith("net.")]
        read = nn.ParameterList | ClassProjector
        # Vectors that the method reads from the net outside of its forward pass, where they would be stale shards.
        outside += [f"net.{name}" for name, part in method.net.named_children() if isinstance(part, read)]
        outside += ["train.nonfinite: skip"] if recipe.train.nonfinite == "skip" else []
        outside += ["train.ema"] if recipe.train.ema is not None else []
        outside += ["optimizer.sam"] if recipe.optimizer.sam is not None else []
        outside += ["net.frozen_precision: bf16"] if recipe.net.frozen_precision == "bf16" else []
        outside += [f"method {recipe.method.name}"] if method.fits_head else []
        if outside:
            raise RecipeError("train.distributed", f"FSDP2 shards only the net and does not support {outside[0]}")
        if recipe.net.classifier.init == "class_means":
            raise RecipeError("train.distributed", "net.classifier.init: class_means does not support FSDP; use random")


def prepare_to_shard(accelerator: Accelerator, net: nn.Module) -> None:
    """FSDP2 as without FSDP.

    Autocast over weights in float32 (accelerate's policy would round the embeddings), and every process starts from its
    own copy of the net (accelerate would send the buffers as shards, which they are not).
    """
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy, plugin.cpu_ram_efficient_loading = None, False
    if accelerator.native_amp:
        net.forward = convert_outputs_to_fp32(accelerator.autocast()(net.forward))  # type: ignore[method-assign]
