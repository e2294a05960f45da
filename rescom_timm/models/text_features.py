"""Class features from class names, by the text tower of CLIP or SigLIP (transformers, an extra).

K classes, F features of the image tower, which timm has under another name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rescom_timm.errors import InputError, MissingPackageError
from rescom_timm.hub_client import hub_id, online
from rescom_timm.io import write_tensors

PROMPT = "a photo of a {}."
"""LIFT's (Shi et al. 2024)."""
TEXTS_AT_ONCE = 256


@torch.inference_mode()
def text_features(class_names: Sequence[str], model: str, prompts: Sequence[str] = (PROMPT,)) -> Tensor:
    """Class features (K, F), unit vectors in the space of the image tower's features.

    The text features t of all prompts are averaged, normalised, and mapped through CLIP's image projection P, as x P .
    t = x . (t P^T) (LIFT's start of a CLIP classifier). Underscores in names are read as spaces. model: a Hub id or a
    folder of a CLIP or SigLIP of transformers. Raises MissingPackageError without transformers, InputError for a prompt
    without {} or a model that cannot be read or has no text tower.
    """
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise InputError("net.text", f"a prompt needs one {{}} for the class, as in {PROMPT!r}: {prompt!r}")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingPackageError(
            "system.package", "class features need transformers: pip install 'rescom-timm[text]'"
        ) from error
    try:
        name, _, revision = (hub_id(model) or model).partition("@")
        where = {"revision": revision} if revision else {}
        with online() if hub_id(model, alone=True) else nullcontext():
            net: Any = AutoModel.from_pretrained(name, trust_remote_code=False, **where).eval()
            tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError("net.text", f"cannot read {model} as a model of transformers: {reason}") from error
    if not hasattr(net, "get_text_features"):
        raise InputError("net.text", f"{model} ({type(net).__name__}) has no text tower: use a CLIP or SigLIP")
    length = net.config.text_config.max_position_embeddings
    sums: Any = 0.0
    for prompt in prompts:
        texts = [prompt.replace("{}", name.replace("_", " ")) for name in class_names]
        parts = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = tokenizer(
                texts[start : start + TEXTS_AT_ONCE],
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            found = net.get_text_features(**tokens)
            parts.append(found if isinstance(found, Tensor) else found.pooler_output)
        sums = sums + F.normalize(torch.cat(parts).float(), dim=1)
    features = F.normalize(sums, dim=1)
    if (projection := getattr(net, "visual_projection", None)) is not None:
        features = features @ projection.weight.float()
    return F.normalize(features, dim=1)


def save_class_features(
    path: str | Path, features: Tensor, class_names: Sequence[str], model: str, prompts: Sequence[str]
) -> None:
    """Write a file for net.classifier.file."""
    about = {"class_names": json.dumps(list(class_names)), "model": model, "prompts": json.dumps(list(prompts))}
    write_tensors(Path(path), {"class_features": features.contiguous()}, about)
