"""A trained run at work: predictions, conformal sets, nearest images, reading exports, and exporting.

Not here: the Hub (hub, hub_client) and evaluation while training (engine).
"""
