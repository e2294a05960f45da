"""`page`, where Spaces pushed by 0.2.0 import it; use rescom_timm.cli.demo."""

from rescom_timm.cli.demo import page as page
