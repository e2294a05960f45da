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

from typing import TYPE_CHECKING, Any

from rescom_timm.nets.net import Net, ProjectorConfig, create_model  # registers the CIFAR ResNets in timm

if TYPE_CHECKING:
    from rescom_timm.sharing.predict import predict
    from rescom_timm.sharing.pretrained import from_pretrained

__all__ = ["Net", "ProjectorConfig", "create_model", "from_pretrained", "predict"]


def __getattr__(name: str) -> Any:
    # These need the floors above, which take seconds to import: only when asked for.
    if name == "from_pretrained":
        from rescom_timm.sharing.pretrained import from_pretrained

        return from_pretrained
    if name == "predict":
        from rescom_timm.sharing.predict import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
