"""What a recipe names of other trainings: its teacher (a run's folder, an export or a Hub id), and on the Hub the run
that it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.engine.build import First
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.hub_client import hub_id
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.io import write_tensors
from rescom_timm.methods.distillation import Teacher


def read_teacher(recipe: Recipe) -> Teacher | None:
    """The trained net that method.teacher names (of a run its best checkpoint, the last where none was selected); None
    where the recipe names none. Raises RecipeError where it cannot be read."""
    source = recipe.method.teacher
    if source is None:
        return None
    try:
        read = from_pretrained(source)
    except (OSError, ValueError, CheckpointError) as error:
        raise RecipeError(f"method.teacher: {error}") from error
    return Teacher(read.net, read.class_names)


@contextmanager
def first_weights(recipe: Recipe) -> Iterator[First | None]:
    """The pushed weights that `from` names on the Hub, in a file while the block runs; None where it names a path or
    nothing. Raises RecipeError where they cannot be read."""
    source = recipe.init_from
    try:
        read = from_pretrained(source) if source is not None and hub_id(source, plain=False) else None
    except (OSError, ValueError, CheckpointError) as error:
        raise RecipeError(f"from: {error}") from error
    if read is None:
        yield None
        return
    with TemporaryDirectory() as folder:
        write_tensors(path := Path(folder) / "net.safetensors", read.net.state_dict())
        yield path, read.class_names or None
