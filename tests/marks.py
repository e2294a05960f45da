"""Marks for parameters."""

import pytest
from _pytest.mark import ParameterSet


def slow(*values: object) -> list[ParameterSet]:
    """Values of a parametrized test that run with  pytest -m slow  alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
