"""What forgetting means: plain callables `(model, batch) -> scalar loss`."""

from .adversarial import AdversarialUnlearning, adversarial_examples
from .base import Evaluation, LossFunction, Objective, Outputs, WeightedSum, as_objective
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
from .retain import Retain, as_retain

__all__ = [
    "AdversarialUnlearning",
    "ConditionMatching",
    "CrossEntropy",
    "DecoupledDistillation",
    "DenoisingAscent",
    "DenoisingLoss",
    "EmbeddingMatching",
    "Evaluation",
    "GradientAscent",
    "InvertedHinge",
    "LossFunction",
    "NegativeGuidance",
    "NoiseSchedule",
    "Objective",
    "Outputs",
    "PreservePrediction",
    "RandomLabel",
    "Retain",
    "UniformDistribution",
    "UnseenConfidence",
    "WeightedSum",
    "adversarial_examples",
    "as_objective",
    "as_retain",
]
