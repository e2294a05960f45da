"""To the Hub: pushing runs while they train and after, the model card, Spaces.

Not here: downloads (hub_client) and reading exports (inference).
"""
