"""Any timm backbone with a classifier and a projector, CIFAR ResNets, parameter-efficient tuning. Torch and timm only.

Importing this package registers the CIFAR ResNets with timm without importing timm, which takes seconds: they are
registered when timm is imported. Not here: losses (losses, contrastive) and training methods (methods).
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


class _CifarResNets(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "timm":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        if (spec := next(filter(None, specs), None)) is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                import_module("rescom_timm.models.cifar_resnet")

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    import_module("rescom_timm.models.cifar_resnet")
else:
    sys.meta_path.insert(0, _CifarResNets())
