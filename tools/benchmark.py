"""Speed and memory of parts: the same as  rescom-timm benchmark  (rescom_timm/commands/benchmark.py)."""

import sys

from rescom_timm.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
