"""Robustness of a run to corruptions: the same as  rescom-timm robustness  (rescom_timm/cli/robustness.py)."""

import sys

from rescom_timm.cli.robustness import main

if __name__ == "__main__":
    sys.exit(main())
