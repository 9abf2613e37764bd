"""Edits without training: changes of weights in closed form, applied, undone, saved, and carried as adapters."""

from .carriers import Carried
from .dampening import dampen, search_dampening
from .edit import Applied, Edit
from .influence import influence_step, newton_step
from .noise import noise_columns
from .pruning import prune_weights
from .reversal import concept_target, reverse_rows
from .ridge import Certificate, RidgeHead
from .search import search_step

__all__ = [
    "Applied",
    "Carried",
    "Certificate",
    "Edit",
    "RidgeHead",
    "concept_target",
    "dampen",
    "influence_step",
    "newton_step",
    "noise_columns",
    "prune_weights",
    "reverse_rows",
    "search_dampening",
    "search_step",
]
