"""The teacher that a recipe names: a run's folder, an export or a Hub id."""

from __future__ import annotations

from rescom_timm.methods.distillation import Teacher
from rescom_timm.recipe.config import Recipe, RecipeError
from rescom_timm.sharing.pretrained import from_pretrained
from rescom_timm.training.errors import CheckpointError


def read_teacher(recipe: Recipe) -> Teacher | None:
    """The trained net that method.teacher names (of a run its best checkpoint, the last where none was selected); None
    where the recipe names none. Raises RecipeError where it cannot be read."""
    source = getattr(recipe.method, "teacher", None)
    if source is None:
        return None
    try:
        read = from_pretrained(source)
    except (OSError, ValueError, CheckpointError) as error:
        raise RecipeError(f"method.teacher: {error}") from error
    return Teacher(read.net, read.class_names)
