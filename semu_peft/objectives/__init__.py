"""What forgetting means: plain callables `(model, batch) -> scalar loss`."""

from .adversarial import AdversarialUnlearning, adversarial_examples
from .attackers import Attacker
from .base import Evaluation, LossFunction, Objective, Outputs, WeightedSum, as_objective
from .boundary import BoundaryShrink, error_maximizing_noise
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
from .embeddings import EmbeddingReconstruction, KeepEmbeddings, RepelEmbeddings, embedding_code
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
from .matching import OracleMatching, pair_with_logits, without_influence
from .noise_schedule import NoiseSchedule
from .perturbed import PerturbedLatents
from .preference import DPO, NPO, TPO, AlternateAnswer, FDivergence, SimNPO
from .ranking import BPR, ReverseBPR, sample_negatives
from .representation import RMU, AdaptiveRMU, BreakActivations, PreserveHiddenStates, RouterAnchor
from .retain import Retain, as_retain
from .simulation import SimulatedRelearning
from .teachers import untrained
from .wrappers import InTurns, PrimalDual, TokenSelective

__all__ = [
    "AdaptiveRMU",
    "AdversarialUnlearning",
    "AlternateAnswer",
    "Attacker",
    "BPR",
    "BoundaryShrink",
    "BreakActivations",
    "CEU",
    "ConditionMatching",
    "CrossEntropy",
    "DPO",
    "DecoupledDistillation",
    "DenoisingAscent",
    "DenoisingLoss",
    "EmbeddingMatching",
    "EmbeddingReconstruction",
    "Evaluation",
    "FDivergence",
    "FlatLogits",
    "GradientAscent",
    "InTurns",
    "InvertedHinge",
    "KLToOriginal",
    "LossFunction",
    "KeepEmbeddings",
    "NPO",
    "NegativeGuidance",
    "NoiseSchedule",
    "Objective",
    "OracleMatching",
    "Outputs",
    "PerturbedLatents",
    "PreserveHiddenStates",
    "PreservePrediction",
    "PrimalDual",
    "RMU",
    "RandomLabel",
    "RepelEmbeddings",
    "Retain",
    "ReverseBPR",
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
    "embedding_code",
    "error_maximizing_noise",
    "pair_with_logits",
    "sample_negatives",
    "sequence_nll",
    "untrained",
    "without_influence",
]
