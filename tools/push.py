"""Push a run to the Hub: the same as  rescom-timm push  (rescom_timm/cli/push.py)."""

import sys

from rescom_timm.cli.push import main

if __name__ == "__main__":
    sys.exit(main())
