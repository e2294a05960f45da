"""Pictures and a report of one or several runs:

    python tools/figures.py RUN [RUN ...] [--only curves,confusion] [-o FOLDER]

Writes every figure as PNG, SVG and CSV, and report.html, which opens offline and shows the runs side by side.
With --only, the report shows the figures named beside it (--only curves,report), or all where it stands alone.
"""

import argparse
import sys
from pathlib import Path

from rescom_timm.figures import files, report, style
from rescom_timm.figures.folder import open_runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(files.NAMES)}, report; all by default")
    parser.add_argument("--evaluation", default="", metavar="NAME", help="<split>-<checkpoint>; test-last by default")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="RUN/figures by default; ./figures for several runs")
    options = parser.parse_args(arguments)
    try:
        names = [name.strip() for name in (options.only or ",".join((*files.NAMES, "report"))).split(",")]
        files.check_names(names, (*files.NAMES, "report"))
        runs = open_runs(options.runs)
        folder = Path(options.output or ("figures" if len(runs) > 1 else runs[0].path / "figures"))
        pictures = [name for name in names if name != "report"]
        for drawn in files.draw_all(runs, pictures, options.evaluation):
            if drawn.figure is None or drawn.table is None:
                print(f"no {drawn.name}: {drawn.missing}")
                continue
            stem = drawn.name + (f"-{drawn.run.replace('/', '-')}" if drawn.run and len(runs) > 1 else "")
            print(*style.save(drawn.figure, drawn.table, folder / stem), sep="\n")
        if "report" in names:
            print(report.write(runs, folder / "report.html", pictures or files.NAMES, options.evaluation))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
