"""Names of 0.2.0 that Spaces of the Hub import; use rescom_timm.cli. Removed in the release after next."""
