"""Rules edit the steps of a run: gradients before the optimiser, and what the optimiser then made of them."""

from .allocate import AllocateRanks
from .base import ClipGradientNorm, Rule, Step, StepData, as_rules, check_sharded
from .leading import RemoveDirections, RemoveLeading
from .mask import Mask, gradients_of_parameters, top_fraction, wagle_scores
from .precondition import Precondition
from .private import PrivateGradient
from .retain_safe import RetainSafe
from .routed import RoutedGradient, causal_mask, example_sharpness
from .sharpness import SharpnessAware
from .size import NormCap, RowScale
from .soft_threshold import Ramp, SoftThreshold

__all__ = [
    "AllocateRanks",
    "ClipGradientNorm",
    "Mask",
    "NormCap",
    "Precondition",
    "PrivateGradient",
    "Ramp",
    "RemoveDirections",
    "RemoveLeading",
    "RetainSafe",
    "RoutedGradient",
    "RowScale",
    "Rule",
    "SharpnessAware",
    "SoftThreshold",
    "Step",
    "StepData",
    "as_rules",
    "causal_mask",
    "check_sharded",
    "example_sharpness",
    "gradients_of_parameters",
    "top_fraction",
    "wagle_scores",
]
