"""What `init` does: a recipe for one's own images and the index files of their splits."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from rescom_timm.cli.parts.index import broken_images, without
from rescom_timm.config.own_data import recipe_for
from rescom_timm.config.own_splits import OwnImages, parts, place, with_lists
from rescom_timm.data import index as rows
from rescom_timm.data.sources import Data, load
from rescom_timm.hub_client import hub_id, missing
from rescom_timm.io import write_text


def init(options: argparse.Namespace) -> int:
    """Write a recipe for one's own images: class folders, a folder with a list, or a local or Hub data set."""
    recipe = Path(options.output)
    lists = {part: recipe.with_name(f"{recipe.stem}_{part}.txt") for part in ("train", "test", "validation")}
    if taken := [str(path) for path in (recipe, *lists.values()) if path.exists()]:
        if not options.force:
            raise ValueError(f"{', '.join(taken)} would be overwritten: choose another -o, or say --force")
    if options.source != "digits" and hub_id(options.source, alone=True) is None:
        if not Path(options.source).expanduser().exists():
            raise missing(options.source)
        options.source = place(options.source)
    own = {one.name: getattr(options, one.name) for one in fields(OwnImages)}
    indexes, config = parts(OwnImages(**own))
    with TemporaryDirectory() as folder:  # all is tried before anything is written where the user sees it

        def tried() -> Data:
            for part, index in indexes.items():
                index.save(Path(folder) / lists[part].name)
            return load(with_lists(config, {part: f"{folder}/{lists[part].name}" for part in indexes}))

        data = tried()
        splits = {"train": data.train, "test": data.test, "validation": data.validation}
        broken = {part: broken_images(split) for part, split in splits.items() if split is not None}
        if any(broken.values()):
            told = [problem for found in broken.values() for problem in found.values()]
            if not options.leave_out or not indexes:
                how = "repair or remove them" + (", or say --leave-out" if indexes else "")
                raise ValueError(f"{len(told):,} images cannot be read; {how}:\n  " + "\n  ".join(told[:50]))
            lost: dict[str, dict[int, str]] = {part: {} for part in indexes}
            for part, found in broken.items():  # validation rows may be some of the training list's
                numbers = {int(splits[part].rows[k]): problem for k, problem in found.items()}  # type: ignore[union-attr]
                lost[part if part in indexes else "train"] |= numbers
            indexes = {part: without(index, lost[part]) for part, index in indexes.items()}
            data = tried()
        config = with_lists(config, {part: place(lists[part]) for part in indexes})
        text = recipe_for(data, config, options.source, options.tune)
    for part, index in indexes.items():
        index.save(lists[part])
        print(f"{lists[part]}: {len(index):,} rows of {index.num_classes:,} classes")
    write_text(recipe, text)
    print(rows.describe(data.counts))
    print(f"{recipe}: train with  rescom-timm train {shlex.quote(str(recipe))}")
    return 0
