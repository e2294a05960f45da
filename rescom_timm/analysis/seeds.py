"""Which runs are seeds of one recipe."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.config.loading import load
from rescom_timm.config.recipe import RecipeError

SAME = ("seed", "name", "output", "hub", "speed", "checkpoint")
"""Keys in which runs of one setting may differ."""


def setting_of(run: RunFolder) -> tuple[str, str] | None:
    """Return (setting, seed) of a run; None where it has no recipe.

    The setting is equal for runs whose recipes differ in nothing but the seed, where they are written and their speed.
    """
    recipe: dict[str, Any] = run.recipe()
    with suppress(RecipeError):  # with every key that later versions have added; as it was saved where it is not ours
        recipe = load(run.path / "recipe.yaml").to_dict()
    if not recipe:
        return None
    kept = {key: value for key, value in recipe.items() if key not in SAME}
    return json.dumps(kept, sort_keys=True, default=str), str(recipe.get("seed", 0))
