"""The evidence a person reads. Needs `pip install semu-peft[report]`; importing this package does not."""

from .localization import plot_localization
from .plots import plot_confusion, plot_spectra
from .samples import (
    SampleGrids,
    plot_before_after,
    plot_samples,
    plot_scales,
)
from .tradeoff import plot_tradeoff

__all__ = [
    "SampleGrids",
    "plot_before_after",
    "plot_confusion",
    "plot_localization",
    "plot_samples",
    "plot_scales",
    "plot_spectra",
    "plot_tradeoff",
]
