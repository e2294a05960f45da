"""Contrastive parts of ResCom: pairs, queue, mined pairs, supervised contrastive losses. Imports torch only.

Not here: classification losses (losses) and the training methods (methods).
"""
