"""What a language model is unlearned on: texts as tokens, in batches of dynamic length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from semu_peft.arguments import check_count, check_switch
from semu_peft.objectives.batches import ALTERNATE, IGNORED, TOKEN_MASK

from .alternates import choose_alternates
from .encode import Row, TextEncoder
from .shapes import TextExample, read_text


@dataclass(frozen=True)
class TextCollator:
    """Rows of tokens as one batch, padded to the longest; the mask says what is padding, not the token's number.

    Padding is on the right whatever side the tokenizer pads prompts on: a token's position is then the same as without
    padding, which models with absolute positions (GPT-2) want, and decoders read labels from the left. Rows that have a
    `token_mask` keep it.

    Args:
        tokenizer: Its padding token, or its EOS where it has none.
        packing: Lay all rows end to end as one instead, with `position_ids` that begin again at 0 for each: nothing is
            padding. The model must keep them apart by these (transformers' attention does, without a mask and a cache);
            objectives refuse one that does not, such as Bloom, Falcon, Mamba, MPT and OPT.

    Raises:
        ValueError: The tokenizer has neither padding nor EOS token.

    Examples:
        >>> from semu_peft.language import TextCollator
        >>> rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
        >>> batch = TextCollator(tokenizer)(rows)
        >>> batch["attention_mask"], batch["labels"]
        (tensor([[1, 1],
                [1, 0]]), tensor([[-100,    6],
                [   7, -100]]))
    """

    tokenizer: Any = field(repr=False)
    packing: bool = False

    def __post_init__(self) -> None:
        if self.padding is None:
            raise ValueError(
                "`tokenizer` must have a padding or an EOS token, got neither. Set `tokenizer.pad_token`, such as to "
                "its unknown token: padding is masked, so any will do."
            )

    @property
    def padding(self) -> int | None:
        """The token that stands for nothing."""
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None else own

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for prefix in ("", ALTERNATE) if f"{ALTERNATE}input_ids" in rows[0] else ("",):
            names = ("input_ids", "labels", *([TOKEN_MASK] if prefix + TOKEN_MASK in rows[0] else []))
            parts = {name: [torch.as_tensor(row[prefix + name]) for row in rows] for name in names}
            made = self._packed(parts) if self.packing else self._padded(parts)
            batch |= {f"{prefix}{name}": tensor for name, tensor in made.items()}
        return batch

    def _padded(self, parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        fills = {"input_ids": int(self.padding or 0), "labels": IGNORED}
        parts = {**parts, "attention_mask": [torch.ones_like(row) for row in parts["input_ids"]]}
        return {
            name: pad_sequence(rows, batch_first=True, padding_value=fills.get(name, 0)) for name, rows in parts.items()
        }

    def _packed(self, parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """As transformers' `DataCollatorWithFlattening`: no row's first token is predicted from the row before it."""
        first_ignored = [torch.cat([torch.tensor([IGNORED]), row[1:]]) for row in parts["labels"]]
        places = [torch.arange(len(row)) for row in parts["input_ids"]]
        parts = {**parts, "labels": first_ignored, "position_ids": places}
        return {name: torch.cat(rows).unsqueeze(0) for name, rows in parts.items()}


@dataclass(frozen=True, eq=False, repr=False)
class TextExamples(Dataset[Any]):
    """Texts as tokens, `{"input_ids", "labels"}` each and perhaps `alternate_*`; in batches with an `attention_mask`.

    A data set for any trainer, with `collate` as its `data_collator`.

    Attributes:
        rows: The tokens.
        examples: The texts that they were made of; one of plain text may be several rows.
        tokenizer: The tokenizer.
        encoder: What made the rows of the texts, if that is known.

    Examples:
        >>> from semu_peft.language import text_examples
        >>> examples = text_examples(tokenizer, [("What colour?", "blue"), ("How many?", "two or three")])
        >>> examples
        TextExamples(2 rows, 22 tokens, 6 of them to forget)
        >>> sorted(next(iter(examples.loader(2))))
        ['attention_mask', 'input_ids', 'labels']
    """

    rows: list[Row]
    examples: list[TextExample]
    tokenizer: Any
    encoder: TextEncoder | None = None

    def __repr__(self) -> str:
        tokens = sum(len(row["input_ids"]) for row in self.rows)
        labels = sum(label != IGNORED for row in self.rows for label in row["labels"])
        return f"TextExamples({len(self)} rows, {tokens} tokens, {labels} of them to forget)"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def collate(self) -> TextCollator:
        """What makes a batch of rows."""
        return TextCollator(self.tokenizer)

    def loader(
        self, batch_size: int, shuffle: bool = True, seed: int | None = None, *, packing: bool = False
    ) -> DataLoader[dict[str, Tensor]]:
        """Batches for `initialize_semu_weights` and `unlearn`.

        Args:
            batch_size: Rows a batch.
            shuffle: In another order at each pass.
            seed: Seed of the orders; by default they are drawn as the run's own seed says.
            packing: See [`TextCollator`][semu_peft.language.dataset.TextCollator].
        """
        check_count("batch_size", batch_size)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        collate = replace(self.collate, packing=packing)
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)


@dataclass(frozen=True, eq=False)
class TextStream(IterableDataset[Any]):
    """Texts as tokens, read as they are needed, for files that do not fit into memory.

    Each worker of a `DataLoader` takes its share. A source that is an `IterableDataset` is left to share its rows out
    itself, as torch asks of it and a streamed data set of `datasets` does, by its shards; one that does not gives each
    row once a worker, here as in any `DataLoader`. Shuffling is among `buffer` rows at a time.

    Args:
        source: As [`text_examples`][semu_peft.language.dataset.text_examples] takes it, if it can be read again.
        encoder: What makes tokens of them.
        columns: Your names for columns.
        buffer: How many rows to shuffle among; 0 keeps the order.
        seed: Seed of the shuffling.

    Examples:
        >>> from semu_peft.language import TextEncoder, TextStream
        >>> stream = TextStream(["one text", "another"], TextEncoder(tokenizer))
        >>> len(list(stream)), next(iter(stream.loader(2)))["input_ids"].shape[0]
        (2, 2)
    """

    source: Any = field(repr=False)
    encoder: TextEncoder
    columns: Mapping[str, str] | None = None
    buffer: int = 0
    seed: int = 0
    name: str = field(default="forget", repr=False)

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if isinstance(self.source, IterableDataset):  # it looks for the worker itself
            start, step = 0, 1
        examples = read_text(self.source, columns=self.columns, name=self.name)
        rows = (
            row
            for index, example in enumerate(examples)
            if index % step == start
            for row in self.encoder.encode(example)
        )
        return self._shuffled(rows) if self.buffer else rows

    def loader(self, batch_size: int) -> DataLoader[dict[str, Tensor]]:
        """Batches for `unlearn`, in the order of the stream."""
        return DataLoader(self, batch_size=batch_size, collate_fn=TextCollator(self.encoder.tokenizer))

    def _shuffled(self, rows: Iterator[Row]) -> Iterator[Row]:
        draw, held = torch.Generator().manual_seed(self.seed), []
        for row in rows:
            held.append(row)
            if len(held) > self.buffer:
                index = int(torch.randint(len(held), (), generator=draw))
                held[index], held[-1] = held[-1], held[index]
                yield held.pop()
        for index in torch.randperm(len(held), generator=draw).tolist():
            yield held[index]


def text_examples(
    tokenizer: Any,
    forget: Any,
    *,
    template: str | None = None,
    alternates: str | Sequence[Any] | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int = 512,
    seq2seq: bool = False,
    chat_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
    name: str = "forget",
) -> TextExamples:
    """Turn what is to be forgotten, or kept, into tokens with labels on the answers.

    Args:
        tokenizer: The model's tokenizer.
        forget: A list of texts; of pairs (prompt, answer); of mappings `{"question", "answer"}`, `{"prompt",
            "response"}`, `{"messages"}`, `{"text"}`, see [`shapes`][semu_peft.language.shapes]; a `datasets.Dataset`;
            or a path of JSON lines, parquet or text.
        template: How prompt and answer are written, see [`TextEncoder`][semu_peft.language.encode.TextEncoder]: by
            default by the tokenizer's chat template, or `"Question: {question}\\nAnswer: {answer}"`.
        alternates: Another answer to each prompt: `"refusals"`, `"perturbed"`, `"paraphrased"` or a list of your own,
            see [`choose_alternates`][semu_peft.language.alternates.choose_alternates].
        columns: Your names for columns, `{"answer": "label_text"}`.
        max_length: The most tokens of a row.
        seq2seq: For an encoder-decoder.
        chat_options: What the chat template is given beside the messages.
        seed: Seed of the draws among alternates.
        progress: Show a progress bar.
        name: The argument to name in errors.

    Returns:
        A data set of the rows, which makes loaders.

    Raises:
        TypeError: Something is of another kind than said above.
        ValueError: There is nothing, a row lacks its columns, a prompt is longer than `max_length`, or an answer has no
            tokens.
        FileNotFoundError: There is no such file.

    Examples:
        >>> from semu_peft.language import text_examples
        >>> examples = text_examples(tokenizer, [{"question": "What colour?", "answer": "blue"}], alternates="refusals")
        >>> sorted(examples[0])
        ['alternate_input_ids', 'alternate_labels', 'input_ids', 'labels']
    """
    check_switch("progress", progress)
    check_count("seed", seed, least=0)
    encoder = TextEncoder(tokenizer, template, max_length, seq2seq, chat_options)
    TextCollator(tokenizer)
    if isinstance(forget, TextStream):
        raise TypeError(
            f"`{name}` must be texts that can be held whole, as they are gone through more than once, got a TextStream."
            " Give what it reads, its `source`, to `text_examples`; or train on its `loader` by `unlearn`."
        )
    examples = list(read_text(forget, columns=columns, name=name))
    if not examples:
        raise ValueError(f"`{name}` must hold at least one text, got none. An iterator may have been used up before.")
    others = choose_alternates(examples, alternates, seed)
    rows = [
        row
        for example, other in tqdm(
            zip(examples, others, strict=True), "Tokenising", len(examples), leave=False, disable=not progress
        )
        for row in encoder.encode(example, other)
    ]
    return TextExamples(rows, examples, tokenizer, encoder)
