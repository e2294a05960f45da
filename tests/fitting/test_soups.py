"""Averages of weights."""

import pytest
import torch

from rescom_timm.fitting.soups import soup


def test_a_soup_is_the_weighted_mean():
    nets = [{"w": torch.tensor([float(i), 2.0]), "n": torch.tensor(i)} for i in range(3)]
    found = soup(nets, [0.5, 0.25, 0.25])
    assert found["w"].tolist() == [0.75, 2.0] and found["w"].dtype == torch.float32 and found["n"].item() == 2
    assert soup(nets[:1], [1.0])["w"].equal(nets[0]["w"])


@pytest.mark.parametrize("shares", [[0.5], [0.5, 0.6], [-0.5, 1.5]])
def test_shares_are_of_sum_one(shares):
    with pytest.raises(ValueError, match="shares"):
        soup([{"w": torch.ones(1)}] * 2, shares)


def test_nets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="classifier"):
        soup([{"classifier": torch.ones(2)}, {"classifier": torch.ones(3)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="other"):
        soup([{"w": torch.ones(2)}, {"w": torch.ones(2), "other": torch.ones(1)}], [0.5, 0.5])
