"""Gradients of chosen weights over some data: where they are caught, and what is kept of them."""

from .batch_gradient import BatchGradient, ConvGradient, DenseGradient, TokenGradient
from .covariance import LayerCovariance
from .moments import FactoredFisher, InputMoment
from .sketch import Sketch
from .sources import GradientSource, LayerSource, WeightSource, register_source
from .statistics import CoreCovariance, GradientSum, MatrixSum, SquaredSum, Statistic

__all__ = [
    "BatchGradient",
    "ConvGradient",
    "CoreCovariance",
    "DenseGradient",
    "FactoredFisher",
    "GradientSource",
    "GradientSum",
    "InputMoment",
    "LayerCovariance",
    "LayerSource",
    "MatrixSum",
    "Sketch",
    "SquaredSum",
    "Statistic",
    "TokenGradient",
    "WeightSource",
    "register_source",
]
