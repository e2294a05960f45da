"""Push a run to the Hub: the same as  rescom-timm push  (rescom_timm/commands/push.py)."""

import sys

from rescom_timm.commands.push import main

if __name__ == "__main__":
    sys.exit(main())
