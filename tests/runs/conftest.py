"""Fixtures of the tests of runs."""

import pytest
from accelerate.state import AcceleratorState, GradientState

from rescom_timm.runs import launch


@pytest.fixture
def alone(monkeypatch):
    """Accelerate's state as in a fresh process on the CPU, and again afterwards."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for name in launch.STARTED:
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield monkeypatch
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
