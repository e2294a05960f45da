"""What may be wrong with a data set: the same as  rescom-timm doctor  (rescom_timm/cli/doctor.py)."""

import sys

from rescom_timm.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
