"""Where forgetting lives: from forget gradients to bases and ranks."""

from .factorize import Factors, leading_factors
from .initialize import initialize_semu_weights
from .profile import LayerSpectrum, SubspaceProfile
from .ranks import rank_for_energy

__all__ = [
    "Factors",
    "LayerSpectrum",
    "SubspaceProfile",
    "initialize_semu_weights",
    "leading_factors",
    "rank_for_energy",
]
