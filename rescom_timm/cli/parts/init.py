"""What `init` does: a recipe for one's own images and the index files of their splits."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from rescom_timm.cli.parts.index import broken_images, without
from rescom_timm.config.own_data import recipe_for
from rescom_timm.config.own_splits import OwnImages, parts, place, saved_lists, with_lists
from rescom_timm.data import index as rows
from rescom_timm.data.sources import load
from rescom_timm.errors import InputError
from rescom_timm.hub_client import hub_id, missing
from rescom_timm.io import write_text


def init(options: argparse.Namespace) -> int:
    """Write a recipe for class folders, a folder with a list, or a local or Hub data set, and its lists.

    Raises InputError (file.exists, image.unreadable, and as own_splits.parts does); nothing is written then.
    """
    recipe = Path(options.output)
    lists = {part: recipe.with_name(f"{recipe.stem}_{part}.txt") for part in ("train", "test", "validation")}
    existing = [str(path) for path in (recipe, *lists.values()) if path.exists()]
    if existing and not options.force:
        raise InputError("file.exists", f"{', '.join(existing)} would be overwritten: choose another -o, or --force")
    if options.source != "digits" and hub_id(options.source, alone=True) is None:
        if not Path(options.source).expanduser().exists():
            raise missing(options.source)
        options.source = place(options.source)
    own = {one.name: getattr(options, one.name) for one in fields(OwnImages)}
    indexes, config = parts(OwnImages(**own))
    with TemporaryDirectory() as folder:  # nothing is written to the output unless everything works
        data = load(saved_lists(indexes, config, folder, f"{recipe.stem}_"))
        splits = {"train": data.train, "test": data.test, "validation": data.validation}
        broken = {part: broken_images(split) for part, split in splits.items() if split is not None}
        if any(broken.values()):
            if not options.leave_out or not indexes:
                reasons = [reason for found in broken.values() for reason in found.values()]
                remedy = "repair or remove them" + (", or give --leave-out" if indexes else "")
                raise InputError(
                    "image.unreadable",
                    f"{len(reasons):,} images cannot be read; {remedy}:\n  " + "\n  ".join(reasons[:50]),
                )
            lost: dict[str, dict[int, str]] = {part: {} for part in indexes}
            for part, found in broken.items():  # validation rows may be some of the training list's
                numbers = {int(splits[part].rows[k]): reason for k, reason in found.items()}  # type: ignore[union-attr]
                lost[part if part in indexes else "train"] |= numbers
            indexes = {part: without(index, lost[part]) for part, index in indexes.items()}
            data = load(saved_lists(indexes, config, folder, f"{recipe.stem}_"))
        config = with_lists(config, {part: place(lists[part]) for part in indexes})
        text = recipe_for(data, config, options.source, options.tune)
    for part, index in indexes.items():
        index.save(lists[part])
        print(f"{lists[part]}: {len(index):,} rows of {index.num_classes:,} classes")
    write_text(recipe, text)
    print(rows.describe(data.counts))
    print(f"{recipe}: train with  rescom-timm train {shlex.quote(str(recipe))}")
    print(f"for the best model in 20 minutes, without a recipe:  rescom-timm fit {shlex.quote(options.source)}")
    return 0
