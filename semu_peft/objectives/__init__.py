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
from .diffusion import (
    ConditionMatching,
    DenoisingAscent,
    DenoisingLoss,
    EmbeddingMatching,
    NegativeGuidance,
    PreservePrediction,
)
from .noise_schedule import NoiseSchedule

__all__ = [
    "ConditionMatching",
    "CrossEntropy",
    "DecoupledDistillation",
    "DenoisingAscent",
    "DenoisingLoss",
    "EmbeddingMatching",
    "GradientAscent",
    "InvertedHinge",
    "NegativeGuidance",
    "NoiseSchedule",
    "Objective",
    "PreservePrediction",
    "RandomLabel",
    "UniformDistribution",
    "UnseenConfidence",
    "WeightedSum",
]
