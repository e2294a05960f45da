"""Get the data of a shipped recipe.

    rescom-timm get NAME [--to DIR] [--from ARCHIVE] [--dry-run] [--yes]

NAME: inat18, places_lt, imagenet_lt, cifar10_lt or cifar100_lt. Images, annotations and official lists go where the
recipes expect them: ./data and ./lists, below DIR or RESCOM_DATA. Downloads resume and are verified; existing files are
kept. Data sets of the Hub go to the cache of Hugging Face.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rescom_timm.cli import answer, new_parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Download, verify and unpack; returns the exit code."""
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm get places_lt --dry-run",
        "rescom-timm get inat18 --to /data --yes",
        "rescom-timm get inat18 --from ~/train_val2018.tar.gz",
    )
    parser.add_argument("name", metavar="NAME", help="inat18, places_lt, imagenet_lt, cifar10_lt or cifar100_lt")
    default = os.environ.get("RESCOM_DATA") or "."
    parser.add_argument("--to", default=default, metavar="DIR", help="folder of data/ and lists/ (RESCOM_DATA, else .)")
    parser.add_argument(
        "--from", dest="archives", action="append", default=[], metavar="FILE", help="a file that you have; repeated"
    )
    parser.add_argument("--no-check", dest="check", action="store_false", help="accept files with other checksums")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, free space and terms, and stop")
    parser.add_argument("-y", "--yes", action="store_true", help="accept the terms and the size without a question")
    options = parser.parse_args(argv)

    def work() -> int:
        from datasets.config import HF_DATASETS_CACHE

        from rescom_timm.data.benchmarks import BENCHMARKS, human
        from rescom_timm.data.download import check_space, free_space, get, plan
        from rescom_timm.errors import InputError

        steps = plan(options.name, options.to, options.archives)
        benchmark = BENCHMARKS[options.name]
        for step in steps:
            source = "there" if step.source is None else f"about {human(step.size)} from {step.source}"
            print(f"{step.folder / step.file.makes}: {source}")
        if steps:
            needed, free = human(sum(step.needs for step in steps)), human(free_space(options.to))
            print(f"needed in {options.to}: about {needed}, archives and unpacked files; {free} free")
        if benchmark.hub:
            size, free = human(2 * benchmark.hub_size), human(free_space(HF_DATASETS_CACHE))
            print(f"{benchmark.hub}: about {human(benchmark.hub_size)} from the Hub, unless the cache holds it")
            print(f"needed in {HF_DATASETS_CACHE}: about {size}, files and a copy to read; {free} free")
        print(f"terms: {benchmark.terms}")
        if options.dry_run:
            return 0
        check_space(steps, options.to)
        missing = benchmark.hub or any(step.source is not None for step in steps)
        if missing and not options.yes:
            if not sys.stdin.isatty():
                raise InputError("get.terms", "nothing was downloaded: accept the terms and the size with --yes")
            if input("Accept the terms and start? [y/N] ").strip().lower() not in ("y", "yes"):
                raise InputError("get.terms", "nothing was downloaded: the terms were not accepted")
        get(options.name, options.to, options.archives, options.check)
        if os.path.abspath(options.to) != os.getcwd() and options.to != os.environ.get("RESCOM_DATA"):
            print(f"recipes find it with  export RESCOM_DATA={os.path.abspath(options.to)}")
        return 0

    return answer(work, folders=[] if options.dry_run else [options.to])
