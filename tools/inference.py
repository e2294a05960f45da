"""Time of inference: the same as  rescom-timm inference  (rescom_timm/benchmarks/inference.py)."""

import sys

from benchmarks.inference import main

if __name__ == "__main__":
    sys.exit(main())
