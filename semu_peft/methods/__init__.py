"""Published methods by their names: short compositions of what the other rooms hold, without a loop or a class."""

from .classification import bad_teacher, boundary_shrink, neg_grad_plus, scrub, unsir
from .language import repselect

__all__ = ["bad_teacher", "boundary_shrink", "neg_grad_plus", "repselect", "scrub", "unsir"]
