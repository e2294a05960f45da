"""Which weights of a net are trained: all of them, some by name, or the heads alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rescom_timm.errors import InputError

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def set_trainable(encoder: nn.Module, chosen: Sequence[str]) -> None:
    """Freeze every weight of the encoder that is not chosen; classifier and projector always train.

    chosen: "all", "none", "norms" (scale and shift of every normalisation), "biases", "last_block" (timm's last group
    of layers with a matrix or a convolution, and later ones), or patterns of names such as "layer4.2.*". Raises
    InputError for a pattern that matches no weight.
    """
    if "all" in chosen:
        return
    names = [name for name, _ in encoder.named_parameters()]
    trained: set[str] = set()
    for pattern in chosen:
        if pattern == "none":
            continue
        if pattern == "norms":
            found = set(_norm_weights(encoder))
        elif pattern == "biases":
            found = {name for name in names if name.endswith(".bias")}
        elif pattern == "last_block":
            found = set(_last_block(encoder))
        else:
            found = {name for name in names if fnmatchcase(name, pattern)}
            if not found:
                raise InputError(
                    "net.trainable",
                    f"no weight of the backbone matches {pattern!r}: give a pattern of names, from {names[0]} to "
                    f"{names[-1]}, or all, none, norms, biases or last_block",
                )
        trained |= found
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in trained)


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 of the names, types, shapes and numbers of weights, in the order of their names."""
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        sha256.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def count_weights(net: nn.Module) -> dict[str, int]:
    """Number of trained weights and of all weights of a net."""
    sizes = [(p.numel(), p.requires_grad) for p in net.parameters()]
    return {"trained": sum(size for size, trained in sizes if trained), "all": sum(size for size, _ in sizes)}


def keep_frozen_in_bfloat16(encoder: nn.Module) -> None:
    """Cast the frozen weights of linear layers and convolutions to bfloat16, as autocast does anyway."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()


def freeze_statistics(encoder: nn.Module) -> None:
    """Put every BatchNorm into evaluation mode, which keeps its running statistics; call it after train()."""
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics within the block, also in training mode."""
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _norm_weights(encoder: nn.Module) -> Iterator[str]:
    for prefix, module in encoder.named_modules():
        if isinstance(module, NORMS):
            yield from (f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))


def _last_block(encoder: nn.Module) -> Iterator[str]:
    if not hasattr(encoder, "group_matcher"):
        raise InputError("net.trainable", "last_block: timm does not list the blocks of this backbone: give a pattern")
    from timm.models import group_parameters

    groups = group_parameters(encoder, encoder.group_matcher(coarse=False))  # type: ignore[operator]
    weights = dict(encoder.named_parameters())
    last = max(number for number, names in groups.items() if any(weights[name].ndim > 1 for name in names))
    for number, names in groups.items():
        if number >= last:
            yield from names
