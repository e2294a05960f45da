"""The best model for rare classes that a time budget allows.

features.py runs the frozen net once over the images. heads.py fits classifiers over the features in seconds.
training.py trains all weights from a head, soups.py averages start and end, choice.py compares candidates on validation
images, plan.py says what a budget holds, and steps.py goes through all of this. `rescom_timm.fit` is the function.
"""
