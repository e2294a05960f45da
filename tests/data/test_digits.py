"""The embedded data set."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rescom_timm.data import digits


def test_the_table_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_digits()
    expected = np.column_stack([loaded.data, loaded.target])
    np.testing.assert_array_equal(digits._table(), expected)
    monkeypatch.setattr(digits, "find_spec", lambda name: None)  # where the package keeps it elsewhere
    np.testing.assert_array_equal(digits._table(), expected)
