"""Prompts around a question: other answers before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semu_peft.language.encode import DEFAULT_TEMPLATE, TextEncoder

from .prompts import read_questions


def few_shot(
    tokenizer: Any, prompts: Sequence[Any], shots: Sequence[Any], template: str | None = None
) -> tuple[list[Any], str | None]:
    """Questions with answered ones before each, as prompts and the template to write them with.

    A chat gets them as earlier turns; a template is written once for each, with a blank line between, so that the
    prompts are whole texts, which the template that is returned leaves as they are.

    Args:
        tokenizer: Its chat template is used where no template is given.
        prompts: The questions.
        shots: Questions with answers.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].

    Examples:
        >>> from semu_peft.evaluation.prompting import few_shot
        >>> few_shot(tokenizer, ["How many?"], [("What colour?", "blue")], "{question} {answer}")
        (['What colour? blue\\n\\nHow many? '], '{question}{answer}')
    """
    if not len(shots):
        return list(prompts), template
    examples = read_questions(shots, "shots")
    encoder = TextEncoder(tokenizer, template)
    if encoder.uses_chat:
        before = [turn for example in examples for turn in _turns(example.prompt, example.answer)]
        return [(*before, *_turns(prompt)) for prompt in prompts], template
    # Beside the template and not in it: a shot may itself have such braces in it.
    shown = "".join(f"{encoder.texts(example.prompt or '', example.answer)[1]}\n\n" for example in examples)
    after = (template or DEFAULT_TEMPLATE).partition("{answer}")[2]
    return [shown + encoder.texts(prompt, "")[0] for prompt in prompts], "{question}{answer}" + after


def _turns(prompt: Any, answer: str | None = None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]
