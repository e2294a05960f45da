"""Names of 0.2.0; use rescom_timm.contrastive, rescom_timm.losses and rescom_timm.distributed.

Removed in the next release.
"""

import warnings

warnings.warn(
    "rescom_timm.contrast is now rescom_timm.contrastive and rescom_timm.losses; this name goes in the next release",
    DeprecationWarning,
    stacklevel=2,
)
