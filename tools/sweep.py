"""Train every combination of recipes, settings and seeds: the same as  rescom-timm sweep."""

import sys

from rescom_timm.cli.sweep import main

if __name__ == "__main__":
    sys.exit(main())
