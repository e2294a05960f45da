"""Pictures and a report of runs: the same as  rescom-timm figures  (rescom_timm/cli/figures.py)."""

import sys

from rescom_timm.cli.figures import main

if __name__ == "__main__":
    sys.exit(main())
