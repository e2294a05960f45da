"""Names of 0.2.0; use rescom_timm.contrastive.pairs."""

from rescom_timm.contrastive.pairs import *  # noqa: F403
