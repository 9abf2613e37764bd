"""When a correction is active: a gate says it for each example, and what it opens is an adapter or another change."""

from .activations import ActivationGate, Clamp, Moments, NeuronAdjust, adjust_neurons, neuron_moments
from .adapters import GATE_FILE, GatedModel, gated
from .classifier import Classifier, LinearScorer, linear_gate
from .embeddings import EmbeddingCorruption, EntityTokens, StrengthSearch, secant, zeroth_order
from .hidden import HiddenStates
from .intervention import Gate, Intervention, always
from .logits import LogitCombination, truncated
from .nearest import Calibration, Nearest
from .retrieval import Retrieval
from .speech import (
    Abstention,
    ForbiddenAnswers,
    ForbiddenContinuations,
    SimilarTokens,
    answer_strings,
    strings_of_answers,
)

__all__ = [
    "GATE_FILE",
    "Abstention",
    "ActivationGate",
    "Calibration",
    "Clamp",
    "Classifier",
    "EmbeddingCorruption",
    "EntityTokens",
    "ForbiddenAnswers",
    "ForbiddenContinuations",
    "Gate",
    "GatedModel",
    "HiddenStates",
    "Intervention",
    "LinearScorer",
    "LogitCombination",
    "Moments",
    "Nearest",
    "NeuronAdjust",
    "Retrieval",
    "SimilarTokens",
    "StrengthSearch",
    "adjust_neurons",
    "always",
    "answer_strings",
    "gated",
    "linear_gate",
    "neuron_moments",
    "secant",
    "strings_of_answers",
    "truncated",
    "zeroth_order",
]
