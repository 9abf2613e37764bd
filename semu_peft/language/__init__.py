"""Forget texts, facts and answers in language models: data, pairing, and the one call."""

from .alternates import REFUSALS, choose_alternates
from .dataset import TextCollator, TextExamples, TextStream, text_examples
from .encode import TextEncoder
from .forget import TextResult, forget_text
from .others import answers_about_others
from .pairing import ForgetRetainPairs, Part
from .samples import own_samples
from .shapes import ColumnsError, TextExample, as_example, read_text
from .stopping import UntilUnseen
from .unseen import unseen_answers

__all__ = [
    "REFUSALS",
    "ColumnsError",
    "ForgetRetainPairs",
    "Part",
    "TextCollator",
    "TextEncoder",
    "TextExample",
    "TextExamples",
    "TextResult",
    "TextStream",
    "UntilUnseen",
    "answers_about_others",
    "as_example",
    "choose_alternates",
    "forget_text",
    "own_samples",
    "read_text",
    "text_examples",
    "unseen_answers",
]
