"""Time of inference: the same as  rescom-timm inference  (rescom_timm/commands/inference.py)."""

import sys

from rescom_timm.commands.inference import main

if __name__ == "__main__":
    sys.exit(main())
