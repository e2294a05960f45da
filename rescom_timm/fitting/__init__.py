"""The best model for rare classes that a time budget allows.

source.py reads the images, inventory.py notices when they change. backbones.py loads pretrained nets, features.py runs
them once over the images, and methods/heads.py fits classifiers over the features in seconds. training.py trains all
weights from a head, soups.py averages start and end, choice.py compares candidates on validation images. plan.py says
what a number of seconds holds, budget.py decides by it. steps.py goes through all of this. workers.py lets several
processes work on one fit, tasks.py is what they do. `rescom_timm.fit` is the function.
"""
