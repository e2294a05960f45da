r"""Every combination of some keys, with several seeds, as a table and a plot.

    rescom-timm sweep RECIPE [RECIPE ...] [+PRESET,+PRESET ...] [key=a,b,c ...] [--seeds 0,1,2]
    rescom-timm sweep RECIPE [+PRESET ...] --search N key=low:high key=low:high:log key=a,b,c ...

+a +b puts both presets over each recipe, +a,+b tries each. Each cell is a normal run in FOLDER (--output; by default
runs/<recipe>_sweep), named by its recipe, presets and settings, such as digits_lt_ldam-margin=0.3-seed=1. The same
command again resumes: finished cells are skipped. Several commands with one FOLDER fill one table. --share 1/2 and
--share 2/2 split the cells between two machines or GPUs; under `accelerate launch` all processes train each cell
together. {seed} in a value becomes the cell's seed. --table writes the table of the finished cells and trains nothing.
--lean keeps metrics and exported model of a finished cell, but not its checkpoints. On a machine with a time limit,
`timeout --signal TERM 9m` saves within the epoch, and the same command resumes there.

--search N trains N trials instead of every cell: Optuna's TPE sampler proposes values of ranges and choices, and ends
trials that fall below the median of the earlier ones at an evaluation. It maximises the validation metric --by. A key
that takes whole numbers is searched in whole numbers. The same command again, at the same time or later and on any
machine that sees FOLDER, is one more worker of the same search; a trial whose worker was killed goes on.

Writes FOLDER/sweep.md, sweep.csv, sweep.png and sweep.svg: mean and sample standard deviation over the seeds of the
metrics at the last epoch, in percent, with the mean 95% interval of a run over images and classes, and of the minutes
of training. To choose settings, give the runs validation rows, data.validation=unused(50) or holdout(0.1): the first
columns and the plot then show these, rows are ranked by --by, and one is proposed: of those within one standard error
of the best, the cheapest. Never choose by test metrics.

The paper's grids, here on CIFAR-10-LT (its own are on ImageNet-LT: recipes/imagenet_lt_r50.yaml):

    Fig. 4 left, beta of the class weights
        rescom-timm sweep recipes/cifar10_lt_if100_r32.yaml method.beta=0,0.9,0.99,0.999,0.9999,0.99999
    Table 5, Q, Qp and Qn (invalid combinations are left out, with the reason)
        rescom-timm sweep recipes/cifar10_lt_if100_r32.yaml method.queue.per_class=16,64,256 \
            method.positives=1,4,16 method.negatives=100,400,1600
    Fig. 4 centre, SupCon + SiamBS over queue sizes
        rescom-timm sweep recipes/cifar10_lt_if100_r32.yaml +table6_2_supcon method.siamese=true \
            method.queue.per_class=16,64,256,1024
    Fig. 3, queue kinds
        rescom-timm sweep recipes/cifar10_lt_if100_r32.yaml method.queue.kind=fifo,reversed,class_balanced
    Table 6, one module at a time
        rescom-timm sweep recipes/cifar10_lt_if100_r32.yaml \
            +table6_1_moco,+table6_2_supcon,+table6_3_cbl,+table6_4_cbq,+table6_5_spm,+table6_6_siambs
    All methods on the digits: the commands in RESULTS.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a sweep; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm sweep digits_lt method.beta=0,0.9,0.999 --seeds 0,1,2")
    parser.add_argument("arguments", nargs="*", default=[], metavar="RECIPE, +PRESET or key=a,b,c")
    parser.add_argument("--seeds", help="default: 0,1,2; with --search 0")
    parser.add_argument("--search", type=int, metavar="N", help="N trials that Optuna proposes, instead of every cell")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--share", default="1/1", metavar="I/N", help="the I-th of N equal parts of the cells")
    parser.add_argument("--lean", action="store_true", help="drop the checkpoints of finished cells")
    parser.add_argument("--quiet", action="store_true", help="print only warnings, errors and the table")
    parser.add_argument("--table", action="store_true", help="write the table of the finished cells; train nothing")
    parser.add_argument(
        "--by",
        default="top1",
        choices=["top1", "many", "medium", "few", "mean_class"],
        help="validation metric that rows are ranked by",
    )
    options = parser.parse_intermixed_args(argv)
    recipes = [each for each in options.arguments if "=" not in each and each[0] != "+"]
    if options.seeds is None:
        options.seeds = "0,1,2" if options.search is None else "0"
    try:
        part, parts = (int(number) for number in options.share.split("/"))
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error("write --seeds as 0,1,2 and --share as 1/2")
    if not 1 <= part <= parts:
        parser.error(f"--share {options.share}: the first number must be from 1 to {parts}")
    if options.search is not None:
        if len(recipes) != 1 or len(seeds) != 1 or (part, parts) != (1, 1) or options.table or options.search < 1:
            parser.error("--search takes one recipe and one seed, at least one trial, and neither --share nor --table")
        if any("," in each for each in options.arguments if each[0] == "+"):
            parser.error("--search takes presets as +a +b, not alternatives such as +a,+b")
    if not recipes and not (options.table and options.output):
        parser.error("give a recipe, such as digits_lt, or --table and --output of a sweep")
    return answer(lambda: sweep(options, recipes, seeds, part, parts), trains=True)


def sweep(options: argparse.Namespace, recipes: list[str], seeds: list[int], part: int, parts: int) -> int:
    """Train the cells of this part and write the table."""
    from accelerate import PartialState

    from rescom_timm.cli.parts.sweep import cells, measure, remember, run, split, summary, write
    from rescom_timm.data.progress import quiet
    from rescom_timm.engine.errors import Stopped

    output = options.output or Path("runs") / f"{Path(recipes[0]).stem}_sweep"
    settings = [each for each in options.arguments if "=" in each]
    over = [[name.removeprefix("+") for name in split(each)] for each in options.arguments if each[0] == "+"]
    main_process = PartialState().is_main_process
    work: Callable[[], list[str]]
    if options.search is None:
        grid = {key: split(values) for key, _, values in (each.partition("=") for each in settings)}
        found = cells(recipes, grid, seeds, over)
        if main_process:
            remember(found, output)
        work = partial(run, [] if options.table else found[part - 1 :: parts], output, options.lean)
    else:
        from rescom_timm.cli.parts.search import Search, space_of

        space = space_of(recipes[0], [name for (name,) in over], settings, seeds[0], output)
        work = Search(space, options.search, options.by, output, options.lean).run
    try:
        with quiet() if options.quiet else nullcontext():
            wrong = work()
    except Stopped as error:
        print(f"{error}, or the sweep with the same command", file=sys.stderr)
        return 143
    if main_process:
        table = summary(measure(remember([], output), output))
        if table:
            write(table, output, options.by)
    return 1 if wrong else 0
