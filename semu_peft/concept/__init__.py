"""Erase a concept from a text-to-image pipeline."""

from .dataset import ConceptExamples, concept_examples
from .edit import edit_concepts
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
    "edit_concepts",
    "register_family",
    "unlearn_concept",
]
