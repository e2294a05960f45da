"""A page to try a model: the same as  rescom-timm demo  (rescom_timm/cli/demo.py)."""

import sys

from rescom_timm.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
