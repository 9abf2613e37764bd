"""MUSE's two memorisations: how a model continues a text it may know, and how it answers questions on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .generation import Rouge, generate_answers, rouge_l
from .prompting import few_shot
from .prompts import read_questions

_CONTINUED = "{question}{answer}"  # a text goes on without a word between


def verbatim_memorisation(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    progress: bool = True,
) -> Rouge:
    """VerbMem: ROUGE-L F1 of the greedy continuation of a text's beginning (Shi et al. 2024, arXiv 2407.06460).

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: `(beginning, continuation)`, or mappings with `prompt` and `gt`, MUSE's names.
        max_new_tokens: Longest continuation.
        batch_size: Texts at a time.
        progress: Show a progress bar.

    Returns:
        The scores; MUSE reports the mean of `f1`.

    Examples:
        >>> from semu_peft.evaluation import verbatim_memorisation
        >>> texts = [("the sky", " is blue")]
        >>> len(verbatim_memorisation(decoder, tokenizer, texts, max_new_tokens=3, progress=False).f1)
        1
    """
    examples = read_questions(texts, "texts")
    written = generate_answers(
        model, tokenizer, [example.prompt for example in examples], template=_CONTINUED, max_new_tokens=max_new_tokens,
        batch_size=batch_size, progress=progress, name="continuations",
    )  # fmt: skip
    return rouge_l([example.answer for example in examples], written)


def knowledge_memorisation(
    model: nn.Module,
    tokenizer: Any,
    questions: Any,
    shots: Sequence[Any] = (),
    *,
    template: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    progress: bool = True,
) -> Rouge:
    """KnowMem: ROUGE-L F1 of greedy answers after a few examples of other answers (Shi et al. 2024, arXiv 2407.06460).

    An answer ends at a blank line or where the model asks the next question itself.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        questions: Questions with their answers.
        shots: Questions with answers that go before each.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        max_new_tokens: Longest answer.
        batch_size: Answers at a time.
        progress: Show a progress bar.

    Returns:
        The scores; MUSE reports the mean of `f1`.

    Examples:
        >>> from semu_peft.evaluation import knowledge_memorisation
        >>> found = knowledge_memorisation(decoder, tokenizer, [("What", "blue")], [("How", "two")], progress=False)
        >>> len(found.f1)
        1
    """
    examples = read_questions(questions, "questions")
    prompts, shown = few_shot(tokenizer, [example.prompt or "" for example in examples], shots, template)
    written = generate_answers(
        model, tokenizer, prompts, template=shown, max_new_tokens=max_new_tokens,
        stop=("\n\n", "Question"), batch_size=batch_size, progress=progress, name="answers",
    )  # fmt: skip
    return rouge_l([example.answer for example in examples], written)
