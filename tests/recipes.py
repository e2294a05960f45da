"""Shipped recipes as tests name them."""

from collections.abc import Sequence

from rescom_timm.config.loading import load
from rescom_timm.config.recipe import Recipe

UNDRAWN = "track.log_with=[]"
"""Without TensorBoard, whose pictures take longer to draw than a run of a test to train."""


def load_recipe(name: str, words: Sequence[str] = ()) -> Recipe:
    """The recipe "digits_lt", or one with presets over it, "digits_lt +ldam", changed by key=value words."""
    recipe, *presets = name.split()
    return load(recipe, [*presets, *words])
