"""Long-tailed image recognition with ResCom on any timm backbone.

The packages. A package imports only from those below it; tests/test_architecture.py checks this:

    cli/            one subcommand a file: rescom-timm SUBCOMMAND, python -m rescom_timm (with __main__)
    api             from Python: train(...) -> Run, fit(...) -> Run
    fitting/        the best model in a time budget: features, heads, training, soups, choice
    analysis/       plots and reports of runs: measure -> arrays, draw -> figure
    hub/            push, model card, Spaces
    inference/      predict, conformal sets, nearest images, reading and writing exports (timm, transformers, ONNX)
    hub_download    bounded downloads from the Hub, runs on the Hub
    engine/         trainer, step, state, checkpoint, run folder, evaluation, logging, launch
    config/         the recipe: one dataclass a section, loading, overrides
    methods/        ResCom, baselines and second stages: net + queue + losses
    models/         any timm backbone with classifier and projector, CIFAR ResNets, fine-tuning; torch and timm
    data/           sources, index files, long-tailed draws, transforms, samplers, loaders, doctor
    contrastive/    pairs, queue and hard pair mining; torch only
    losses/         pure functions in the papers' symbols; torch only
    distributed     number of processes, gathering tensors
    paired          McNemar's test and the bootstrap of classifiers on the same images
    metrics         accuracy by group, calibration, intervals
    class_names     comparing the class names of two data sets, runs or checkpoints
    text/           escaping untrusted text for terminal, HTML and Markdown; page templates
    hub_client      Hub ids and timeouts
    io              atomic writes and bounded reads of files
    errors          error classes and their codes
    commands/, contrast/    names of 0.2.0, for one release
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rescom_timm import models as models  # registers the CIFAR ResNets with timm, now or when timm is imported

if TYPE_CHECKING:
    from rescom_timm.api import Run, fit, train
    from rescom_timm.inference.predict import predict
    from rescom_timm.inference.pretrained import from_pretrained
    from rescom_timm.models.net import Net, ProjectorConfig, create_model

    __version__: str

__all__ = ["Net", "ProjectorConfig", "Run", "create_model", "fit", "from_pretrained", "predict", "train"]

LATER = {
    "Net": "rescom_timm.models.net",
    "ProjectorConfig": "rescom_timm.models.net",
    "create_model": "rescom_timm.models.net",
    "Run": "rescom_timm.api",
    "fit": "rescom_timm.api",
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
