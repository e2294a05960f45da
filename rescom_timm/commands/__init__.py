"""Commands: one verb a file; `rescom-timm VERB`, `python -m rescom_timm VERB` and tools/*.py are their faces."""
