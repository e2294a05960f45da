"""Labels for images: the same as  rescom-timm predict  (rescom_timm/cli/predict.py)."""

import sys

from rescom_timm.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
