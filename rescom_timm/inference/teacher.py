"""Trained models that a recipe names.

Its teacher (a run's folder, an export or a Hub id), and the run on the Hub that it starts from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rescom_timm.config.recipe import Recipe, RecipeError
from rescom_timm.engine.build import First
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.errors import code_of
from rescom_timm.hub_client import hub_id
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.io import write_tensors
from rescom_timm.methods.distillation import Teacher


def read_teacher(recipe: Recipe) -> Teacher | None:
    """The trained net of method.teacher (of a run the best checkpoint, the last if none was selected), or None.

    Raises RecipeError, with the code of the error in reading it.
    """
    source = recipe.method.teacher
    if source is None:
        return None
    try:
        read = from_pretrained(source)
    except (OSError, ValueError, CheckpointError) as error:
        raise RecipeError(code_of(error), f"method.teacher: {error}") from error
    return Teacher(read.net, read.class_names)


@contextmanager
def first_weights(recipe: Recipe) -> Iterator[First | None]:
    """A temporary file of the weights that `from` names on the Hub; None if it names a path or nothing.

    Raises RecipeError, with the code of the error in reading them.
    """
    source = recipe.init_from
    try:
        read = from_pretrained(source) if source is not None and hub_id(source, plain=False) else None
    except (OSError, ValueError, CheckpointError) as error:
        raise RecipeError(code_of(error), f"from: {error}") from error
    if read is None:
        yield None
        return
    with TemporaryDirectory() as folder:
        write_tensors(path := Path(folder) / "net.safetensors", read.net.state_dict())
        yield path, read.class_names or None
