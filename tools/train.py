"""Train a recipe: the same as  rescom-timm train  (rescom_timm/cli/train.py)."""

import sys

from rescom_timm.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
