"""Fixtures of the tests of data."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def random_states() -> Iterator[None]:
    """The global generators are afterwards as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])
