"""Nets of several branches: a backbone cut in two, of which every branch has its own copy of the end.

Shapes: B images, E branches, F features of the backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import timm
import torch
from torch import Tensor, nn

from rescom_timm.models.bounds import spend_copy
from rescom_timm.models.net import Net, NoProjector
from rescom_timm.models.trainable import freeze_statistics


class Remade(Net):
    """A net made of the parts of another, for one that runs them another way, without a projector."""

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
        """Takes over the net's parts. sources: E encoders from which each branch's part is copied. Raises ValueError
        where they cannot be cut at `branch`."""
        super().__init__(net)
        self.encoder, _ = cut(net.encoder, branch)
        self.experts = nn.ModuleList(cut(source, branch)[1] for source in sources)
        self.recreate = None

    def train(self, mode: bool = True) -> BranchedNet:
        super().train(mode)
        if self.frozen_statistics:
            freeze_statistics(self.experts)
        return self

    def stem(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to what each of the experts takes."""
        return self.encoder.forward_features(self.normalize(images))  # type: ignore[operator]

    def check_trained(self) -> None:
        """Raises ValueError where weights of the branches' own parts are frozen, which start at random."""
        if not all(weight.requires_grad for weight in self.experts[0].parameters()):
            raise ValueError(
                f"net.trainable freezes weights of the {self.kind}' own parts, which start at random: say fresh: false"
            )

    def to_timm(self) -> nn.Module:
        raise ValueError(f"a net of several {self.kind} is no plain timm model, so it is not exported")


def branch_sources(net: Net, number: int, fresh: bool) -> list[nn.Module]:
    """Encoders to take `number` branches from: the net's own first, then, with `fresh`, others of random weights, where
    it is known how to make them."""
    if not fresh or net.recreate is None:
        return [net.encoder] * number
    return [net.encoder, *(timm.create_model(**net.recreate, num_classes=0) for _ in range(1, number))]


def last_block(encoder: nn.Module) -> str:
    """The name of the last child of a timm encoder's last stage: layer4.2 of a ResNet-50, stages.3.blocks.2 of a
    ConvNeXt-T. Raises ValueError where timm does not tell of stages."""
    stages = [info["module"] for info in getattr(encoder, "feature_info", []) if info.get("module")]
    if not stages:
        raise ValueError("timm does not say what the stages of this backbone are: name the branch")
    path, stage = stages[-1], encoder.get_submodule(stages[-1])
    for _ in range(2):  # some stages keep their blocks in a child
        children = list(stage.named_children())
        if not children or (path != stages[-1] and not isinstance(stage, nn.Sequential)):
            break
        path, stage = f"{path}.{children[-1][0]}", children[-1][1]
    return path


def cut(encoder: nn.Module, branch: str) -> tuple[nn.Module, nn.Module]:
    """(stem, tail): copies of a timm encoder such that tail(stem.forward_features(x)) is encoder(x), all children from
    `branch` on in the tail. Raises ValueError where there is no such child or the encoder is no chain of them."""
    names = list(_children(encoder, branch))
    if branch not in names[1:]:
        raise ValueError(f"branch: the backbone has no child {branch!r} to cut at; there are: {', '.join(names[1:])}")
    at = names.index(branch)
    for name in names[at:]:
        spend_copy(encoder.get_submodule(name))
    stem, tail = copy.deepcopy(encoder), copy.deepcopy(encoder)
    for model, dropped in ((stem, names[at:]), (tail, names[:at])):
        for name in dropped:
            model.set_submodule(name, nn.Identity())
    if not agrees(encoder, lambda images: tail(stem.forward_features(images)), stem, tail):  # type: ignore[operator]
        raise ValueError(
            f"branch: this backbone is not a chain of modules that can be cut at {branch!r}; "
            "use a ResNet or a ConvNeXt, or another branch"
        )
    return stem, tail


def _children(module: nn.Module, branch: str, above: str = "") -> Iterator[str]:
    """Names of the children in order, in the place of those that hold `branch` their own children's."""
    for name, child in module.named_children():
        if branch.startswith(f"{above}{name}."):
            yield from _children(child, branch, f"{above}{name}.")
        else:
            yield above + name


@torch.no_grad()
def agrees(encoder: nn.Module, otherwise: Callable[[Tensor], Tensor], *parts: nn.Module) -> bool:
    """Whether `otherwise`, which runs `parts`, gives a timm encoder's features of random images too, in evaluation."""
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
