"""Index files: which images are trained on.

rescom-timm make uoft-cs/cifar10 "exponential(100)" -o cifar10_lt_if100.txt
rescom-timm convert train2018.json -o inat18_train.txt
rescom-timm check Places_LT_train.txt --source /data/places365 [--decode]
rescom-timm describe Places_LT_train.txt --png places.png
rescom-timm overlap Places_LT_train.txt Places_LT_val.txt
rescom-timm init my_photos -o my_photos.yaml
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml

from rescom_timm.data import index as rows
from rescom_timm.data import profiles
from rescom_timm.data.decoding import BrokenImage, decode
from rescom_timm.data.image_folders import class_folders, holds_tables
from rescom_timm.data.index import Index
from rescom_timm.data.sources import Data, load, training_index, training_split
from rescom_timm.data.splits import DataConfig, Split
from rescom_timm.files import write_text
from rescom_timm.recipe.config import without_home


def make(options: argparse.Namespace) -> int:
    """Draw a long-tailed index from a data set, a list, or a file of labels (one a line)."""
    name, factor, seed = profiles.parse_rule(options.rule)
    info = {"source": options.source, "split": options.split, "rule": options.rule}
    if options.labels:
        whole = _label_file(options.labels, info)
    elif Path(options.source).is_file():
        whole = replace(Index.load(options.source), info={"source": Path(options.source).name, "rule": options.rule})
    else:
        config = _config(options, options.split)
        whole = replace(training_index(config), info=info)
    kept = profiles.RULES[name](whole.labels, whole.num_classes, factor, seed)
    return _save(whole.take(kept), options)


def convert(options: argparse.Namespace) -> int:
    """Bring an official list or an iNaturalist JSON into this package's format."""
    index = Index.load(options.file, options.classes, options.allow_empty)
    names = index.class_names
    if options.names:
        names = Path(options.names).read_text(encoding="utf-8").splitlines()
    info = {"rule": f"converted from {Path(options.file).name}", **index.info}
    return _save(replace(index, class_names=names, info=info), options)


def check(options: argparse.Namespace) -> int:
    """Say everything that is wrong with an index; with --source, also against the images or the data set."""
    if options.decode and not options.source:
        raise ValueError("--decode reads the images: say where they are with --source")
    index, problems = rows.read(options.file, options.classes, options.allow_empty)
    images = "its images not looked for"
    if index and options.source:
        images = "its images there, but not decoded"
        try:
            split = training_split(_config(options, options.split, options.file), allow_empty=options.allow_empty)
        except (ValueError, FileNotFoundError) as error:
            problems = [str(error)]
        else:
            if options.decode:
                images, problems = "all its images decoded", list(_broken(split))
    for problem in problems[: options.lines]:
        print(f"{options.file}: {problem}")
    if len(problems) > options.lines:
        print(f"{options.file}: and {len(problems) - options.lines:,} more problems")
    if index and not problems:
        told = f"{len(index):,} rows of {index.num_classes:,} classes, {images}, sha256 {index.sha256}"
        print(f"{options.file}: good, {told}")
    return int(bool(problems))


def _broken(split: Split) -> Iterator[str]:
    """What is wrong with each image that cannot be decoded."""

    def wrong(row: int, image: object) -> str:
        try:
            decode(image, row)
        except BrokenImage as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(split.rows), 1024):
            images = split.dataset[start : start + 1024]["image"]
            yield from filter(None, pool.map(wrong, split.rows[start : start + 1024].tolist(), images))


def describe(options: argparse.Namespace) -> int:
    """Counts, groups, imbalance, digest and long tail of an index, of a list, or of a JSON list of class counts."""
    if (counts := _counts_file(options.file)) is None:
        index = Index.load(options.file, options.classes, allow_empty=True)
        counts = index.counts
        for key, value in [*index.info.items(), ("keys", "paths" if index.by_path else "row numbers")]:
            print(f"{key}: {value}")
        print(f"sha256: {index.sha256}")
    print(rows.describe(counts))
    if options.png:
        _picture(counts, Path(options.file).stem, options.png)
        print(options.png)
    return 0


def overlap(options: argparse.Namespace) -> int:
    """Say which images stand in both of two indexes."""
    first, second = (Index.load(file, allow_empty=True) for file in (options.file, options.other))
    shared = rows.overlap(first, second)
    print(f"{len(shared):,} images stand in both {options.file} and {options.other}")
    print(*shared[: options.lines], sep="\n", end="\n" if shared else "")
    return int(bool(shared))


def init(options: argparse.Namespace) -> int:
    """Write a recipe for one's own images: a folder of class folders, or a local or Hub data set."""
    recipe = Path(options.output)
    lists = {part: recipe.with_name(f"{recipe.stem}_{part}.txt") for part in ("train", "test", "validation")}
    if taken := [str(path) for path in (recipe, *lists.values()) if path.exists()]:
        if not options.force:
            raise ValueError(f"{', '.join(taken)} would be overwritten: choose another -o, or say --force")
    if options.source != "digits" and Path(options.source).expanduser().exists():
        options.source = _place(options.source)
    indexes, config = _parts(options)
    with TemporaryDirectory() as folder:  # all is tried before anything is written where the user sees it
        for part, index in indexes.items():
            index.save(Path(folder) / lists[part].name)
        data = load(_with_lists(config, {part: f"{folder}/{lists[part].name}" for part in indexes}))
        config = _with_lists(config, {part: _place(lists[part]) for part in indexes})
        try:
            text = recipe_for(data, config, options.source)
        except BrokenImage as error:
            raise ValueError(f"{error}; repair or remove it") from None
    for part, index in indexes.items():
        index.save(lists[part])
        print(f"{lists[part]}: {len(index):,} rows of {index.num_classes:,} classes")
    write_text(recipe, text)
    print(rows.describe(data.counts))
    print(f"{recipe}: train with  rescom-timm train {shlex.quote(str(recipe))}")
    return 0


def _place(path: str | Path) -> str:
    """The path such that it is right from every working directory: absolute, or below the home folder as ~/..."""
    return without_home(os.path.abspath(os.path.expanduser(path)))


def _with_lists(config: DataConfig, lists: dict[str, str]) -> DataConfig:
    if "validation" in lists:
        config = replace(config, validation=f"index({lists['validation']})")
    return replace(config, index=lists.get("train", config.index), test_index=lists.get("test", config.test_index))


def _parts(options: argparse.Namespace) -> tuple[dict[str, Index], DataConfig]:
    """The index files to write and the data section that uses them."""
    root = Path(options.source).expanduser()
    folders = [root / name for name in ("test", "val", "validation") if (root / name).is_dir()]
    validation = options.validation or "holdout(0.1)"
    if root.is_dir() and not holds_tables(root):
        config = DataConfig(options.source, validation=validation)
        if (root / "train").is_dir() and folders:
            train = _under(root, root / "train")
            names = ["test", "validation"] if options.validation is None else ["test"]
            parts = {part: _as_in(train, _under(root, at), at) for part, at in zip(names, folders, strict=False)}
            return {"train": _cut(train, options.imbalance), **parts}, config
        train, test = _part_test(_under(root, root))
    else:
        config = replace(_config(options, options.split), test=options.test_split, validation=validation)
        whole = training_index(config)
        if options.test_split != options.split:
            return ({"train": _cut(whole, options.imbalance)} if options.imbalance else {}), config
        train, test = _part_test(whole)
    return {"train": _cut(train, options.imbalance), "test": test}, config


def _under(root: Path, folder: Path) -> Index:
    """The class folders of ``folder`` as paths under ``root``; files that are no images are named and left out."""
    index, others = class_folders(folder)
    if others:
        print(f"{len(others):,} files under {folder} are no images and left out: {', '.join(others[:3])}")
    lead = "" if folder == root else folder.name + "/"
    info = {"source": _place(root), "split": folder.name, "rule": "all images of the class folders"}
    return replace(index, keys=[lead + str(key) for key in index.keys], info=info)


def _as_in(train: Index, part: Index, folder: Path) -> Index:
    """The part with its classes numbered as those of training, of which it may lack some."""
    known, names = train.class_names or [], part.class_names or []
    if odd := [name for name in names if name not in known]:
        raise ValueError(f"{folder} has class folders that train lacks: {', '.join(odd[:5])}")
    labels = np.array([known.index(name) for name in names])[part.labels]
    return replace(part, labels=labels, num_classes=len(known), class_names=known)


def _part_test(whole: Index, fraction: float = 0.2) -> tuple[Index, Index]:
    """A fifth of each class for testing, drawn with a fixed seed; a class keeps at least one training image."""
    held = profiles.holdout(whole.labels, fraction)
    kept = np.delete(np.arange(len(whole)), held)
    return whole.take(kept, f"all but a test part of {fraction:g}"), whole.take(held, f"test part of {fraction:g}")


def _cut(index: Index, factor: float | None) -> Index:
    if factor is None:
        return index
    kept = profiles.exponential(index.labels, index.num_classes, factor, by_count=True)
    return index.take(kept, f"exponential({factor:g}) by count")


def settings(counts: np.ndarray) -> dict[str, tuple[float, str]]:
    """Q, Qp, Qn and beta for data with these class counts (K,), each with its reason. Ours: only some are published."""
    classes = len(counts)
    q = int(np.clip(round(1000 / classes), 4, 64))
    others = (classes - 1) * q
    qn = max(1, min(500, round(0.4 * others)))
    many = int((counts > 100).sum())
    return {
        "per_class": (q, f"Q: {classes * q:,} keys in all; the paper has 10 for 100 classes and 4 for 1,000"),
        "positives": (1, "Qp: the hardest positive alone, as in every published setting"),
        "negatives": (qn, f"Qn: {100 * qn / others:.0f}% of {others:,} keys of other classes; paper: 400 of 990"),
        "beta": (0.99, f"weights level off above about 100 images, which {many} of {classes} classes have")
        if many
        else (0.999999, "weights of in effect 1 / count: no class has more than 100 images"),
    }


def recipe_for(data: Data, config: DataConfig, source: str) -> str:
    """The text of a recipe for this data, with the reasons of its settings."""
    section = {key: value for key, value in asdict(config).items() if value != getattr(DataConfig, key, None)}
    chosen = settings(data.counts)
    sample = data.train.dataset.select(range(min(32, len(data.train.rows))))
    side = int(np.median([min(decode(row["image"]).size) for row in sample]))
    images = int(data.counts.sum())
    batch = 128 if images >= 1024 else min(32, 2 ** int(np.log2(images)))
    few, many = (len(rows.groups(data.counts)[name]) for name in ("few", "many"))
    line = {key: f"{key}: {value:g}  # {why}" for key, (value, why) in chosen.items()}
    if side <= 64:
        same = f"resize({side}) | center_crop({side})"
        net = "net: {backbone: resnet32_cifar, projector: {hidden: 64, dim: 32}}"
        views = f'views: {{train: "{same} | crop({side},4) | flip", eval: "{same}"}}'
        rate = "optimizer: {lr: 0.1, weight_decay: 5.0e-4}"
    else:
        net = "net: {backbone: resnet50.tv_in1k, pretrained: true}  # from ImageNet weights: own data are seldom enough"
        views = "views: {train: imagenet, eval: eval224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
        rate = "optimizer: {lr: 0.02, weight_decay: 5.0e-4}"
    return f"""\
# {source}: {data.counts.sum():,} training images of {len(data.counts):,} classes, {data.counts.max():,} to \
{data.counts.min():,} a class; {many} classes have more than 100, {few} fewer than 20.
# Made by rescom-timm init. Q, Qp, Qn and beta are chosen for these counts, for the reasons beside them; nothing
# here was tuned. Train:  rescom-timm train THIS_FILE
{yaml.safe_dump({"data": section}, sort_keys=False, width=120, allow_unicode=True)}\
{views}  # images are about {side} pixels on their shorter side
{net}
method:
  name: rescom
  queue:
    {line["per_class"]}
  {line["positives"]}
  {line["negatives"]}
  {line["beta"]}
{rate}
schedule: {{name: cosine, warmup_epochs: 5}}
train: {{epochs: 100, batch_size: {batch}}}
"""


def _config(options: argparse.Namespace, split: str, index: str = "all") -> DataConfig:
    return DataConfig(
        options.source, subset=options.subset, train=split, index=index, label_column=options.label_column
    )


def _label_file(path: str, info: dict[str, str]) -> Index:
    words = Path(path).read_text(encoding="utf-8").split()
    if bad := next((i for i, word in enumerate(words) if not word.isdecimal()), None):
        raise ValueError(f"{path}: label number {bad + 1}, {words[bad]!r}, is not a whole number from 0")
    labels = np.array(words, dtype=np.int64)
    return Index(np.arange(len(labels)), labels, int(labels.max()) + 1, info)


def _counts_file(path: str) -> np.ndarray | None:
    if Path(path).suffix != ".json":
        return None
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    is_counts = isinstance(content, list) and content and all(isinstance(n, int) and n >= 0 for n in content)
    return np.array(content, dtype=np.int64) if is_counts else None


def _save(index: Index, options: argparse.Namespace) -> int:
    index.save(options.output)
    print(f"{options.output}: {len(index):,} rows of {index.num_classes:,} classes, sha256 {index.sha256}")
    return 0


def _picture(counts: np.ndarray, title: str, path: str) -> None:
    from rescom_timm.figures import style

    ordered = np.sort(counts)[::-1].copy()  # torch takes no reversed view
    names = style.group_of(ordered)
    figure = style.new_figure(8, 4)
    axes = figure.subplots()
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=[style.GROUP_COLORS[name] for name in names])
    axes.set_yscale("log")
    style.group_legend(axes, names, loc="upper right")
    title = f"{style.plain(title, 60)}: {counts.sum():,} rows, imbalance {rows.imbalance(counts):.4g}"
    style.tidy(axes, title, "classes, largest first", "training images (log scale)", "y")
    figure.savefig(path, dpi=150)


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(function: object, *positional: tuple[str, str]) -> argparse.ArgumentParser:
        name = function.__name__  # type: ignore[attr-defined]
        one = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        one.set_defaults(run=function)
        for word, text in positional:
            one.add_argument(word, help=text)
        return one

    def data_options(one: argparse.ArgumentParser) -> None:
        one.add_argument("--split", default="train", help="of the data set (default: train)")
        one.add_argument("--subset", help="configuration of a Hub data set that has several")
        one.add_argument("--label-column", help="where several columns could be the label")

    def list_options(one: argparse.ArgumentParser) -> None:
        one.add_argument("--classes", type=int, help="number of classes (default: the header's, or largest label + 1)")
        one.add_argument("--allow-empty", action="store_true", help="let classes be without images, as in test lists")

    data = ("source", "digits, a Hub id, a folder of parquet or arrow files, or a list")
    file = ("file", "an index, an official list or an iNaturalist JSON")
    one = verb(make, data, ("rule", "exponential(IF), step(IF), or with a seed: exponential(100, seed=1)"))
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser)
    one.add_argument("--labels", metavar="FILE", help="read labels from here, one a line, instead of the data set")
    data_options(one)
    one = verb(convert, file)
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser)
    one.add_argument("--names", metavar="FILE", help="class names, one a line")
    list_options(one)
    one = verb(check, file)
    one.add_argument("--source", help="image root or data set to check against")
    one.add_argument("--decode", action="store_true", help="decode every image of --source")
    one.add_argument("--lines", type=int, default=20, help="most problems told (default: 20)")
    data_options(one)
    list_options(one)
    one = verb(describe, ("file", file[1] + ", or a JSON list of class counts"))
    one.add_argument("--png", metavar="FILE", help="draw the long tail")
    one.add_argument("--classes", type=int, help="number of classes (default: the header's, or largest label + 1)")
    one = verb(overlap, file, ("other", "another"))
    one.add_argument("--lines", type=int, default=10, help="most images named (default: 10)")
    one = verb(init, ("source", "a folder of class folders, or a local or Hub data set"))
    one.add_argument("-o", "--output", required=True, type=os.path.expanduser, metavar="RECIPE.yaml")
    one.add_argument("--imbalance", type=float, metavar="IF", help="cut the training images to this imbalance")
    one.add_argument("--validation", help="to choose the best checkpoint (the folder val where it is, or holdout(0.1))")
    one.add_argument("--test-split", default="test", help="a data set's; the name of --split parts a fifth of it off")
    one.add_argument("--force", action="store_true", help="write over files that exist")
    data_options(one)
    return top


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
