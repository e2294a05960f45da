"""The CIFAR ResNets (He et al. 2016, section 4.2) in timm's registry: resnet8_cifar, resnet20_cifar, ...

Three stages of n basic blocks with 16, 32 and 64 channels for 32 x 32 images, depth 6n + 2; shortcuts without weights
(option A: every second pixel, zero channels added).
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn


class ZeroPadShortcut(nn.Module):
    """Shortcut without weights: (N, C, H, W) -> (N, 2C, H/2, W/2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Take every second pixel and add zero channels."""
        extra = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))


class CifarResNet(ResNet):
    """ResNet of depth 6n + 2 for 32 x 32 images."""

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3, **kwargs: object) -> None:
        blocks = (depth - 2) // 6
        # A deep stem of width 8 is the way to make timm's stages start from 16 channels; the stem itself is replaced.
        super().__init__(
            BasicBlock, (blocks, blocks, blocks), num_classes=num_classes, in_chans=in_chans, stem_type="deep",
            stem_width=8, channels=(16, 32, 64), zero_init_last=False, **kwargs,
        )  # fmt: skip
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()
        self.feature_info = [
            {"num_chs": 16, "reduction": 1, "module": "act1"},
            {"num_chs": 16, "reduction": 1, "module": "layer1"},
            {"num_chs": 32, "reduction": 2, "module": "layer2"},
            {"num_chs": 64, "reduction": 4, "module": "layer3"},
        ]
        for module in self.modules():
            if isinstance(module, BasicBlock) and module.downsample is not None:
                module.downsample = ZeroPadShortcut()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


def _create(name: str, depth: int, pretrained: bool = False, **kwargs: object) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, name, pretrained, depth=depth, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        f"resnet{depth}_cifar.untrained": {
            "num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0,
            "interpolation": "bilinear", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
            "first_conv": "conv1", "classifier": "fc",
        }
        for depth in (8, 20, 32, 44, 56)
    }
)  # fmt: skip


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-8, 0.07 M weights: for trials on a CPU."""
    return _create("resnet8_cifar", 8, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-20, 0.27 M weights."""
    return _create("resnet20_cifar", 20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-32, 463,504 weights without the classifier: the net of every CIFAR long-tailed benchmark."""
    return _create("resnet32_cifar", 32, pretrained, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-44, 0.66 M weights."""
    return _create("resnet44_cifar", 44, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: object) -> CifarResNet:
    """ResNet-56, 0.86 M weights."""
    return _create("resnet56_cifar", 56, pretrained, **kwargs)
