"""Questions for a language model, read and encoded as the room `language` does it, for all that evaluates on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from semu_peft.language.encode import TextEncoder
from semu_peft.language.shapes import TextExample, read_text
from semu_peft.objectives.batches import is_encoder_decoder

_NO_LIMIT = 1 << 20  # nothing is cut: half an answer would be scored as if it were one


def read_questions(source: Any, name: str = "pairs") -> list[TextExample]:
    """Questions with their answers, from all that [`read_text`][semu_peft.language.shapes.read_text] takes.

    Raises:
        TypeError: It is of no such kind.
        ValueError: There are none, or a row is plain text.

    Examples:
        >>> from semu_peft.evaluation.prompts import read_questions
        >>> questions = read_questions([("Who?", "Ada."), {"question": "Where?", "answer": "Here."}])
        >>> [example.prompt for example in questions]
        ['Who?', 'Where?']
    """
    examples = list(read_text(source, name=name))
    if not examples:
        raise ValueError(f"`{name}` must hold at least one question, got none. Check the file it was read from.")
    plain = [number for number, example in enumerate(examples) if example.is_plain]
    if plain:
        raise ValueError(
            f"`{name}` must have a question to each answer, got plain text in row {plain[0]}. Score that with "
            "`score_texts`."
        )
    return examples


def read_texts(source: Any, name: str = "texts") -> list[TextExample]:
    """Questions with their answers, or plain texts alone.

    Raises:
        TypeError: It is of no such kind.
        ValueError: There are none, or of both kinds.

    Examples:
        >>> from semu_peft.evaluation.prompts import read_texts
        >>> [example.is_plain for example in read_texts(["one", "another"])]
        [True, True]
    """
    examples = list(read_text(source, name=name))
    return examples if examples and are_plain(examples) else read_questions(examples, name)


def are_plain(examples: Sequence[TextExample]) -> bool:
    """Whether they are plain texts, which answer no question.

    Examples:
        >>> from semu_peft.evaluation.prompts import are_plain
        >>> are_plain([TextExample("blue", "What colour?")])
        False
    """
    return all(example.is_plain for example in examples)


def read_plain(source: Any, name: str = "texts") -> list[str]:
    """Plain texts, from strings, mappings with `text`, or what else `read_text` takes.

    Raises:
        TypeError: It is of no such kind.
        ValueError: There are none, or a row is an answer to a question.

    Examples:
        >>> from semu_peft.evaluation.prompts import read_plain
        >>> read_plain(["one", {"text": "another"}])
        ['one', 'another']
    """
    examples = list(read_text(source, name=name))
    answers = [number for number, example in enumerate(examples) if not example.is_plain]
    if not examples or answers:
        got = f"an answer to a question in row {answers[0]}" if answers else "none"
        raise ValueError(f"`{name}` must hold at least one text, and plain texts alone, got {got}. Give strings.")
    return [example.answer for example in examples]


def encoder_for(model: nn.Module, tokenizer: Any, template: str | None = None) -> TextEncoder:
    """The encoder of a model's questions and answers, which cuts nothing.

    Examples:
        >>> from semu_peft.evaluation.prompts import encoder_for
        >>> encoder_for(decoder, tokenizer).template is None
        True
    """
    return TextEncoder(tokenizer, template, _NO_LIMIT, is_encoder_decoder(model))
