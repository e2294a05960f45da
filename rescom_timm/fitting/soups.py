"""Nets of given weights, and averages of the weights of nets of one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rescom_timm.data.config import ViewsConfig
from rescom_timm.engine.build import build_net
from rescom_timm.models.net import Net, NetConfig


def loaded(config: NetConfig, views: ViewsConfig, classes: int, weights: Mapping[str, Tensor]) -> Net:
    """A net without a projector that has these weights. config: its classifier decides the head."""
    net = build_net(config.untrained(), views, classes)
    net.drop_projector()
    net.load_state_dict(weights)
    return net


def soup(nets: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Average the weights of nets (Wortsman et al. 2022, arXiv 2203.05482), each by its share.

    Of a start and an end it is WiSE-FT's mean (arXiv 2109.01903, eq. 1).

    shares: one of each net, at least 0, of sum 1. BatchNorm's statistics are averaged as the weights are; whole
    numbers, which are counters, are the last net's. Raises ValueError, naming a tensor, where nets differ in names or
    shapes.
    """
    if len(nets) != len(shares) or not nets or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be one of each of {len(nets)} nets, at least 0, of sum 1, not {list(shares)}")
    first = nets[0]
    for other in nets[1:]:
        odd = sorted(first.keys() ^ other.keys()) or [n for n in first if first[n].shape != other[n].shape]
        if odd:
            raise ValueError(f"nets of one shape are averaged, and these differ in {odd[0]}")
    averaged = {}
    for name, value in first.items():
        values = [net[name] for net in nets]
        if value.is_floating_point():
            mean = torch.stack([share * one.double() for share, one in zip(shares, values, strict=True)]).sum(dim=0)
            averaged[name] = mean.to(value)
        else:
            averaged[name] = values[-1].clone()
    return averaged
