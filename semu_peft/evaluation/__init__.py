"""Did the model forget, what did it keep, and what did that cost.

Functions take models and loaders and return plain dataclasses. A metric that fits a classifier of its own needs
`pip install semu-peft[evaluation]`; importing this package does not.
"""

from .classification import Predictions, evaluate_forgetting, predict
from .comparison import ForgettingComparison, ForgettingMetrics
from .diffusion import (
    ErasureMetrics,
    LabelledPrompt,
    UnlearnCanvasMetrics,
    classify_samples,
    clip_score,
    evaluate_erasure,
    frechet_distance,
    kernel_distance,
    unlearn_canvas,
)
from .membership import MembershipInference, attack_membership, membership_inference

__all__ = [
    "ErasureMetrics",
    "ForgettingComparison",
    "ForgettingMetrics",
    "LabelledPrompt",
    "MembershipInference",
    "Predictions",
    "UnlearnCanvasMetrics",
    "attack_membership",
    "classify_samples",
    "clip_score",
    "evaluate_erasure",
    "evaluate_forgetting",
    "frechet_distance",
    "kernel_distance",
    "membership_inference",
    "predict",
    "unlearn_canvas",
]
