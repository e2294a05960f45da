"""Training: the loop, its state and checkpoints, the run folder, evaluation, logging, launching.

Not here: what a step computes (methods) and how a recipe is read (config).
"""
