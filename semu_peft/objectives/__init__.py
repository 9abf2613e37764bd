"""What forgetting means: plain callables `(model, batch) -> scalar loss`."""

from .base import Objective, WeightedSum
from .classification import (
    CrossEntropy,
    DecoupledDistillation,
    GradientAscent,
    InvertedHinge,
    RandomLabel,
    UniformDistribution,
    UnseenConfidence,
)

__all__ = [
    "CrossEntropy",
    "DecoupledDistillation",
    "GradientAscent",
    "InvertedHinge",
    "Objective",
    "RandomLabel",
    "UniformDistribution",
    "UnseenConfidence",
    "WeightedSum",
]
