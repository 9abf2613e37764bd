"""The evidence a person reads. Needs the extra `report`; importing this package does not."""

from .audit import Audit, audit
from .curves import AttackCurve, plot_attack
from .localization import plot_localization
from .plots import plot_confusion, plot_spectra
from .samples import (
    SampleGrids,
    plot_before_after,
    plot_samples,
    plot_scales,
)
from .tradeoff import plot_losses, plot_tradeoff

__all__ = [
    "AttackCurve",
    "Audit",
    "SampleGrids",
    "audit",
    "plot_attack",
    "plot_before_after",
    "plot_confusion",
    "plot_localization",
    "plot_losses",
    "plot_samples",
    "plot_scales",
    "plot_spectra",
    "plot_tradeoff",
]
