"""Texts as tokens: which tokens have labels, checked token by token, and what a batch of them is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import IterableDataset
from models import t5
from text_models import decoder, tokenizer, told
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel

from semu_peft.evaluation import neutral_kl, score_texts
from semu_peft.language import (
    REFUSALS,
    TextCollator,
    TextEncoder,
    TextExample,
    TextStream,
    choose_alternates,
    text_examples,
)
from semu_peft.objectives import CrossEntropy, TokenSelective
from semu_peft.objectives.tokens import call_model

PAIRS = [("What colour is the sky?", "blue"), ("How many?", "two or three a b c")]


def tokens(words: Any, ids: list[int]) -> list[str]:
    return words.convert_ids_to_tokens(ids)


def test_labels_of_an_answer() -> None:
    """The prompt has none, the answer and its end have; `<s>` may stand in the template."""
    words = tokenizer()
    row = TextEncoder(words, "<s>Question: {question}\nAnswer: {answer}").encode(TextExample("blue", "What colour?"))[0]
    shown = ["<s>", "Question", ":", " What", " colour", "?", "\n", "Answer", ":", " blue", "</s>"]
    assert tokens(words, row["input_ids"]) == shown
    assert row["labels"] == [-100] * 9 + words.convert_tokens_to_ids([" blue", "</s>"])


def begins(words: Any) -> Any:
    """The tokenizer, which puts `<s>` before every text from now on."""
    words.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return words


def test_the_beginning_stands_once() -> None:
    """A tokenizer that adds it adds none to a text that begins with it; what is written twice stays as written."""
    words, plain = begins(tokenizer()), tokenizer()
    template = "Question: {question}\nAnswer: {answer}"
    pair = ("What colour?", "blue")
    row = text_examples(words, [pair], template="<s>" + template)[0]
    assert row == text_examples(words, [pair], template=template)[0]
    assert row == text_examples(plain, [pair], template="<s>" + template)[0]
    encoder = TextEncoder(words, "<s>" + template)
    assert tokens(words, encoder.prompt_tokens("How?"))[:2] == ["<s>", "Question"]
    for text in ("a b", "<s>a b"):
        assert tokens(words, TextEncoder(words).windows(text)[0]["input_ids"]) == ["<s>", "a", " b", "</s>"]
    for each in (words, plain):
        twice = TextEncoder(each).windows("<s><s>a")[0]["input_ids"]
        assert tokens(each, twice) == ["<s>", "<s>", "a", "</s>"]
    assert tokens(plain, TextEncoder(plain).windows("a b")[0]["input_ids"]) == ["a", " b", "</s>"]
    prompt = text_examples(words, [("<s>a", "b")], template="{prompt}{answer}", seq2seq=True)[0]["input_ids"]
    assert tokens(words, prompt) == ["<s>", "a"]


def test_plain_text_beside_a_chat_template() -> None:
    """It did not go through the template, so that the tokenizer's own tokens are added; a chat has them written."""
    words = begins(tokenizer(chat=True))
    row, chat = text_examples(words, ["a b c", ("What?", "a")], max_length=16).rows
    assert row == text_examples(begins(tokenizer()), ["a b c"])[0]
    assert tokens(words, row["input_ids"]) == ["<s>", "a", " b", " c", "</s>"]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert tokens(words, chat["input_ids"]) == ["<user>", "What", "?", "<assistant>", "a", "</s>"]
    model = decoder()
    (read,) = score_texts(model, words, ["a b c"], progress=False).log_probs
    ids = torch.tensor([row["input_ids"]])
    expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(read, expected.detach())
    assert neutral_kl(model, words, ["a b c"], reference=model, progress=False).tokens == 4


def test_a_token_across_the_border_is_the_answers() -> None:
    words = tokenizer()
    row = TextEncoder(words, "{prompt} d{answer}").encode(TextExample("! blue", "I"))[0]
    assert tokens(words, row["input_ids"]) == ["I", " d!", " blue", "</s>"]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_nothing_predicts_the_first_token_of_a_row() -> None:
    row = TextEncoder(tokenizer(), "{prompt}{answer}").encode(TextExample("blue a", ""))[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_braces_in_a_question_stay() -> None:
    encoder = TextEncoder(tokenizer(), "{prompt}: {answer}")
    assert encoder.texts("{prompt} or {question}", "a")[0] == "{prompt} or {question}: "


def test_the_end_stands_once() -> None:
    """Where the tokenizer adds EOS itself it is not added again, and where there is none nothing is made up."""

    class Ends:
        eos_token_id, pad_token_id, chat_template = 2, 0, None
        inner = tokenizer()

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [*self.inner(text)["input_ids"], 2]}

    row = TextEncoder(Ends()).encode(TextExample("blue", "What colour?"))[0]
    assert row["input_ids"].count(2) == 1 and row["labels"][-2:] == row["input_ids"][-2:]
    words = tokenizer(eos_token=None)
    row = TextEncoder(words).encode(TextExample("blue", "What colour?"))[0]
    assert tokens(words, row["input_ids"])[-1] == " blue"


def test_chat() -> None:
    """The last turn's answer alone has labels, with its end of turn and not the newline after it."""
    words = tokenizer(chat=True)
    turns = [
        {"role": "system", "content": "I know"}, {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "red"}, {"role": "user", "content": "How many?"},
    ]  # fmt: skip
    row = text_examples(words, [{"messages": [*turns, {"role": "assistant", "content": "two"}]}])[0]
    assert tokens(words, row["input_ids"]) == [
        "<system>", "I", " know", "<user>", "What", "?", "<assistant>", "red", "</s>", "\n", "<user>", "How", " many",
        "?", "<assistant>", "two", "</s>",
    ]  # fmt: skip
    assert row["labels"] == [-100] * 15 + words.convert_tokens_to_ids(["two", "</s>"])
    plain = text_examples(words, [("How many?", "two")])[0]
    assert tokens(words, plain["input_ids"]) == ["<user>", "How", " many", "?", "<assistant>", "two", "</s>"]
    words.chat_template = words.chat_template.replace("</s>\n", "")
    assert tokens(words, text_examples(words, [("How many?", "two")])[0]["input_ids"])[-2:] == ["two", "</s>"]


MOVES_SYSTEM = (  # as Mistral-7B-Instruct-v0.3: the system message stands in the last turn, if that is the user's
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for turn in messages %}{% if turn.role == 'user' %}<user>{% if loop.last and system is defined %}"
    "{{ system }}\n{% endif %}{{ turn.content }}<assistant>{% else %} {{ turn.content|trim }}</s>"
    "{% endif %}{% endfor %}"
)


def test_a_chat_template_that_moves_the_system_message() -> None:
    """The question has it and no label, as where an answer is asked for; earlier turns are as they were."""
    words = tokenizer(chat=True)
    words.chat_template = MOVES_SYSTEM
    turns = [
        {"role": "system", "content": "I know"}, {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "red"}, {"role": "user", "content": "How many?"},
    ]  # fmt: skip
    row = text_examples(words, [{"messages": [*turns, {"role": "assistant", "content": "two"}]}])[0]
    prompt = [
        "<user>", "What", "?", "<assistant>", " red", "</s>", "<user>", "I", " know", "\n", "How", " many", "?",
        "<assistant>",
    ]  # fmt: skip
    assert tokens(words, row["input_ids"]) == [*prompt, " two", "</s>"]
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    assert tokens(words, TextEncoder(words).prompt_tokens(turns)) == prompt
    short = text_examples(words, [{"messages": [*turns, {"role": "assistant", "content": "s"}]}])[0]  # as in `</s>`
    assert tokens(words, short["input_ids"])[-3:] == ["<assistant>", "<unk>", "</s>"]
    words.chat_template = MOVES_SYSTEM.replace("{{ turn.content|trim }}", "{{ turn.content|upper }}")
    with pytest.raises(ValueError, match="its chat template must write an answer after its question as it stands"):
        text_examples(words, [{"messages": [*turns, {"role": "assistant", "content": "two"}]}])


THINKS = (  # as Qwen3's: the last answer has a thought before it, an empty one unless it brings its own
    "{% for turn in messages %}{% if turn.role == 'assistant' %}<assistant>{% if 'know' in turn.content %}"
    "{{ turn.content }}{% else %}a\n{{ turn.content }}{% endif %}</s>\n{% else %}<{{ turn.role }}>{{ turn.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
DROPS_THOUGHTS = (  # as DeepSeek-R1's: an answer is asked for with a thought begun, which it keeps no more once given
    "{% for turn in messages %}{% if turn.role == 'assistant' %}<assistant>{{ turn.content.split('<system>')[-1] }}"
    "</s>{% else %}<user>{{ turn.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><user>\n{% endif %}"
)


def test_what_a_chat_template_puts_before_every_answer_is_none_of_it() -> None:
    """It is no more to be forgotten than the question is, and answers are generated after it."""
    words = tokenizer(chat=True)
    words.chat_template = THINKS
    encoder = TextEncoder(words)
    row = encoder.answer("How many?", "two")
    prompt = ["<user>", "How", " many", "?", "<assistant>", "a", "\n"]
    assert tokens(words, row["input_ids"]) == [*prompt, "two", "</s>"] and row["labels"].count(-100) == len(prompt)
    assert tokens(words, encoder.prompt_tokens("How many?")) == prompt
    thought = encoder.answer("How many?", "I know two")  # of its own, which is to be forgotten with it
    assert told(words, thought["labels"]) == "I know two</s>"


def test_a_thought_that_the_question_begins_is_begun_once() -> None:
    words = tokenizer(chat=True)
    words.chat_template = DROPS_THOUGHTS
    row = TextEncoder(words).answer("How many?", "<user>\nI know<system>two")
    assert tokens(words, row["input_ids"]) == [
        "<user>", "How", " many", "?", "<assistant>", "<user>", "\n", "I", " know", "<system>", "two", "</s>",
    ]  # fmt: skip
    assert told(words, row["labels"]) == "I know<system>two</s>"


def test_what_a_chat_template_refuses_is_told_with_its_question() -> None:
    words = tokenizer(chat=True)
    words.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + words.chat_template
    )
    turns = [{"role": "system", "content": "I know"}, {"role": "user", "content": "How many?"}]
    with pytest.raises(ValueError, match="does not take 'How many.' in turns of .*'user'.: no system turns"):
        text_examples(words, [{"messages": [*turns, {"role": "assistant", "content": "two"}]}])


def test_windows_of_plain_text() -> None:
    """Each token but the first is predicted once; a window begins with the one before's last token."""
    words = tokenizer()
    examples = text_examples(words, ["a b c d e f g", "a b"], max_length=4)
    ids = [tokens(words, row["input_ids"]) for row in examples.rows]
    assert ids == [
        ["a", " b", " c", " d"], [" d", " e", " f", " g"], [" g", "</s>"], ["a", " b", "</s>"],
    ]  # fmt: skip
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in examples.rows)
    assert len(examples.examples) == 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_encoder_decoder(side: str) -> None:
    """The prompt is the encoder's, the answer and its end the decoder's; its loss is transformers' own."""
    words = tokenizer(padding_side=side)
    examples = text_examples(words, [("a b", "c"), ("d", "e f g")], seq2seq=True, alternates=["h"])
    assert tokens(words, examples[0]["input_ids"]) == ["a", " b"]
    assert tokens(words, examples[1]["labels"]) == ["e", " f", " g", "</s>"]
    batch = next(iter(examples.loader(2, shuffle=False)))
    assert batch["labels"][0].tolist()[2:] == [-100, -100] and batch["alternate_labels"].shape == (2, 2)
    small = {name: tensor.clamp(max=31) for name, tensor in batch.items() if not name.startswith("alternate")}
    model = t5()
    torch.testing.assert_close(CrossEntropy()(model, small), model(**small).loss)
    with pytest.raises(ValueError, match="nothing for the encoder"):
        text_examples(words, ["a b"], seq2seq=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side: str) -> None:
    """On the right whatever the tokenizer's side, masked and without a label, also where EOS stands for it.

    No logit of an answer depends on it, be positions absolute or not.
    """
    words = tokenizer(pad_token=None, padding_side=side)
    examples = text_examples(words, PAIRS)
    batch = next(iter(examples.loader(2, shuffle=False)))
    lengths = [len(row["input_ids"]) for row in examples.rows]
    assert batch["attention_mask"].sum(1).tolist() == lengths and lengths[0] != lengths[1]
    short = min(range(2), key=lengths.__getitem__)
    missing = slice(lengths[short], None)
    assert (batch["input_ids"][short, missing] == words.eos_token_id).all()
    assert (batch["labels"][short, missing] == -100).all()
    assert [told(words, row) for row in batch["labels"]] == [" blue</s>", " two or three a b c</s>"]
    sizes = {"vocab_size": 88, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    for model in (decoder(), GPT2LMHeadModel(GPT2Config(**sizes)).eval()):
        together, labels = call_model(model, batch)
        alone = [call_model(model, examples.collate([row])) for row in examples.rows]
        torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), atol=1e-5, rtol=1e-4)
        assert labels.tolist() == torch.cat([each for _, each in alone]).tolist()


def test_a_mask_of_tokens_goes_with_its_row() -> None:
    """Padded like the labels, or packed; and that of the second answer."""
    examples = text_examples(tokenizer(), PAIRS, alternates="refusals")
    names = ("labels", "alternate_labels")
    rows = [
        row | {name.replace("labels", "token_mask"): [label > 20 for label in row[name]] for name in names}
        for row in examples.rows
    ]
    for collate in (examples.collate, TextCollator(tokenizer(), packing=True)):
        batch = collate(rows)
        for name in names:
            mask = batch[name.replace("labels", "token_mask")]
            assert mask.dtype == torch.bool and torch.equal(mask, batch[name] > 20)
    loss = TokenSelective(CrossEntropy())(decoder(), examples.collate(rows))
    assert loss.isfinite() and loss != CrossEntropy()(decoder(), examples.collate(rows))


def test_packing() -> None:
    """As transformers' flattening collator lays rows out."""
    examples = text_examples(tokenizer(), [*PAIRS, "a b c"], max_length=32)
    packed = next(iter(examples.loader(3, shuffle=False, packing=True)))
    expected = DataCollatorWithFlattening(return_tensors="pt")(examples.rows)
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in expected.items())
    with_others = text_examples(tokenizer(), PAIRS, alternates="refusals")
    assert "alternate_position_ids" in TextCollator(tokenizer(), packing=True)(with_others.rows)


def test_alternates() -> None:
    """One for each: of the list, of the example's own, or of those given; the same at each seed."""
    words = tokenizer()
    beside = {"question": "What colour?", "answer": "blue", "perturbed_answer": ["red", "two"]}
    row = text_examples(words, [{**beside, "paraphrased_answer": "the sky"}], alternates="paraphrased")[0]
    assert told(words, row["alternate_labels"]) == " the sky</s>" and told(words, row["labels"]) == " blue</s>"
    assert (
        row["alternate_input_ids"][: row["alternate_labels"].count(-100)]
        == (row["input_ids"][: row["labels"].count(-100)])
    )
    several = [TextExample("blue", "What?", perturbed_answers=("red", "two"))] * 40
    assert set(choose_alternates(several, "perturbed")) == {"red", "two"}
    assert choose_alternates(several, "refusals", 1) == choose_alternates(several, "refusals", 1)
    assert set(choose_alternates(several, "refusals")) <= set(REFUSALS)
    assert choose_alternates(several[:2], ["red", ["two"]]) == ["red", "two"]
    assert set(choose_alternates(several, ["red", "two", "three"])) == {"red", "two", "three"}


def test_loaders_draw_by_their_seed() -> None:
    examples = text_examples(tokenizer(), [("a", word) for word in "abcdefgh"])

    def order(seed: int) -> list[int]:
        return [int(batch["labels"].max()) for batch in examples.loader(1, seed=seed)]

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))


def test_a_stream() -> None:
    """It reads when asked, gives what `text_examples` gives, and shuffles among a few; workers share the rows."""
    words, read = tokenizer(), []

    class Source:
        def __iter__(self) -> Any:
            for word in "abcdefgh":
                read.append(word)
                yield "What?", word

    stream = TextStream(Source(), TextEncoder(words))
    first = next(iter(stream))
    assert read == ["a"] and first == text_examples(words, [("What?", "a")])[0]
    shuffled = list(TextStream(Source(), TextEncoder(words), buffer=3))
    assert shuffled != list(stream) and sorted(map(str, shuffled)) == sorted(map(str, stream))
    shared = torch.utils.data.DataLoader(
        TextStream([("What?", word) for word in "abcde"], TextEncoder(words)), batch_size=None, num_workers=2
    )
    assert sorted(told(words, row["labels"]) for row in shared) == [f" {word}</s>" for word in "abcde"]


def test_a_streamed_data_set_shares_itself_out() -> None:
    """By its shards: each row comes once, with fewer workers than shards and with more."""

    def rows(shards: list[int]) -> Any:
        for shard in shards:
            for place in range(5):
                yield {"text": f"{shard} {place}"}

    streamed = IterableDataset.from_generator(rows, gen_kwargs={"shards": [1, 2, 3]})
    expected = sorted(str(row) for row in TextStream(list(streamed), TextEncoder(tokenizer())))
    assert len(expected) == 15
    for workers in (0, 2, 4):
        stream = TextStream(streamed, TextEncoder(tokenizer()))
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
        assert sorted(map(str, loader)) == expected


@pytest.mark.parametrize(
    "data, options, error, match",
    [
        (["a b"], {"template": "{answer}"}, ValueError, "`template` must have the places"),
        (["a b"], {"template": "{question} {answer} {answer}"}, ValueError, r"behind its first {answer}, got {answer}"),
        (["a b"], {"template": "{prompt}{answer}{question}"}, ValueError, r"behind its first {answer}, got {question}"),
        (["a b"], {"max_length": 1}, ValueError, "`max_length` must be an integer of at least 2"),
        ([("What colour is the sky?", "blue")], {"max_length": 8}, ValueError, "`max_length` must leave room"),
        ([("What?", " ")], {}, ValueError, "An answer must have at least one token"),
        ([" "], {}, ValueError, "A text must have at least two tokens"),
        (["a b"], {"alternates": "refusals"}, ValueError, "plain text has no prompt"),
        ([("What?", "a")], {"alternates": "idk"}, ValueError, "`alternates` must be one of 'refusals'"),
        ([("What?", "a")], {"alternates": "perturbed"}, ValueError, "must stand beside each answer"),
        ([("What?", "a")], {"alternates": []}, TypeError, "`alternates` must be one of"),
        ([("What?", "a")], {"alternates": ["b", None]}, TypeError, r"`alternates\[1\]` must be a text.*, got None"),
        ([("What?", "a")], {"alternates": [[]]}, TypeError, r"`alternates\[0\]` must be a text.*, got \[\]"),
        ([("What?", "a")], {"alternates": [["b", 5]]}, TypeError, r"`alternates\[0\]` must be a text.*got list of int"),
        (TextStream(["a"], TextEncoder(tokenizer())), {}, TypeError, "held whole.*got a TextStream.*`text_examples`"),
        ([], {}, ValueError, "`forget` must hold at least one text"),
        ([([{"role": "user", "content": "What?"}], "a")], {}, ValueError, "needs a chat template"),
    ],
)
def test_what_cannot_be_encoded(data: Any, options: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        text_examples(tokenizer(), data, **options)


def test_tokenizers_that_cannot_serve() -> None:
    with pytest.raises(TypeError, match="`tokenizer` must be a tokenizer"):
        text_examples("gpt2", ["a b"])
    with pytest.raises(ValueError, match="padding or an EOS token"):
        text_examples(tokenizer(pad_token=None, eos_token=None), ["a b"])


def test_a_long_answer_is_cut_and_has_no_end() -> None:
    words = tokenizer()
    with pytest.warns(UserWarning, match="`max_length`: an answer does not fit into 9 tokens and is cut there"):
        row = TextEncoder(words, max_length=9).encode(TextExample("a b c d e", "What?"))[0]
    assert len(row["input_ids"]) == 9 and told(words, row["labels"]) == " a b"
