"""Inference with a trained run: predictions, conformal sets, nearest images, the demo, writing and reading exports.

Not here: the Hub (hub, hub_download) and evaluation during training (engine).
"""
