"""Where forgetting lives: from forget gradients to bases and ranks."""

from .factorize import Factors, leading_factors
from .initialize import initialize_semu_weights
from .profile import LayerSpectrum, SubspaceProfile
from .ranks import RankBudget, rank_for_energy
from .retain import Overlap, RetainSubspace

__all__ = [
    "Factors",
    "LayerSpectrum",
    "Overlap",
    "RankBudget",
    "RetainSubspace",
    "SubspaceProfile",
    "initialize_semu_weights",
    "leading_factors",
    "rank_for_energy",
]
