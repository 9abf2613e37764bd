"""When a correction is active: a gate says it for each example, and what it opens is an adapter or another change."""

from .adapters import GATE_FILE, GatedModel, gated
from .classifier import Classifier, LinearScorer, linear_gate
from .hidden import HiddenStates
from .intervention import Gate, Intervention
from .nearest import Calibration, Nearest

__all__ = [
    "GATE_FILE",
    "Calibration",
    "Classifier",
    "Gate",
    "GatedModel",
    "HiddenStates",
    "Intervention",
    "LinearScorer",
    "Nearest",
    "gated",
    "linear_gate",
]
