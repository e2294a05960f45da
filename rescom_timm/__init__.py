"""Long-tailed image recognition with ResCom on any timm backbone.

The floors; every import points down, and tests/test_architecture.py holds it so:

    figures/    attic      pictures and reports of runs: measure -> arrays, draw -> picture
    runs/       second     recipe, build, trainer, checkpoint, log, evaluate, hub: from one YAML file to a saved model
    methods/    first      ResCom, what it is compared with, and second stages: net + queue + loss
    contrast/   ground     pairs, queues and losses of the paper; torch alone
    nets/       ground     any timm backbone with classifier and projector; torch and timm
    data/       ground     index files, sources, views, loaders
    metrics     ground     top-1 by group, calibration, corruption errors
"""

from rescom_timm.nets.net import Net, ProjectorConfig, create_model

__all__ = ["Net", "ProjectorConfig", "create_model"]
