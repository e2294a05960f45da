"""Names of 0.2.0 that Spaces on the Hub import; use rescom_timm.cli. Removed in the release after next."""
