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

    A chat gets them as earlier turns; a template is written once for each, with a blank line between.

    Args:
        tokenizer: Its chat template is used where no template is given.
        prompts: The questions.
        shots: Questions with answers.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].

    Examples:
        >>> from semu_peft.evaluation.prompting import few_shot
        >>> few_shot(tokenizer, ["How many?"], [("What colour?", "blue")], "{question} {answer}")
        (['How many?'], 'What colour? blue\\n\\n{question} {answer}')
    """
    if not len(shots):
        return list(prompts), template
    examples = read_questions(shots, "shots")
    if TextEncoder(tokenizer, template).uses_chat:
        before = [turn for example in examples for turn in _turns(example.prompt, example.answer)]
        return [(*before, *_turns(prompt)) for prompt in prompts], template
    form = template or DEFAULT_TEMPLATE
    shown = [
        form.replace("{question}", str(example.prompt)).replace("{prompt}", str(example.prompt))
        .replace("{answer}", example.answer)
        for example in examples
    ]  # fmt: skip
    return list(prompts), "\n\n".join([*shown, form])


def _turns(prompt: Any, answer: str | None = None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]
