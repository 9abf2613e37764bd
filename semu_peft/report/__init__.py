"""The evidence a person reads. Needs `pip install semu-peft[report]`; importing this package does not."""

from .plots import plot_confusion, plot_spectra

__all__ = ["plot_confusion", "plot_spectra"]
