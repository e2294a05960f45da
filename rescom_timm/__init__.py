"""Long-tailed image recognition with ResCom on any timm backbone.

The floors; every import points down, and tests/test_architecture.py holds it so:

    commands/   roof       one verb a file: rescom-timm VERB, python -m rescom_timm, tools/*.py (with __main__)
    benchmarks/ roof       the parts of the verb benchmark: speed and memory, side by side
    run         attic      runs from Python: train(...) -> Run
    figures/    attic      pictures and reports of runs: measure -> arrays, draw -> picture
    sharing/    third      export, model card, the Hub, predictions
    training/   second     the loop, and what surrounds it: build, launch, state, evaluation
    recipe/     first      one YAML file, composed of the configs that stand beside what they configure
    methods/    first      ResCom, what it is compared with, and second stages: net + queue + loss
    contrast/   ground     pairs, queues and losses of the paper; torch alone
    nets/       ground     any timm backbone with classifier and projector; torch and timm
    data/       ground     index files, sources, views, loaders
    metrics     ground     top-1 by group, calibration, corruption errors
    files       ground     files written whole and read within bounds
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rescom_timm.nets.net import Net, ProjectorConfig, create_model  # registers the CIFAR ResNets in timm

if TYPE_CHECKING:
    from rescom_timm.run import Run, train
    from rescom_timm.sharing.predict import predict
    from rescom_timm.sharing.pretrained import from_pretrained

__all__ = ["Net", "ProjectorConfig", "Run", "create_model", "from_pretrained", "predict", "train"]

LATER = {
    "Run": "rescom_timm.run",
    "train": "rescom_timm.run",
    "predict": "rescom_timm.sharing.predict",
    "from_pretrained": "rescom_timm.sharing.pretrained",
}
"""Names of the floors above, which take seconds to import: only when asked for."""


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LATER})
