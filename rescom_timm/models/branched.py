"""Nets of several branches: a backbone split in two, with a copy of its end for each branch.

Shapes: B images, E branches, F features of the backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rescom_timm.errors import InputError
from rescom_timm.models.bounds import spend_copy
from rescom_timm.models.net import Net, NoProjector
from rescom_timm.models.trainable import freeze_statistics


class Remade(Net):
    """Base class of nets that run the parts of another net in another way, without a projector."""

    def __init__(self, net: Net) -> None:
        nn.Module.__init__(self)
        self.encoder, self.classifier = net.encoder, net.classifier
        self.projector = NoProjector()
        self.recreate, self.tuning, self.head = net.recreate, net.tuning, net.head
        self.frozen_statistics = net.frozen_statistics
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(net, name), persistent=False)


class BranchedNet(Remade):
    """A stem (`encoder`) and E copies of the rest of the backbone (`experts`)."""

    kind = "branches"
    """What the copies are called in messages."""

    def __init__(self, net: Net, sources: Sequence[nn.Module], branch: str) -> None:
        """Takes over the net's parts.

        sources: E encoders, each copied for one branch's part. Raises InputError if they cannot be split at `branch`.
        """
        super().__init__(net)
        self.encoder, _ = cut(net.encoder, branch)
        self.experts = nn.ModuleList(cut(source, branch)[1] for source in sources)
        self.recreate = None

    def train(self, mode: bool = True) -> BranchedNet:
        """Set training mode, except for frozen statistics."""
        super().train(mode)
        if self.frozen_statistics:
            freeze_statistics(self.experts)
        return self

    def stem(self, images: Tensor) -> Tensor:
        """Input of the experts, from images (N, 3, H, W)."""
        return self.encoder.forward_features(self.normalize(images))  # type: ignore[operator]

    def check_trained(self) -> None:
        """Raises InputError if weights of the branches' own parts, which start at random, are frozen."""
        if not all(weight.requires_grad for weight in self.experts[0].parameters()):
            raise InputError(
                "net.trainable", f"net.trainable freezes random weights of the {self.kind}: set method.fresh=false"
            )

    def to_timm(self) -> nn.Module:
        """Raises InputError."""
        raise InputError("net.export", f"a net with {self.kind} is not a plain timm model, so it cannot be exported")


def branch_sources(net: Net, number: int, fresh: bool) -> list[nn.Module]:
    """Encoders to copy `number` branches from: the net's own, then with `fresh` others of random weights.

    Without a known way to make the encoder again, all are the net's own.
    """
    import timm

    if not fresh or net.recreate is None:
        return [net.encoder] * number
    return [net.encoder, *(timm.create_model(**net.recreate, num_classes=0) for _ in range(1, number))]


def last_block(encoder: nn.Module) -> str:
    """Name of the last child of a timm encoder's last stage.

    layer4.2 of a ResNet-50, stages.3.blocks.2 of a ConvNeXt-T. Raises InputError if timm does not list stages.
    """
    stages = [info["module"] for info in getattr(encoder, "feature_info", []) if info.get("module")]
    if not stages:
        raise InputError("net.branch", "timm does not list the stages of this backbone: set method.branch")
    path, stage = stages[-1], encoder.get_submodule(stages[-1])
    for _ in range(2):  # some stages keep their blocks in a child
        children = list(stage.named_children())
        if not children or (path != stages[-1] and not isinstance(stage, nn.Sequential)):
            break
        path, stage = f"{path}.{children[-1][0]}", children[-1][1]
    return path


def cut(encoder: nn.Module, branch: str) -> tuple[nn.Module, nn.Module]:
    """Split a timm encoder into copies (stem, tail) such that tail(stem.forward_features(x)) is encoder(x).

    All children from `branch` on are in the tail. Raises InputError if there is no such child or the encoder is not a
    sequence of modules.
    """
    names = list(_children(encoder, branch))
    if branch not in names[1:]:
        raise InputError("net.branch", f"branch: the backbone has no child {branch!r}, but {', '.join(names[1:])}")
    at = names.index(branch)
    for name in names[at:]:
        spend_copy(encoder.get_submodule(name))
    stem, tail = copy.deepcopy(encoder), copy.deepcopy(encoder)
    for model, dropped in ((stem, names[at:]), (tail, names[:at])):
        for name in dropped:
            model.set_submodule(name, nn.Identity())
    if not agrees(encoder, lambda images: tail(stem.forward_features(images)), stem, tail):  # type: ignore[operator]
        raise InputError(
            "net.branch",
            f"branch: this backbone is not a sequence of modules that can be split at {branch!r}: use a ResNet or a "
            "ConvNeXt, or another branch",
        )
    return stem, tail


def _children(module: nn.Module, branch: str, above: str = "") -> Iterator[str]:
    """Ordered child names, with those that hold `branch` replaced by their own children."""
    for name, child in module.named_children():
        if branch.startswith(f"{above}{name}."):
            yield from _children(child, branch, f"{above}{name}.")
        else:
            yield above + name


@torch.no_grad()
def agrees(encoder: nn.Module, otherwise: Callable[[Tensor], Tensor], *parts: nn.Module) -> bool:
    """Whether `otherwise`, which runs `parts`, gives a timm encoder's features of random images, in evaluation."""
    size = encoder.pretrained_cfg["input_size"]  # type: ignore[index]
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    models = (encoder, *parts)
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        return torch.allclose(otherwise(images), encoder(images), rtol=1e-4, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
