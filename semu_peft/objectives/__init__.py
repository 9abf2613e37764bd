"""What forgetting means: plain callables `(model, batch) -> scalar loss`."""

from .adversarial import AdversarialUnlearning, adversarial_examples
from .attackers import Attacker
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
from .label_free import SquaredLogits
from .language import KLToOriginal
from .noise_schedule import NoiseSchedule
from .preference import NPO, SimNPO
from .retain import Retain, as_retain
from .simulation import SimulatedRelearning

__all__ = [
    "NPO",
    "AdversarialUnlearning",
    "Attacker",
    "ConditionMatching",
    "CrossEntropy",
    "DecoupledDistillation",
    "DenoisingAscent",
    "DenoisingLoss",
    "EmbeddingMatching",
    "Evaluation",
    "GradientAscent",
    "InvertedHinge",
    "KLToOriginal",
    "LossFunction",
    "NegativeGuidance",
    "NoiseSchedule",
    "Objective",
    "Outputs",
    "PreservePrediction",
    "RandomLabel",
    "Retain",
    "SimNPO",
    "SimulatedRelearning",
    "SquaredLogits",
    "UniformDistribution",
    "UnseenConfidence",
    "WeightedSum",
    "adversarial_examples",
    "as_objective",
    "as_retain",
]
