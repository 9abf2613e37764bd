"""Erase a concept from a text-to-image pipeline."""

from .dataset import ConceptExamples, concept_examples
from .erase import ConceptResult, unlearn_concept
from .families import Family, register_family
from .preview import Preview
from .targets import denoiser_targets

__all__ = [
    "ConceptExamples",
    "ConceptResult",
    "Family",
    "Preview",
    "concept_examples",
    "denoiser_targets",
    "register_family",
    "unlearn_concept",
]
