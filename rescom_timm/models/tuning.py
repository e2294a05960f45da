"""Fine-tuning with few weights: LoRA, AdaptFormer, prompts, or full fine-tuning.

The backbone's own weights stay frozen; the added ones train. Shapes: F the width of a block, r the rank, K classes, L
blocks.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rescom_timm.errors import InputError, MissingPackageError

LORA_LAYERS = ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "kv", "proj", "fc1", "fc2", "fc1_g", "fc1_x")
"""Last names of the linear layers of timm's attention and MLP."""
MAX_RANK = 4096
MAX_TOKENS = 1000


@dataclass(frozen=True)
class TuningConfig:
    """Weights that are added to a frozen backbone."""

    name: Literal["full", "lora", "adaptformer", "prompt"] = "full"
    """full: the weights that `net.trainable` names. lora: low-rank updates beside linear layers and convolutions (Hu et
    al. 2022, arXiv 2106.09685; by the peft library), merged into a plain timm model at export. adaptformer: a small
    bottleneck parallel to each block's MLP (Chen et al. 2022, arXiv 2205.13535), as in LIFT. prompt: learned tokens
    before the patches (VPT, Jia et al. 2022, arXiv 2203.12119), in timm's VisionTransformer. The last two cannot be
    merged."""
    rank: int | None = None
    """r; null: LIFT's rule 2^floor(log2(K / 2L)), at least 1, with which all adapters together have about as many
    weights as the classifier."""
    layers: tuple[str, ...] = ()
    """LoRA: patterns of layer names, such as layer4.*.conv2; empty: the linear layers of every attention and MLP."""
    tokens: int = 10
    """Prompts in a layer."""
    deep: bool = True
    """New prompts in every block (VPT-deep); false: only in the first (VPT-shallow)."""

    def __post_init__(self) -> None:
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise InputError("recipe.value", f"rank must be from 1 to {MAX_RANK:,}, not {self.rank}")
        if self.layers and self.name != "lora":
            raise InputError("recipe.conflict", f"layers is a setting of lora, and tuning.name is {self.name}")
        if self.rank is not None and self.name == "prompt":
            raise InputError("recipe.conflict", "rank is a setting of lora and adaptformer: set tokens for prompt")
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise InputError("recipe.value", f"tokens must be from 1 to {MAX_TOKENS:,}, not {self.tokens}")
        if (self.tokens, self.deep) != (10, True) and self.name != "prompt":
            raise InputError("recipe.conflict", f"tokens and deep are settings of prompt: tuning.name is {self.name}")


def tune(encoder: nn.Module, config: TuningConfig, num_classes: int) -> TuningConfig:
    """Add trainable weights to an encoder, in place, and freeze the rest; returns the config with the rank taken.

    Raises InputError for a backbone without the layers that it needs, patterns that match nothing or a rank that is too
    large, and MissingPackageError for LoRA without peft.
    """
    if config.name == "full":
        return config
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    if config.name == "prompt":
        _add_prompts(encoder, config)
        return config
    add = _add_lora if config.name == "lora" else _add_adapters
    return replace(config, rank=add(encoder, config, num_classes))


def added(encoder: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that `tune` has added."""
    marks = ("lora_", ".adapter.", ".prompts")
    return (weight for name, weight in encoder.named_parameters() if any(mark in name for mark in marks))


def default_rank(num_classes: int, blocks: int) -> int:
    """LIFT's rule (Shi et al. 2024, arXiv 2309.10019): r = 2^floor(log2(K / 2L)), at least 1."""
    return 2 ** max(0, math.floor(math.log2(num_classes / (2 * blocks))))


@torch.no_grad()
def untuned(encoder: nn.Module) -> nn.Module:
    """A copy of an encoder with timm's own layers alone, into which LoRA is merged.

    Raises InputError for adapters, which are not linear, and for prompts, which timm does not have.
    """
    encoder = copy.deepcopy(encoder)
    if any(isinstance(module, PromptedBlock) for module in encoder.modules()):
        raise InputError("net.export", "prompts are not part of a plain timm model, so the net cannot be exported")
    if any(isinstance(module, Adapter) for module in encoder.modules()):
        raise InputError("net.export", "AdaptFormer's adapters are not linear, so a timm model cannot merge them")
    for name, module in list(encoder.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            encoder.set_submodule(name, module.get_base_layer())  # type: ignore[operator]
    return encoder


# ------------------------------------------------------------------------------------------------------- AdaptFormer


class Adapter(nn.Module):
    """Bottleneck s * up(relu(down(norm(x)))), (..., F) to (..., F); up starts at zero, so that nothing changes."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.scale = nn.Parameter(torch.ones(1))  # not a scalar, which FSDP does not shard
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for values in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(values)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., F) to (..., F)."""
        return self.scale * self.up(torch.relu(self.down(self.norm(x))))


class AdaptedMlp(nn.Module):
    """Replaces a block's MLP and its norm: mlp(norm(x)) + adapter(x)."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.norm, self.mlp, self.adapter = norm, mlp, adapter

    def forward(self, x: Tensor, *arguments: object, **options: object) -> Tensor:
        """Tokens (..., F) to (..., F)."""
        return self.mlp(self.norm(x), *arguments, **options) + self.adapter(x)


def _blocks(encoder: nn.Module) -> list[Any]:
    """Blocks of the form x + mlp(norm2(x))."""
    return [
        module
        for module in encoder.modules()
        if isinstance(getattr(module, "norm2", None), nn.LayerNorm)
        and isinstance(getattr(module, "mlp", None), nn.Module)
    ]


def _add_adapters(encoder: nn.Module, config: TuningConfig, num_classes: int) -> int:
    blocks = _blocks(encoder)
    if not blocks:
        raise InputError(
            "net.unsupported",
            "tuning.name: adaptformer needs blocks with a norm2 and an MLP: use a ViT, or lora with tuning.layers",
        )
    rank = config.rank or default_rank(num_classes, len(blocks))
    for block in blocks:
        if rank > (width := block.norm2.normalized_shape[0]):
            raise InputError("net.tuning", f"tuning.rank {rank} must be at most the {width} features of a block")
    probe = copy.deepcopy(encoder).float().eval()  # other weights, because those of a new net may hide a difference
    with torch.no_grad():
        for weight in probe.parameters():
            weight.normal_(0, 0.05)
        images = _probe_images(encoder)
        before = probe(images)
        _wrap(_blocks(probe), rank)
        if not torch.allclose(probe(images), before, atol=1e-5):
            raise InputError("net.unsupported", "tuning.name: adaptformer needs blocks x + mlp(norm2(x)): use lora")
    _wrap(blocks, rank)
    return rank


def _wrap(blocks: list[Any], rank: int) -> None:
    for block in blocks:
        adapter = Adapter(block.norm2.normalized_shape[0], rank).to(next(block.parameters()))
        block.mlp, block.norm2 = AdaptedMlp(block.norm2, block.mlp, adapter), nn.Identity()


def _probe_images(encoder: Any) -> Tensor:
    channels, *default = encoder.pretrained_cfg["input_size"]
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None) or default
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, *size, generator=generator)


# ----------------------------------------------------------------------------------------------------------- prompts


class PromptedBlock(nn.Module):
    """A block of a ViT with prompts (P, F) between the prefix (class token, registers) and the patches.

    The block inserts its prompts, if any, at its input and removes `drop` tokens at its output: all P in every block of
    VPT-deep; in VPT-shallow the first block inserts them and the last removes them.
    """

    def __init__(self, block: nn.Module, prompts: Tensor | None, prefix: int, drop: int) -> None:
        super().__init__()
        self.block, self.prefix, self.drop = block, prefix, drop
        self.prompts = None if prompts is None else nn.Parameter(prompts)

    def forward(self, x: Tensor, *arguments: object, **options: object) -> Tensor:
        """Tokens (N, T, F) to (N, T', F)."""
        if self.prompts is not None:
            prompts = self.prompts.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], dim=1)
        x = self.block(x, *arguments, **options)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + self.drop :]], dim=1) if self.drop else x


def _add_prompts(encoder: Any, config: TuningConfig) -> None:
    from timm.models import VisionTransformer

    if not isinstance(encoder, VisionTransformer):
        raise InputError(
            "net.unsupported",
            f"tuning.name: prompt needs timm's VisionTransformer, not {type(encoder).__name__}: use another tuning",
        )
    width, patch = encoder.embed_dim, encoder.patch_embed.patch_size
    bound = math.sqrt(6 / (3 * math.prod(patch) + width))  # VPT's, Xavier's for the patch embedding
    last = len(encoder.blocks) - 1
    for i, block in enumerate(encoder.blocks):
        weight = next(block.parameters())
        own = torch.empty(config.tokens, width, dtype=weight.dtype, device=weight.device).uniform_(-bound, bound)
        prompts = own if config.deep or i == 0 else None
        drop = config.tokens if config.deep or i == last else 0
        encoder.blocks[i] = PromptedBlock(block, prompts, encoder.num_prefix_tokens, drop)


# -------------------------------------------------------------------------------------------------------------- LoRA


def _add_lora(encoder: nn.Module, config: TuningConfig, num_classes: int) -> int:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingPackageError(
            "system.package", "tuning.name: lora needs peft: pip install 'rescom-timm[lora]'"
        ) from error
    kinds = (nn.Linear, nn.Conv2d)
    layers = {name: module for name, module in encoder.named_modules() if isinstance(module, kinds)}
    if config.layers:
        for pattern in config.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                names = list(layers)
                raise InputError(
                    "net.tuning",
                    f"tuning.layers: no linear layer or convolution matches {pattern!r}: give a pattern of names, from "
                    f"{names[0]} to {names[-1]}",
                )
        chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in config.layers)]
    else:
        inside = [name for name, module in layers.items() if isinstance(module, nn.Linear) and "." in name]
        chosen = [name for name in inside if name.rpartition(".")[2] in LORA_LAYERS and "patch_embed" not in name]
        if not chosen:
            raise InputError(
                "net.unsupported",
                "tuning.name: lora finds no attention or MLP in this backbone: set tuning.layers, such as "
                "[layer4.*.conv2]",
            )
    blocks = len(_blocks(encoder)) or len(chosen)
    rank = config.rank or default_rank(num_classes, blocks)
    for name in chosen:
        weight = layers[name].weight
        if rank > min(weight.shape[0], weight[0].numel()):
            raise InputError("net.tuning", f"tuning.rank {rank} is more than {name} has: {tuple(weight.shape)}")
    targets = "|".join(map(re.escape, chosen))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=1, target_modules=targets), encoder)  # scaled by 1 / r
    return rank
