"""Export of a trained net as a plain timm model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.models import save_for_hf

from rescom_timm.nets.net import Net


def export(net: Net, folder: Path, class_names: Sequence[str], input_size: tuple[int, int, int]) -> None:
    """Write a folder from which `timm.create_model("local-dir:" + folder, pretrained=True)` makes the classifier.

    input_size: (3, H, W) of the images evaluated. Raises ValueError where timm cannot take the net (Net.to_timm).
    """
    mean, std = (tuple(buffer.flatten().tolist()) for buffer in (net.mean, net.std))
    save_for_hf(
        net.to_timm(),
        str(folder),
        safe_serialization=True,
        model_config={"label_names": list(class_names)},
        data_config={"input_size": input_size, "mean": mean, "std": std},
    )
