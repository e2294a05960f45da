"""Speed and memory of parts: the same as  rescom-timm benchmark  (rescom_timm/cli/benchmark.py)."""

import sys

from rescom_timm.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
