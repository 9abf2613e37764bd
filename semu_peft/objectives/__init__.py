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
from .language import (
    CEU,
    UNDIAL,
    WGA,
    FlatLogits,
    KLToOriginal,
    SatImp,
    UnseenAnswer,
    WeightedAscent,
    sequence_nll,
)
from .noise_schedule import NoiseSchedule
from .preference import DPO, NPO, TPO, FDivergence, SimNPO
from .representation import RMU, AdaptiveRMU, PreserveHiddenStates, RouterAnchor
from .retain import Retain, as_retain
from .simulation import SimulatedRelearning
from .wrappers import PrimalDual, TokenSelective

__all__ = [
    "AdaptiveRMU",
    "AdversarialUnlearning",
    "Attacker",
    "CEU",
    "ConditionMatching",
    "CrossEntropy",
    "DPO",
    "DecoupledDistillation",
    "DenoisingAscent",
    "DenoisingLoss",
    "EmbeddingMatching",
    "Evaluation",
    "FDivergence",
    "FlatLogits",
    "GradientAscent",
    "InvertedHinge",
    "KLToOriginal",
    "LossFunction",
    "NPO",
    "NegativeGuidance",
    "NoiseSchedule",
    "Objective",
    "Outputs",
    "PreserveHiddenStates",
    "PreservePrediction",
    "PrimalDual",
    "RMU",
    "RandomLabel",
    "Retain",
    "RouterAnchor",
    "SatImp",
    "SimNPO",
    "SimulatedRelearning",
    "SquaredLogits",
    "TPO",
    "TokenSelective",
    "UNDIAL",
    "UniformDistribution",
    "UnseenAnswer",
    "UnseenConfidence",
    "WGA",
    "WeightedAscent",
    "WeightedSum",
    "adversarial_examples",
    "as_objective",
    "as_retain",
    "sequence_nll",
]
