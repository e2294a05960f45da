"""Names of 0.2.0; use rescom_timm.losses, and rescom_timm.contrastive.supcon for supcon and paco."""

from rescom_timm.contrastive.supcon import paco as paco
from rescom_timm.contrastive.supcon import supcon as supcon
from rescom_timm.losses import *  # noqa: F403
