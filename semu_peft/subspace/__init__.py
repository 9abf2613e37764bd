"""Where forgetting lives: from forget gradients to bases and ranks."""

from . import starts
from .initialize import initialize_semu_weights
from .profile import LayerSpectrum, SubspaceProfile
from .ranks import RankBudget
from .retain import Overlap, RetainRule

__all__ = [
    "LayerSpectrum",
    "Overlap",
    "RankBudget",
    "RetainRule",
    "SubspaceProfile",
    "initialize_semu_weights",
    "starts",
]
