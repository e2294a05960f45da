"""Average the weights of runs, or fit the temperature of one.

    rescom-timm soup RUN RUN ... -o RUN [--shares 0.5,0.5] [--checkpoint best|last] [--temperature]

The runs are of one net and the same classes. Without --shares the greedy soup is taken: from the best run on validation
on, each next one joins an even average where the mean over classes on validation does not fall. The soup is a run like
any other. With one run, --temperature scales its logits to the least loss on validation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rescom_timm.cli import answer, new_parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Average runs; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm soup runs/digits_lt runs/digits_lt-2 -o runs/soup")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of one net")
    parser.add_argument("-o", "--output", required=True, metavar="RUN", help="the folder of the soup")
    parser.add_argument("--shares", metavar="A,B,...", help="of each run, of sum 1 (default: by validation)")
    parser.add_argument("--checkpoint", default="best", help="best (the last where none was selected), last, or a name")
    parser.add_argument("--temperature", action="store_true", help="scale the logits by validation")
    options = parser.parse_args(argv)
    shares = None
    if options.shares:
        try:
            shares = [float(share) for share in options.shares.split(",")]
        except ValueError:
            parser.error(f"--shares are numbers such as 0.5,0.5, not {options.shares}")
    if len(options.runs) == 1 and not options.temperature:
        parser.error("name two runs or more, or fit the temperature of one: --temperature")
    return answer(lambda: average(options, shares), folders=[options.output])


def average(options: argparse.Namespace, shares: Sequence[float] | None) -> int:
    """Average, and print the shares and what each run and the soup have on validation."""
    from rescom_timm.engine.evaluate import table
    from rescom_timm.fitting.averaging import average_runs
    from rescom_timm.io import read_json

    found = average_runs(options.runs, options.output, shares, options.checkpoint, options.temperature)
    for run, share, value in zip(options.runs, found.shares, found.alone, strict=True):
        print(f"{share:.3f} of {run}" + ("" if value is None else f": mean over classes on validation {value:.2f}"))
    if found.together is not None:
        print(f"the soup: {found.together:.2f}, temperature {found.temperature:.3f}")
    print(table({options.output: read_json(f"{options.output}/evaluation/test-last.json")["numbers"]}))
    return 0
