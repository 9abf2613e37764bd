"""Where the training of an adapter starts: the bases and the first core of each layer.

The base weight is never written. A start whose core is not zero is kept as an offset, `ΔW = U (R − R₀) Vᵀ`, so that the
model computes what it did and "adapter off" is always the original; or as the core itself, `ΔW = U R Vᵀ`, where the
method means the model to change at once.
"""

from .base import LayerStart, Start
from .gradient import Ascent, FirstStep, Zero
from .weight import FeatureDifference, WeightSplit, fila_row_weights
from .written import Projection, RankOneWrite, contrast_directions

__all__ = [
    "Ascent",
    "FeatureDifference",
    "FirstStep",
    "LayerStart",
    "Projection",
    "RankOneWrite",
    "Start",
    "WeightSplit",
    "Zero",
    "contrast_directions",
    "fila_row_weights",
]
