"""Long-tailed image recognition with ResCom on any timm backbone.

The packages; every import points down this list, and tests/test_architecture.py checks it:

    cli/            one subcommand a file: rescom-timm SUBCOMMAND, python -m rescom_timm (with __main__)
    api             from Python: train(...) -> Run
    analysis/       plots and reports of runs: measure -> arrays, draw -> picture
    hub/            push, model card, Spaces
    inference/      predict, conformal sets, neighbours, reading and writing exports (timm, transformers, ONNX)
    hub_download    downloads from the Hub within bounds, runs on the Hub
    engine/         trainer, step, state, checkpoint, run folder, evaluation, logging, launch
    config/         the recipe, composed of the configs that stand beside what they configure; loading
    methods/        ResCom, what it is compared with, second stages: net + queue + losses
    models/         any timm backbone with classifier and projector, CIFAR ResNets, tuning; torch and timm
    data/           sources, index files, long-tailed draws, transforms, samplers, loaders, doctor
    contrastive/    pairs, queue and mined pairs of the paper; torch alone
    losses/         pure functions in the papers' symbols; torch alone
    distributed     number of processes, gathered tensors
    metrics         accuracy by group, calibration, corruption errors
    class_names     class names of two things, compared
    text/           text of others made harmless: on a terminal, in HTML and Markdown (templates)
    hub_client      which names are ids of the Hub, how long it is waited for
    io              files written atomically and read within bounds
    commands/, contrast/    names of 0.2.0, for one release
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rescom_timm import models as models  # registers the CIFAR ResNets with timm, now or when timm is imported

if TYPE_CHECKING:
    from rescom_timm.api import Run, train
    from rescom_timm.inference.predict import predict
    from rescom_timm.inference.pretrained import from_pretrained
    from rescom_timm.models.net import Net, ProjectorConfig, create_model

    __version__: str

__all__ = ["Net", "ProjectorConfig", "Run", "create_model", "from_pretrained", "predict", "train"]

LATER = {
    "Net": "rescom_timm.models.net",
    "ProjectorConfig": "rescom_timm.models.net",
    "create_model": "rescom_timm.models.net",
    "Run": "rescom_timm.api",
    "train": "rescom_timm.api",
    "predict": "rescom_timm.inference.predict",
    "from_pretrained": "rescom_timm.inference.pretrained",
}
"""Names that take seconds to import: only when asked for."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("rescom-timm")
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LATER, "__version__"})
