"""Names of 0.2.0; use rescom_timm.contrastive.queue, and rescom_timm.distributed for gather and processes."""

from rescom_timm.contrastive.queue import *  # noqa: F403
from rescom_timm.distributed import gather as gather
from rescom_timm.distributed import processes as processes
