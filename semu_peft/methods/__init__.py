"""Published methods by their names: short compositions of what the other rooms hold, without a loop or a class."""

from .language import repselect

__all__ = ["repselect"]
