"""Losses as pure functions in the papers' symbols, by family. Imports torch only.

Not here: losses over pairs of embeddings and the queue (contrastive).
"""

from rescom_timm.losses.distillation import distillation, diversity
from rescom_timm.losses.embeddings import balanced_contrast, check_temperature, prototype_contrast, robust_centroids
from rescom_timm.losses.softmax import (
    balanced_softmax,
    focal,
    label_aware_smoothing,
    lader,
    ldam,
    less_margins,
    logit_adjustment,
    weighted_cross_entropy,
    weighted_mean,
)
from rescom_timm.losses.von_mises_fisher import expected_contrast
from rescom_timm.losses.weights import (
    WeightForm,
    at_least_float32,
    class_weights,
    exact,
    inverse_power_weights,
    ldam_margins,
    log_prior,
    smoothing_by_count,
    vector_scale,
)

__all__ = [
    "WeightForm",
    "at_least_float32",
    "balanced_contrast",
    "balanced_softmax",
    "check_temperature",
    "class_weights",
    "distillation",
    "diversity",
    "exact",
    "expected_contrast",
    "focal",
    "inverse_power_weights",
    "label_aware_smoothing",
    "lader",
    "ldam",
    "ldam_margins",
    "less_margins",
    "log_prior",
    "logit_adjustment",
    "prototype_contrast",
    "robust_centroids",
    "smoothing_by_count",
    "vector_scale",
    "weighted_cross_entropy",
    "weighted_mean",
]
