"""Mixed batches against naive loops, and what their draws are a function of."""

import numpy as np
import pytest
import torch

from rescom_timm.data.config import MixConfig
from rescom_timm.data.mixing import box, mix
from tests.raises import raises


def batch(size=6, views=2, height=5, width=7):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, views, 3, height, width), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.arange(size), "row": torch.arange(size) + 100}


def halved(images):
    """In the place of the net's normalisation."""
    return images.double() / 255 - 0.5


def mixed(config, seed=0):
    return mix(batch(), config, np.random.default_rng(seed), halved)


def test_mixup_is_the_sum_over_pairs_with_one_share_for_both_views():
    for seed in range(5):
        made = mixed(MixConfig(mixup=1.0), seed)
        own, share = halved(batch()["image"]), made["share"].item()
        partners = made["partner"].tolist()  # labels are positions here
        assert sorted(partners) == list(range(6)) and 0 < share < 1
        for i, j in enumerate(partners):
            for view in range(2):
                expected = share * own[i, view] + (1 - share) * own[j, view]
                torch.testing.assert_close(made["image"][i, view], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(made["label"], batch()["label"]) and torch.equal(made["row"], batch()["row"])


def test_cutmix_pastes_one_box_and_its_share_is_the_area():
    seen = set()
    for seed in range(20):
        made = mixed(MixConfig(cutmix=1.0), seed)
        own, partners = halved(batch()["image"]), made["partner"].tolist()
        moved = torch.tensor([[(made["image"][i] != own[i]).flatten(0, 1).any(dim=0).tolist()] for i in range(6)])
        box_of_all = moved.flatten(0, 1).any(dim=0)
        for i, j in enumerate(partners):
            expected = torch.where(box_of_all, own[j], own[i])
            assert torch.equal(made["image"][i], expected)
        rows, columns = box_of_all.any(dim=1).sum(), box_of_all.any(dim=0).sum()
        if any(i != j for i, j in enumerate(partners)):
            assert box_of_all.sum() == rows * columns, "one rectangle"
            assert made["share"].item() == pytest.approx(1 - box_of_all.double().mean().item())
            seen.add(int(box_of_all.sum()))
    assert len(seen) > 5


def test_a_box_has_its_share_where_it_is_not_cut_off():
    draws = np.random.default_rng(0)
    sizes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in (
        box(40, 60, 0.75, draws) for _ in range(200)
    )]  # fmt: skip
    assert max(sizes) == (20, 30) and all(h <= 20 and w <= 30 for h, w in sizes)
    rows, columns = box(40, 60, 1.0, draws)
    assert rows.start == rows.stop and columns.start == columns.stop, "nothing of the partner"


def test_the_share_is_drawn_from_beta():
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1))."""
    for alpha in (0.2, 1.0):
        shares = np.array([mixed(MixConfig(mixup=alpha), seed)["share"].item() for seed in range(800)])
        assert shares.mean() == pytest.approx(0.5, abs=0.05)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.02)


def test_probabilities_say_how_often_and_by_which():
    kinds, draws = [], np.random.default_rng(1)
    config = MixConfig(mixup=1.0, cutmix=1.0, probability=0.5, switch_probability=0.25)
    for _ in range(300):
        made = mix(batch(), config, draws, halved)
        if "share" not in made:
            assert made["image"].dtype == torch.uint8
            kinds.append("none")
            continue
        kept = (made["image"] == halved(batch()["image"]))[made["partner"] != made["label"]]
        kinds.append("cutmix" if kept.double().mean() > 0.1 or made["share"] < 0.05 else "mixup")
    counts = {kind: kinds.count(kind) / 300 for kind in ("none", "cutmix", "mixup")}
    assert counts == pytest.approx({"none": 0.5, "cutmix": 0.125, "mixup": 0.375}, abs=0.08)


def test_equal_draws_give_equal_batches_and_nothing_global_is_drawn():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one, same, other = (mixed(MixConfig(mixup=0.2, cutmix=1.0), seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["image"], other["image"])
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize(
    "settings", [{"mixup": -0.1}, {"cutmix": -1.0}, {"probability": 1.5}, {"switch_probability": -0.5}]
)
def test_values_out_of_range_are_refused(settings):
    with raises("recipe.value", *settings):
        MixConfig(**settings)
