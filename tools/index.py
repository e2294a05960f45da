"""Index files and recipes for one's own images: rescom-timm's make, convert, check, describe, overlap and init."""

import sys

from rescom_timm.cli.index import main

if __name__ == "__main__":
    sys.exit(main())
