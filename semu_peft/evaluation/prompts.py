"""Questions and answers as token ids: what the model is given, and what it is to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from semu_peft.arguments import check_kind

QUESTION_AND_ANSWER = "Question: {question}\nAnswer: {answer}"
"""The template where none is given and the tokenizer has no chat template."""

Pair = tuple[str, str]


def as_pairs(rows: Iterable[Any], name: str = "pairs") -> list[Pair]:
    """Questions and answers, from tuples or from mappings with `question` and `answer` (or `prompt` and `completion`).

    Raises:
        TypeError: A row is neither.
        ValueError: There are none, or an answer is empty.

    Examples:
        >>> from semu_peft.evaluation.prompts import as_pairs
        >>> as_pairs([("Who?", "Ada."), {"question": "Where?", "answer": "Here."}])
        [('Who?', 'Ada.'), ('Where?', 'Here.')]
    """
    check_kind(name, rows, Iterable, "questions with their answers", "Give a list such as `[('Who?', 'Ada.')]`.")
    pairs = [_pair(row, name) for row in rows]
    if not pairs:
        raise ValueError(f"`{name}` must hold at least one question, got none. Check the file it was read from.")
    empty = [number for number, (_, answer) in enumerate(pairs) if not answer.strip()]
    if empty:
        raise ValueError(f"`{name}` must have an answer to each question, got none in row {empty[0]}. Leave it out.")
    return pairs


def _pair(row: Any, name: str) -> Pair:
    if isinstance(row, Mapping):
        for question, answer in (("question", "answer"), ("prompt", "completion")):
            if question in row and answer in row:
                return _pair((row[question], row[answer]), name)
    elif isinstance(row, Sequence) and len(row) == 2 and all(isinstance(text, str) for text in row):
        return row[0], row[1]
    got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise TypeError(
        f"`{name}` must hold pairs of strings, or mappings with `question` and `answer`, got {got}. Rename the columns."
    )


def encode_answer(tokenizer: Any, question: str, answer: str, template: str | None = None) -> tuple[list[int], int]:
    """The token ids of a question with its answer, and how many of them the prompt has.

    The whole text is tokenised as one, so that words are cut as in training, and the end-of-sequence token follows.

    Args:
        tokenizer: Of transformers.
        question: What is asked.
        answer: What is to be said.
        template: With `{question}` and `{answer}`; by default the tokenizer's chat template, or
            `"Question: {question}\\nAnswer: {answer}"`. Special tokens are written out: `"<s>Question: …"`.

    Raises:
        ValueError: The template lacks one of the two.

    Examples:
        >>> from semu_peft.evaluation.prompts import encode_answer
        >>> class Letters:  # a tokenizer of single letters
        ...     chat_template, eos_token_id = None, 0
        ...     def __call__(self, text, **options):
        ...         offsets = [(place, place + 1) for place in range(len(text))]
        ...         return {"input_ids": [ord(letter) for letter in text], "offset_mapping": offsets}
        >>> encode_answer(Letters(), "A", "B", "{question}>{answer}")
        ([65, 62, 66, 0], 2)
    """
    prompt, full, special = _texts(tokenizer, question, answer, template)
    ids, length = _joint(tokenizer, prompt, full, special)
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, length


def encode_prompt(tokenizer: Any, question: str, template: str | None = None) -> list[int]:
    """The token ids that an answer is generated after.

    Examples:
        >>> from semu_peft.evaluation.prompts import encode_prompt
        >>> class Letters:
        ...     chat_template = None
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [ord(c) for c in text]}
        >>> encode_prompt(Letters(), "A", "{question}> {answer}")
        [65, 62]
    """
    prompt, _, special = _texts(tokenizer, question, "", template)
    return list(tokenizer(prompt, add_special_tokens=special)["input_ids"])


def _texts(tokenizer: Any, question: str, answer: str, template: str | None) -> tuple[str, str, bool]:
    """The prompt, the prompt with the answer, and whether the tokenizer still has to add its special tokens."""
    if template is None and getattr(tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return prompt, prompt + answer, False
    template = QUESTION_AND_ANSWER if template is None else template
    before, found, after = template.partition("{answer}")
    if not found or "{question}" not in before:
        raise ValueError(
            f"`template` must have `{{question}}` and then `{{answer}}` in it, got {template!r}. Write for example "
            f"{QUESTION_AND_ANSWER!r}."
        )
    before = before.replace("{question}", question)
    prompt = before.rstrip(" ")  # the space belongs to the answer's first word, as tokenizers cut
    return prompt, before + answer + after, True


def _joint(tokenizer: Any, prompt: str, full: str, special: bool) -> tuple[list[int], int]:
    if getattr(tokenizer, "is_fast", True):
        encoded = tokenizer(full, add_special_tokens=special, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        ends = [end for _, end in encoded["offset_mapping"]]
        return ids, next((place for place, end in enumerate(ends) if end > len(prompt)), len(ids))
    first = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    rest = list(tokenizer(full[len(prompt) :], add_special_tokens=False)["input_ids"])
    return first + rest, len(first)
