"""Export to torch.export (.pt2), and the metadata of every exported program."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rescom_timm.errors import InputError
from rescom_timm.inference.export import DETAILS, timm_view
from rescom_timm.inference.pretrained import Pretrained, from_pretrained
from rescom_timm.io import atomic_path, errors_named
from rescom_timm.models.net import Net

BATCH = 3
"""Images of the example: torch.export would treat a batch of one as a constant."""


class Classifier(nn.Module):
    """Normalised images (N, 3, H, W) float32 to logits (N, K): a copy on the CPU for export."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        net = copy.deepcopy(net).cpu().float().eval()
        self.encoder, self.classifier = net.encoder, net.classifier
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, 3, H, W)."""
        return self.classifier(self.encoder(images))


def example(model: Pretrained) -> Tensor:
    """Random images (3, 3, H, W) of a fixed seed."""
    return torch.randn(BATCH, *model.input_size, generator=torch.Generator().manual_seed(0))


def about(model: Pretrained) -> dict[str, object]:
    """Metadata of an exported program, as plain JSON.

    Class names in the order of the logits, how image files are read, and the evaluation policy, also as timm's config.
    """
    return {
        "class_names": model.class_names,
        "input_size": list(model.input_size),
        "mean": model.net.mean.flatten().tolist(),
        "std": model.net.std.flatten().tolist(),
        **timm_view(model.eval_policy, model.input_size[-1]),
        "eval_policy": model.eval_policy,
        "reading": model.reading.record(),
    }


def check_logits(net: nn.Module, images: Tensor, run: Callable[[Tensor], Tensor], what: str) -> None:
    """Raises InputError (model.export) if ``run`` gives other logits than the net, for all images or for one."""
    for batch in (images, images[:1]):
        with torch.no_grad():
            own = net(batch)
        if not torch.allclose(run(batch), own, rtol=1e-3, atol=1e-4):
            raise InputError("model.export", f"the {what} gives other logits than the net; not exported")


def export_program(source: Pretrained | str | Path, path: str | Path) -> Path:
    """Write a classifier as a program of torch.export, which torch.export.load reads without rescom_timm.

    `images` float32 (N, 3, H, W), already normalised, to logits (N, K), any N.

    The extra file rescom.json holds `about`. The program is read back and its logits are compared. Raises InputError
    (model.export) if the net cannot be exported or the logits differ; an earlier file stays then.
    """
    path = Path(path)
    model = source if isinstance(source, Pretrained) else from_pretrained(source)
    net, images = Classifier(model.net), example(model)
    try:
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(net, (images,), dynamic_shapes={"images": {0: batch}})
    except Exception as error:  # torch's classes for this are not public
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError("model.export", f"this net cannot be exported by torch.export: {first}") from error
    with errors_named(path), atomic_path(path) as new:
        with new.open("wb") as file:
            torch.export.save(program, file, extra_files={DETAILS: json.dumps(about(model))})
        with new.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # from torch 2.11 itself
            check_logits(net, images, torch.export.load(file).module(), "exported program")
    return path
