"""Class features from names: the same as  rescom-timm class-features  (rescom_timm/cli/class_features.py)."""

import sys

from rescom_timm.cli.class_features import main

if __name__ == "__main__":
    sys.exit(main())
