"""Did the model forget, what did it keep, and what did that cost.

Functions take models and loaders and return plain dataclasses. A metric that fits a classifier of its own needs
`pip install semu-peft[evaluation]`; importing this package does not.
"""

from .classification import Predictions, evaluate_forgetting, predict
from .comparison import ForgettingComparison, ForgettingMetrics
from .membership import membership_inference

__all__ = [
    "ForgettingComparison",
    "ForgettingMetrics",
    "Predictions",
    "evaluate_forgetting",
    "membership_inference",
    "predict",
]
