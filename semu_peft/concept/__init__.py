"""Erase a concept from a text-to-image pipeline."""

from .erase import ConceptResult, unlearn_concept
from .examples import ConceptExamples, concept_examples
from .targets import denoiser_targets

__all__ = ["ConceptExamples", "ConceptResult", "concept_examples", "denoiser_targets", "unlearn_concept"]
