"""Erase a concept from a text-to-image pipeline."""

from .dataset import ConceptExamples, concept_examples
from .erase import ConceptResult, unlearn_concept
from .preview import Preview
from .targets import denoiser_targets

__all__ = ["ConceptExamples", "ConceptResult", "Preview", "concept_examples", "denoiser_targets", "unlearn_concept"]
