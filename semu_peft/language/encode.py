"""Prompts and answers as tokens, with labels on the answer alone; plain text in windows, with labels everywhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from semu_peft.arguments import check_count, check_kind
from semu_peft.objectives.batches import IGNORED

from .shapes import Message, TextExample

DEFAULT_TEMPLATE = "Question: {question}\nAnswer: {answer}"
_PLACES = ("{question}", "{prompt}")
_MARK = "semu-answer"  # what no chat template takes for anything but an answer
_OPENED = re.compile(r"<[^<>]+>$")
_TOKENIZER_MEND = "Load it with `AutoTokenizer.from_pretrained`."

Row = dict[str, list[int]]
"""The tokens of one example: `input_ids` and `labels`, and perhaps `alternate_input_ids` and `alternate_labels`."""


@dataclass(frozen=True)
class TextEncoder:
    """How text becomes `input_ids` and `labels`.

    The label of a token is the token itself where it belongs to the answer, and −100 elsewhere. Prompt and answer are
    tokenised in one piece, as the model would see them; the answer begins at the first token that the prompt alone does
    not have there, so that a token across the border counts. The end of the answer (EOS, or a chat's end of turn) has a
    label as well: where an answer ends is learnt with it. A chat's prompt is what the model reads when it is asked,
    also where the chat template writes it otherwise once it is answered; what that puts before every answer (an empty
    thought, a channel's name) belongs to the prompt.

    Args:
        tokenizer: The model's tokenizer.
        template: `"Question: {question}\\nAnswer: {answer}"` or another text with these two places (`{prompt}` is the
            same); special tokens may be written out, such as `"<s>Question: …"`: a tokenizer that begins texts with its
            BOS token adds none to one that begins with it. By default the tokenizer's chat template, or where it has
            none, the text above.
        max_length: The most tokens of a row. An answer that does not fit is cut, with a warning, and then has no end;
            plain text is divided into windows.
        seq2seq: For an encoder-decoder: the prompt goes to the encoder, and the labels are the answer.
        chat_options: What the chat template is given beside the messages, such as `{"enable_thinking": False}`.

    Raises:
        TypeError: `tokenizer` is none.
        ValueError: `template` lacks a place or has one that cannot be filled in, or `max_length` is too small.

    Examples:
        >>> from semu_peft.language import TextEncoder, TextExample
        >>> encoder = TextEncoder(tokenizer)  # of a model
        >>> row = encoder.encode(TextExample("blue", prompt="What colour?"))[0]
        >>> tokenizer.decode([token for token in row["labels"] if token != -100])
        ' blue</s>'
    """

    tokenizer: Any = field(repr=False)
    template: str | None = None
    max_length: int = 512
    seq2seq: bool = False
    chat_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.tokenizer) or not hasattr(self.tokenizer, "eos_token_id"):
            raise TypeError(
                f"`tokenizer` must be a tokenizer of transformers, got {type(self.tokenizer).__name__}. "
                + _TOKENIZER_MEND
            )
        check_count("max_length", self.max_length, least=2)
        check_template(self.template)

    @property
    def uses_chat(self) -> bool:
        """Whether prompts are put into the tokenizer's chat template."""
        return self.template is None and getattr(self.tokenizer, "chat_template", None) is not None

    def encode(self, example: TextExample, alternate: str | None = None) -> list[Row]:
        """The rows of an example: one, or for plain text one a window.

        Args:
            example: The text.
            alternate: Another answer to its prompt, for objectives that compare two.

        Raises:
            ValueError: The prompt leaves no room for the answer, the answer has no tokens, or plain text is to be
                given an alternate or an encoder.
        """
        if example.prompt is None:
            if alternate is not None or self.seq2seq:
                raise ValueError(
                    f"`{'alternates' if alternate is not None else 'forget'}`: plain text has no prompt, so that there "
                    f"is {'no other answer to it' if alternate is not None else 'nothing for the encoder'}. Give pairs "
                    "(prompt, answer)."
                )
            return self.windows(example.answer)
        row = self.answer(example.prompt, example.answer)
        if alternate is not None:
            other = self.answer(example.prompt, alternate)
            row |= {f"alternate_{name}": tokens for name, tokens in other.items()}
        return [row]

    def answer(self, prompt: str | Sequence[Message], answer: str) -> Row:
        """One answer to one prompt as `input_ids` and `labels`."""
        before, whole, is_ended = self.texts(prompt, answer)
        if self.seq2seq:
            return self._for_decoder(self.tokens(before.rstrip(), ends=False), answer)
        prefix = self.tokens(before, ends=False)
        ids = self.tokens(whole, ends=not is_ended)
        start = max(_common(prefix, ids), 1)  # nothing predicts a row's first token
        without_end = len(ids) - (ids[-1] == self.tokenizer.eos_token_id)
        if not answer.strip() or start >= without_end:
            raise ValueError(f"An answer must have at least one token, got {answer!r} to {_shown(prompt)}. Drop it.")
        if start >= self.max_length:
            raise ValueError(
                f"`max_length` must leave room for an answer, got {self.max_length}, and the prompt {_shown(prompt)} "
                f"has {start} tokens. Give more than that, if the model has the positions, or a shorter prompt."
            )
        labels = [IGNORED] * start + ids[start:]
        return {"input_ids": self._cut(ids), "labels": labels[: self.max_length]}

    def windows(self, text: str) -> list[Row]:
        """Plain text as rows of at most `max_length` tokens, each token but the text's first with one label.

        A window begins with the last token of the one before, which has its label there: so each is predicted once.
        The text has the special tokens that the tokenizer adds itself, also where that has a chat template.
        """
        ids = self.tokens(text, ends=True, is_plain=True)
        if not text.strip() or len(ids) < 2:
            raise ValueError(f"A text must have at least two tokens, got {text!r}. Drop it.")
        starts = range(0, len(ids) - 1, self.max_length - 1)
        parts = [ids[start : start + self.max_length] for start in starts]
        return [{"input_ids": part, "labels": [IGNORED, *part[1:]]} for part in parts]

    def prompt_tokens(self, prompt: str | Sequence[Message], start: str = "") -> list[int]:
        """What an answer is generated after: the tokens that stand before it where it is trained on and scored.

        Args:
            prompt: The question.
            start: What the answer is made to begin with.

        Examples:
            >>> from semu_peft.language import TextEncoder
            >>> encoder = TextEncoder(tokenizer)
            >>> row = encoder.answer("What colour?", "blue")
            >>> encoder.prompt_tokens("What colour?") == row["input_ids"][: row["labels"].count(-100)]
            True
        """
        before = self.texts(prompt, "")[0] + start
        # The blank before an answer belongs to its first word, as tokenizers cut; a chat's is a part of its template.
        text = before if self.uses_chat and not start else before.rstrip(" ")
        tokens = self.tokens(text, ends=False)
        if self.seq2seq:
            return tokens
        # Some tokenizers put EOS behind every text, after which a decoder says nothing.
        bare = self._as_written(text)
        while len(tokens) > len(bare) and tokens[-1] == self.tokenizer.eos_token_id and tokens[-len(bare) :] != bare:
            tokens.pop()
        return tokens

    def texts(self, prompt: str | Sequence[Message], answer: str) -> tuple[str, str, bool]:
        """The prompt as the model reads it, the same with the answer, and whether that says itself where it ends."""
        if not self.uses_chat:
            if not isinstance(prompt, str):
                raise ValueError(
                    "A prompt of several turns needs a chat template, which "
                    + ("`template` replaces. Leave `template` out." if self.template else "`tokenizer` has not.")
                )
            before, _, after = (self.template or self._plain()).partition("{answer}")
            # In one go: a question may itself have such braces in it.
            before = re.sub("|".join(map(re.escape, _PLACES)), lambda _: prompt, before)
            return before, before + answer + after, False
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        asked, (answered, after) = self._rendered(turns, add_generation_prompt=True), self._around_an_answer(turns)
        begun, is_ended = asked.rstrip(), bool(after.strip())
        # What stands before every answer is none of it: an empty thought (Qwen 3), the name of a channel (GPT-OSS).
        is_longer = answered.startswith(begun) and bool(answered[len(begun) :].strip())
        starts = [answered, asked] if is_longer else [asked]
        if not answer.strip():
            return starts[0], starts[0], is_ended
        whole = self._rendered([*turns, {"role": "assistant", "content": answer}])
        before = next((each for each in starts if whole.startswith(each.rstrip())), asked)
        if not whole.startswith(before.rstrip()):  # templates that write a question otherwise once it is answered
            between = "" if asked[-1:].isspace() else answered[len(answered.rstrip()) :]
            opened = _OPENED.search(begun)  # a thought, which an answer may begin with itself (DeepSeek-R1)
            said = answer.strip().removeprefix(opened[0] if opened else "").lstrip()
            whole = asked + between + said + after
        # It ends by a token of the template: what blanks follow that are no one's to predict.
        return before, whole.rstrip() if is_ended else whole, is_ended

    def _rendered(self, turns: Sequence[Message], **options: Any) -> str:
        options = {"tokenize": False, **(self.chat_options or {}), **options}
        try:
            rendered: str = self.tokenizer.apply_chat_template(turns, **options)
        except Exception as error:
            if not (isinstance(error, TypeError) or type(error).__module__.startswith("jinja2.")):
                raise
            # Of the template, in words that name no row.
            roles = [turn["role"] for turn in turns]
            questions = [turn for turn in turns if turn["role"] != "assistant"] or turns
            raise ValueError(
                f"`tokenizer`: its chat template does not take {_shown(questions)} in turns of {roles}: {error}. Write "
                "them as it takes them, leave the row out, or give `template`."
            ) from error
        return rendered

    def _around_an_answer(self, turns: Sequence[Message]) -> tuple[str, str]:
        """What a chat template writes before an answer, and after it."""
        whole = self._rendered([*turns, {"role": "assistant", "content": _MARK}])
        head, found, after = whole.rpartition(_MARK)
        if not found:
            raise ValueError(
                "`tokenizer`: its chat template must write an answer after its question as it stands, but leaves out "
                f"{_MARK!r}. Give `template` instead."
            )
        return head, after

    def tokens(self, text: str, *, ends: bool, is_plain: bool = False) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around it; and with EOS, where it `ends`.

        A chat template writes them itself, so that its text gets no others. Text that `is_plain` did not go through it.
        """
        ids = self._with_special(text) if is_plain or not self.uses_chat else self._as_written(text)
        end = self.tokenizer.eos_token_id
        return [*ids, end] if ends and end is not None and ids[-1:] != [end] else ids

    def _with_special(self, text: str) -> list[int]:
        """With the tokens that the tokenizer adds, but no BOS before one that is written."""
        ids, begin = list(self.tokenizer(text)["input_ids"]), getattr(self.tokenizer, "bos_token_id", None)
        if begin is not None and ids[:2] == [begin, begin]:
            written = self._as_written(text)
            return ids[1:] if ids[1 : 1 + len(written)] == written else ids
        return ids

    def _as_written(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain(self) -> str:
        return "{prompt}{answer}" if self.seq2seq else DEFAULT_TEMPLATE

    def _for_decoder(self, prefix: list[int], answer: str) -> Row:
        labels = list(self.tokenizer(text_target=answer)["input_ids"])
        end = self.tokenizer.eos_token_id
        if not answer.strip() or not [token for token in labels if token != end]:
            raise ValueError(f"An answer must have at least one token, got {answer!r}. Drop it.")
        if end is not None and labels[-1] != end:
            labels.append(end)
        if len(prefix) > self.max_length:
            raise ValueError(
                f"`max_length` must be enough for each prompt, got {self.max_length} for one of {len(prefix)} tokens. "
                "Give more, or a shorter prompt."
            )
        return {"input_ids": prefix, "labels": self._cut(labels)}

    def _cut(self, tokens: list[int]) -> list[int]:
        if len(tokens) > self.max_length:
            warnings.warn(
                f"`max_length`: an answer does not fit into {self.max_length} tokens and is cut there: what follows is "
                "in no batch, to be forgotten or kept. Give more, if the model has the positions, or shorter answers.",
                stacklevel=4,
            )
        return tokens[: self.max_length]


def check_template(template: str | None) -> None:
    """Check how prompts and answers are to be written, before there is a tokenizer.

    Raises:
        TypeError: It is no text.
        ValueError: It lacks a place, or has one behind the answer, where none is filled in.

    Examples:
        >>> from semu_peft.language.encode import check_template
        >>> check_template("Q: {question}")
        Traceback (most recent call last):
        ValueError: `template` must have the places {question} and, after it, {answer}, got 'Q: {question}'. Write ...
    """
    if template is None:
        return
    check_kind("template", template, str, "a text or None", f"Write {DEFAULT_TEMPLATE!r}.")
    before, found, after = template.partition("{answer}")
    if not found or not any(place in before for place in _PLACES):
        raise ValueError(
            f"`template` must have the places {{question}} and, after it, {{answer}}, got {template!r}. Write "
            f"{DEFAULT_TEMPLATE!r}."
        )
    if behind := [place for place in ("{answer}", *_PLACES) if place in after]:
        raise ValueError(
            f"`template` must have no place behind its first {{answer}}, got {', '.join(behind)} there in {template!r}."
            " Leave it out: it would be trained on as it stands."
        )


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two rows have alike from their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _shown(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""
    return repr(text if len(text) <= 60 else text[:57] + "...")
