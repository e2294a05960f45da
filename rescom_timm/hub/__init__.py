"""Uploads to the Hub: pushing a run during training or later, the model card, Spaces.

Not here: downloads (hub_download), ids and timeouts (hub_client), reading exports (inference).
"""
