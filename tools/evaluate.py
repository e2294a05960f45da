"""Evaluate a run: the same as  rescom-timm evaluate  (rescom_timm/cli/evaluate.py)."""

import sys

from rescom_timm.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
