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
    class_names ground     class names of two things, compared
    files       ground     files written whole and read within bounds
    text/       ground     text of others made harmless: on a terminal, in HTML and Markdown (templates)
    hub         ground     which names are ids of the Hub, and how long it is waited for
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


class _RegisterWithTimm(MetaPathFinder):
    """Whoever imports rescom_timm and timm, in whatever order, finds the CIFAR ResNets in timm's registry; and a
    command that needs neither torch nor timm does not wait for them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module("rescom_timm.models.cifar_resnet")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    import_module("rescom_timm.models.cifar_resnet")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
