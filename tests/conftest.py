"""Shared fixtures. Tests over real data look for it in the folder that RESCOM_TEST_DATA names, by default `shared`
beside the clone, and skip, with the reason, where it is absent."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and what they start, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("RESCOM_TEST_DATA") or ROOT.parent / "shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))


def _folder(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"real data absent: no folder {path} (RESCOM_TEST_DATA names the folder of test data)")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    return _folder("")


@pytest.fixture(scope="session")
def shared_cifar10() -> Path:
    return _folder("cifar10")


@pytest.fixture(scope="session")
def shared_lists() -> Path:
    return _folder("lists")


@pytest.fixture
def alone(monkeypatch):
    """Accelerate's state as in a fresh process on the CPU, and again afterwards."""
    from accelerate.state import AcceleratorState, GradientState  # hub_cases.py must come before huggingface_hub

    from rescom_timm.engine import launch

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for name in launch.STARTED:
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield monkeypatch
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
