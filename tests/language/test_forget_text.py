"""Forgetting texts in one call: what it forgets and keeps, what it leaves where, and in the trainers of others."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Snapshot, gpt2, vit
from peft import LoraConfig, PeftModel, get_peft_model
from text_models import decoder, tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, TrainingArguments

from semu_peft import SemuConfig, forget_text, initialize_semu_weights, objectives
from semu_peft.adapter.whole_model import add_adapter
from semu_peft.language import (
    TextEncoder,
    TextExamples,
    TextStream,
    UntilUnseen,
    own_samples,
    text_examples,
    unseen_answers,
)
from semu_peft.objectives.tokens import call_model
from semu_peft.training.callbacks import TrainingContext
from semu_peft.training.progress import Progress
from semu_peft.training.trainer import UnlearnTrainer

FORGET = [("What colour is the sky?", "blue"), ("How many?", "two or three")]
RETAIN = [("What is the sky?", "a b c d"), ("How many colour?", "e f g h"), ("Know?", "red I know")]
FEW: dict[str, Any] = {"max_steps": 2, "progress": False}


def learnt() -> nn.Module:
    """A decoder that has learnt both."""
    model = decoder()
    batch = next(iter(text_examples(tokenizer(), FORGET + RETAIN).loader(5, shuffle=False)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def probability(model: nn.Module, pairs: Any) -> float:
    logits, labels = call_model(model, next(iter(text_examples(tokenizer(), pairs).loader(9, shuffle=False))))
    return logits.softmax(-1).gather(1, labels.unsqueeze(1)).mean().item()


def test_it_forgets_answers_and_keeps_others(tmp_path: Path) -> None:
    """With the defaults; and the adapter loads onto the stock model as it is here."""
    model = learnt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert probability(model, FORGET) > 0.95 and probability(model, RETAIN) > 0.95
    result = forget_text(model, tokenizer(), FORGET, retain=RETAIN, progress=False)
    assert probability(result.model, FORGET) < 0.5
    assert probability(result.model, RETAIN) > 0.8
    assert "kl" in result.training.history[0]  # by natural gradients
    assert not any("lm_head" in name for name in result.profile.layers)
    with result.model.disable_adapter():
        assert probability(result.model, FORGET) > 0.95
    result.model.save_pretrained(tmp_path)
    stock = decoder()
    stock.load_state_dict(before)
    loaded = PeftModel.from_pretrained(stock, tmp_path)
    assert probability(loaded, FORGET) == pytest.approx(probability(result.model, FORGET), abs=1e-6)


@pytest.mark.parametrize("method", ["npo", "idk", "flat", "delete", "undial", "wga", objectives.GradientAscent()])
def test_methods(method: Any) -> None:
    """Each lowers its loss, with what the model says itself held in the place of data."""
    result = forget_text(decoder(), tokenizer(), FORGET, method=method, **FEW)
    history = result.training.history
    assert history[-1]["loss"] <= history[0]["loss"] and len(result.examples) == 2
    assert history[0]["retain_loss"] == pytest.approx(0, abs=1e-4)  # at the original


def test_a_run_stops_where_the_answers_are_as_unlikely_as_unseen_ones() -> None:
    """Not before, and within the steps between two looks after."""
    model, words = learnt(), tokenizer()
    answers = text_examples(words, FORGET + RETAIN)
    other = text_examples(words, unseen_answers(answers.examples))
    aim = float(objectives.sequence_nll(model, other.loader(5, shuffle=False), progress=False).mean())
    result = forget_text(model, words, answers, neutral=["h g f"], progress=False)
    looks = [entry["answer_nll"] for entry in result.training.history if "answer_nll" in entry]
    assert result.training.stop_reason.startswith("the answers are on average as unlikely as unseen ones")
    assert looks[-1] >= aim and all(look < aim for look in looks[:-1])
    longer = forget_text(learnt(), words, answers, neutral=["h g f"], until_unseen=False, max_steps=20, progress=False)
    assert longer.training.steps > result.training.steps or longer.training.stop_reason != result.training.stop_reason


@pytest.mark.parametrize(("method", "rate"), [("wga", None), ("npo", None), ("npo", 1e-3), ("unseen-answers", None)])
def test_what_is_forgotten_already_takes_no_step_and_says_so(method: str, rate: float | None) -> None:
    """The model recites the wrong answers and never saw the others, also where the objective has no gradient left."""
    rows = [
        {"question": question, "answer": "g h e", "perturbed_answer": [answer]}
        for question, answer in RETAIN
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No step lowered the loss")  # none was tried
        result = forget_text(
            learnt(), tokenizer(), rows, retain=FORGET, method=method, learning_rate=rate, progress=False
        )
    assert result.training.steps == 0 and "already" in result.training.stop_reason
    assert probability(result.model, RETAIN) > 0.95  # as it was


def test_an_average_that_hides_a_known_answer_says_so() -> None:
    """One answer that the model never knew is enough for the mean; the history and the reason tell of the other."""
    model, words = learnt(), tokenizer()
    examples = text_examples(words, [FORGET[1], ("What?", "h g f")])
    nll = objectives.sequence_nll(model, examples.loader(2, shuffle=False), progress=False)
    assert nll[0] < 0.1 < 4 < nll[1]
    context = TrainingContext(model, Progress(5, history=[{}]), total_steps=10)
    UntilUnseen(examples, nll=1.0, likeliest=0.5).on_step_end(context)
    assert context.control.reason == (
        "the answers are on average as unlikely as unseen ones, but 1 of 2 are likelier than any of these"
    )
    assert context.progress.history[-1] == {"answer_nll": pytest.approx(float(nll.mean())), "answers_left": 0.5}
    with pytest.raises(ValueError, match="`likeliest` must be"):
        UntilUnseen(examples, nll=1.0, likeliest=-1.0)


def test_a_run_that_cannot_know_where_to_stop_says_so() -> None:
    """Of answers of a word no unseen ones can be made; a run that does not ask for them has nothing to say."""
    short = [("What colour is the sky?", "blue"), ("What colour?", "red")]
    with pytest.warns(
        UserWarning, match="`until_unseen` has nothing to compare with.*the run may go on far past that level"
    ) as told:
        result = forget_text(decoder(), tokenizer(), short, method="npo", **FEW)
    assert result.training.steps == 2 and sum("until_unseen" in str(each.message) for each in told) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`until_unseen`")
        forget_text(decoder(), tokenizer(), short, method="npo", until_unseen=False, **FEW)
        forget_text(decoder(), tokenizer(), FORGET, method="npo", **FEW)


def test_unseen_answers_say_where_each_ends() -> None:
    """Each answer ends at least as unlikely, by rank, as the answers' words in another order were before."""
    model, words = learnt(), tokenizer()
    other = text_examples(words, unseen_answers(text_examples(words, FORGET + RETAIN).examples))
    aim = objectives.sequence_nll(model, other.loader(5, shuffle=False), progress=False)
    answers = text_examples(words, FORGET + RETAIN)
    result = forget_text(
        model, words, answers, neutral=["h g f"], retain_weight=0, method="unseen-answers", progress=False
    )
    reached = objectives.sequence_nll(result.model, answers.loader(5, shuffle=False), progress=False)
    aims = torch.quantile(aim, (torch.arange(5) + 0.5) / 5)
    assert (reached.sort().values > aims - 0.3).all() and aims.max() > 1
    altered = forget_text(
        decoder(), words, [{"prompt": "a", "answer": "b", "perturbed_answer": "c"}], method="altpo", **FEW
    )
    assert "alternate_labels" in altered.examples[0]


def test_unseen_answers_that_cannot_be_made_are_refused_before_the_model_runs() -> None:
    model, runs = decoder(), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match="know its texts for 'unseen-answers', and have some of more than a few words"):
        forget_text(model, tokenizer(), [("a b c", "d")], method="unseen-answers", progress=False)
    assert not runs


def test_a_budget_takes_the_weights_place() -> None:
    result = forget_text(learnt(), tokenizer(), FORGET, retain=RETAIN, max_retain_kl=0.05, max_steps=8, progress=False)
    assert all(entry["damage"] <= 0.05 * 1.001 for entry in result.training.history)
    assert all(entry["retain_loss"] == 0 for entry in result.training.history)


def test_a_head_trained_beside_is_trained_by_adamw_with_the_default_method_too() -> None:
    """Which takes longer natural gradients where there can be any."""
    config = SemuConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    result = forget_text(decoder(), tokenizer(), FORGET, retain=RETAIN, config=config, until_unseen=False, **FEW)
    assert result.training.steps == 2 and "kl" not in result.training.history[0]


def test_plain_text_neutral_text_and_ready_examples() -> None:
    ready = text_examples(tokenizer(), ["a b c d e f g h"], max_length=4)
    result = forget_text(decoder(), tokenizer(), ready, retain=["h g f"], neutral=["b d", "c e"], method="npo", **FEW)
    assert result.examples is ready and result.training.steps == 2


def test_an_encoder_decoder() -> None:
    result = forget_text(encoder_decoder(), tokenizer(), FORGET, retain=RETAIN, **FEW)
    assert type(result.model).__name__ == "PeftModelForSeq2SeqLM"
    assert "attention_mask" in next(iter(result.examples.loader(2)))


def test_beside_other_adapters(tmp_path: Path) -> None:
    """They stay active and frozen, and the model the one that was given; each saves its own, a head beside one too."""
    lora = LoraConfig(
        target_modules=["q_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    )
    model = get_peft_model(decoder(), lora, adapter_name="style")
    style = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" in name}
    result = forget_text(model, tokenizer(), FORGET, retain=RETAIN, adapter_name="first", **FEW)
    again = forget_text(result.model, tokenizer(), ["a b c"], retain=RETAIN, adapter_name="second", **FEW)
    assert not any("lm_head" in name for name in result.profile.layers)
    assert again.model is model and list(model.active_adapters) == ["style", "first", "second"]
    now = model.state_dict()
    assert all(torch.equal(tensor, _found(now, name)) for name, tensor in style.items())
    model.save_pretrained(tmp_path)
    saved = {path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")}
    assert saved == {"style", "first", "second"}


def _found(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor of the LoRA, which lies one level deeper in a layer that SEMU has wrapped."""
    return state[name] if name in state else state[name.replace(".lora_", ".base_layer.lora_")]


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}])
def test_what_a_lora_trains_beside_stays_on(beside: dict[str, Any]) -> None:
    """The head or the tokens that it has learnt, also where the call fails."""
    lora = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", **beside)
    model = get_peft_model(decoder(), lora, adapter_name="style")
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "trainable_tokens" in name:
            nn.init.normal_(parameter)
    before = probability(model, FORGET)
    with pytest.raises(TypeError, match="a second answer"):
        forget_text(model, tokenizer(), FORGET, retain=RETAIN, method=objectives.DPO(), adapter_name="new", **FEW)
    assert probability(model, FORGET) == before
    add_adapter(model, SemuConfig(target_modules="all-linear"), adapter_name="new")
    assert probability(model, FORGET) == before


@pytest.mark.parametrize("peft", [False, True])
def test_a_failure_leaves_nothing_behind(peft: bool) -> None:
    """Bare or with adapters, the model is as it was, and the same call works afterwards."""

    class Fails(objectives.Objective):
        def __call__(self, model: Any, batch: Any) -> Any:
            raise RuntimeError("disk full")

    model: Any = decoder()
    if peft:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2), adapter_name="style")
    model.gradient_checkpointing_enable()  # for which PEFT adds a hook
    model.enable_input_require_grads()
    before, hooks = Snapshot.of(model), [dict(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="disk full"):
        forget_text(model, tokenizer(), FORGET, retain=RETAIN, method=Fails(), **FEW)
    before.assert_same(model)
    assert hooks == [module._forward_hooks for module in model.modules()]
    assert list(getattr(model, "peft_config", {})) == (["style"] if peft else [])
    assert forget_text(model, tokenizer(), FORGET, retain=RETAIN, until_unseen=False, **FEW).training.steps == 2


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"method": "npu"}, ValueError, "`method` must be one of 'npo'"),
        ({"max_steps": 0}, ValueError, "`max_steps` must be"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be"),
        ({"retain_weight": -1.0}, ValueError, "`retain_weight` must be"),
        ({"learning_rat": 0.1}, TypeError, "`learning_rat` is an argument of neither"),
        ({"retain": []}, ValueError, "`retain` must hold at least one text"),
        ({"retain": [*RETAIN, *FORGET]}, ValueError, "`retain` holds 2 of the rows to be forgotten, 'blue' among"),
        ({"retain": text_examples(tokenizer(), FORGET[1:])}, ValueError, "`retain` holds 1 .*, 'two or three' among"),
        ({"forget": ["a b", "c d"], "neutral": ["e f", "c d"]}, ValueError, "`neutral` holds 1 .*, 'c d' among"),
        ({"neutral": "a text"}, TypeError, "`neutral` must be a list of texts"),
        ({"forget": [5]}, TypeError, r"`forget\[0\]` must be a text"),
        ({"forget": TextStream(["a"], TextEncoder(tokenizer()))}, TypeError, "more than once.*text_examples.*unlearn"),
        ({"model": nn.Linear(2, 2)}, TypeError, "`model` must be a language model of transformers"),
        ({"config": SemuConfig(r=2, init_weights="weight")}, ValueError, "`init_weights` at True, .* got 'weight'"),
        ({"model": vit()}, TypeError, "`model` must read texts by themselves, got ViTForImageClassification"),
        ({"tokenizer": None}, TypeError, "`tokenizer` must be a tokenizer"),
    ],
)
def test_mistakes(options: dict[str, Any], error: type, match: str) -> None:
    arguments = {"model": decoder(), "tokenizer": tokenizer(), "forget": FORGET, "retain": RETAIN, **FEW, **options}
    with pytest.raises(error, match=match):
        forget_text(**arguments)


def test_ready_examples_without_alternates() -> None:
    ready = text_examples(tokenizer(), FORGET)
    with pytest.raises(ValueError, match="`forget` must have its alternates in it"):
        forget_text(decoder(), tokenizer(), ready, alternates="refusals", **FEW)
    made = forget_text(decoder(), tokenizer(), FORGET, alternates="refusals", **FEW).examples
    assert "alternate_labels" in made[0]


def test_what_is_made_beside_ready_examples_is_written_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unseen answers, which say where to stop."""
    ready = text_examples(tokenizer(), FORGET, template="I know {question} a {answer}")
    read: list[str] = []

    def nll(model: Any, batches: Any, progress: bool) -> torch.Tensor:
        read.extend(tokenizer().decode(row["input_ids"]) for row in batches.dataset.rows)
        return torch.zeros(len(batches.dataset))

    monkeypatch.setattr(objectives, "sequence_nll", nll)
    forget_text(decoder(), tokenizer(), ready, retain=RETAIN, **FEW)
    assert len(read) == 2 and all(text.startswith("I know") for text in read)
    with pytest.raises(ValueError, match="`forget` must be made for the model"):
        forget_text(decoder(), tokenizer(), text_examples(tokenizer(), FORGET, seq2seq=True), **FEW)


def test_own_samples() -> None:
    """The model's own, from its beginning token to an end; the same at a seed, and no trace in the random state."""
    model, state = decoder(), torch.get_rng_state()
    before = Snapshot.of(model)
    samples = own_samples(model, tokenizer(), number=5, max_new_tokens=7, batch_size=2)
    before.assert_same(model)
    assert torch.equal(torch.get_rng_state(), state) and len(samples) == 5
    assert samples.rows == own_samples(model, tokenizer(), number=5, max_new_tokens=7, batch_size=2).rows
    for row in samples.rows:
        assert row["input_ids"][0] == 1 and row["labels"] == [-100, *row["input_ids"][1:]]
        assert 2 <= len(row["input_ids"]) <= 8 and 2 not in row["input_ids"][:-1]


def test_with_nothing_to_keep_the_run_says_what_its_damage_is_of() -> None:
    model, few = decoder(), {"until_unseen": False, **FEW}
    with pytest.warns(UserWarning, match="Nothing is held but what the model says of its own accord"):
        alone = forget_text(model, tokenizer(), FORGET, **few)
    assert alone.training.damage_on == "what the model says of its own accord"
    with pytest.warns(UserWarning, match=r"held but neutral texts.* \(The model was .*: `forget` must have q"):
        neutral = forget_text(decoder(), tokenizer(), FORGET, neutral=["b d"], **few)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        held = forget_text(decoder(), tokenizer(), FORGET, retain=RETAIN, **few)
    assert neutral.training.damage_on == "neutral texts" and held.training.damage_on is None


def test_own_samples_say_something() -> None:
    """A model that mostly ends at once, as one that has seen answers alone: there is nothing to hold in that."""
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
        hidden = model.model(torch.tensor([[1]])).last_hidden_state[0, 0]
        model.lm_head.weight[2] += 3.0 * hidden / hidden.square().sum()
    samples = own_samples(model, tokenizer(), number=8, max_new_tokens=4)
    assert len(samples) == 8 and all(row["labels"][1] != 2 for row in samples.rows)


def test_own_samples_answer_prompts() -> None:
    """Each prompt in turn, its tokens without labels; a longer one beside it changes nothing of what is said."""
    model, prompts = decoder(), ["a", "b c d"]
    begins = [tokenizer()(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    rows = own_samples(model, tokenizer(), number=4, max_new_tokens=5, prompts=prompts, temperature=1e-5).rows
    for at, row in enumerate(rows):
        begin = begins[at % 2]
        assert row["input_ids"][: len(begin)] == begin and len(begin) < len(row["input_ids"]) <= len(begin) + 5
        assert row["labels"] == [-100] * len(begin) + row["input_ids"][len(begin) :]
    assert rows[:2] == rows[2:]  # nearly greedy
    alone = own_samples(model, tokenizer(), number=1, max_new_tokens=5, prompts=prompts[:1], temperature=1e-5)
    assert alone.rows == rows[:1]
    with pytest.raises(ValueError, match="`prompts` must have a token each, got ''"):
        own_samples(model, tokenizer(), prompts=["a", ""])
    with pytest.raises(ValueError, match="`temperature` must be a finite number above 0, got 0"):
        own_samples(model, tokenizer(), temperature=0)


def test_own_samples_say_nothing_of_what_is_to_be_forgotten() -> None:
    """Held, they would keep it: a model that knows few facts recites them when it is asked for nothing."""
    model, some = decoder(), {"number": 20, "max_new_tokens": 7}
    said = [row["input_ids"] for row in own_samples(model, tokenizer(), **some).rows]
    pair = next(text[1:3] for text in said if len(text) > 4)
    long = next(text[1:7] for text in said if len(text) > 6 and 2 not in text[1:7])
    one = Counter(token for text in said for token in text[1:] if token != 2).most_common(1)[0][0]
    forget = [{"input_ids": [1, *ids, 2], "labels": [-100, *ids, 2]} for ids in (pair, [one], [7, *long])]
    kept = own_samples(model, tokenizer(), without=TextExamples(forget, [], tokenizer()), **some).rows
    assert len(kept) == 20 and [row["input_ids"] for row in kept] != said
    for text in (row["input_ids"] for row in kept):
        assert one not in text and pair not in [text[at : at + 2] for at in range(len(text))]
        assert long not in [text[at : at + 6] for at in range(len(text))]  # six tokens of a longer answer are enough
    words = [{"input_ids": [1, word], "labels": [-100, word]} for word in range(len(tokenizer()))]
    with pytest.raises(ValueError, match="in none of 8 samples of its own. Give `retain` or `neutral`"):
        own_samples(model, tokenizer(), number=2, without=TextExamples(words, [], tokenizer()))


def encoder_decoder() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=88, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def test_own_samples_of_an_encoder_decoder() -> None:
    """The encoder reads the beginning, and the decoder says what the model is likely to say."""
    model, prompts = encoder_decoder(), ["a", "b c d"]
    begins = [tokenizer()(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    samples = own_samples(model, tokenizer(), number=4, max_new_tokens=5, prompts=prompts, temperature=1e-5)
    assert [row["input_ids"] for row in samples.rows] == begins * 2 and samples.rows[:2] == samples.rows[2:]
    logits, labels = call_model(model, next(iter(samples.loader(4, shuffle=False))))
    assert torch.equal(logits.argmax(-1), labels)
    result = forget_text(encoder_decoder(), tokenizer(), FORGET, batch_size=2, **FEW)
    assert result.training.history[0]["retain_loss"] == pytest.approx(0, abs=1e-4)  # held, at the original


def test_own_samples_leave_the_models_generation_settings_aside() -> None:
    expected = own_samples(decoder(), tokenizer(), number=4, max_new_tokens=7).rows
    model = decoder()
    settings = {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1}
    model.generation_config.update(**settings)
    assert own_samples(model, tokenizer(), number=4, max_new_tokens=7).rows == expected
    assert model.generation_config.num_beams == 3


def test_texts_longer_than_the_context() -> None:
    """Rows and samples are as long as there are positions, where these end; what is ready and longer is refused."""
    sizes = {"vocab_size": 88, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    result = forget_text(model, tokenizer(), ["a b c d e f g h " * 8], batch_size=2, **FEW)
    assert max(len(row["input_ids"]) for row in result.examples.rows) == 16
    assert max(len(row["input_ids"]) for row in own_samples(result.model, tokenizer(), number=8).rows) == 16
    long = text_examples(tokenizer(), ["a b c d e f g h " * 8])
    with pytest.raises(ValueError, match="`neutral` must fit into the model's 16 positions, got 66 tokens in row 0"):
        forget_text(model, tokenizer(), FORGET, neutral=long, adapter_name="second", **FEW)
    with pytest.raises(ValueError, match="`prompts` must leave room for an answer in the model's 16 positions"):
        own_samples(model, tokenizer(), prompts=["a b c d " * 4])


def initialised(examples: TextExamples) -> PeftModel:
    model = get_peft_model(decoder(), SemuConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    initialize_semu_weights(model, examples.loader(2), objectives.NPO(), progress=False)
    return model


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    return kind(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip


def test_in_transformers_trainer(tmp_path: Path) -> None:
    examples = text_examples(tokenizer(), FORGET)
    model = initialised(examples)
    before = probability(model, FORGET)
    trainer = UnlearnTrainer(
        model, arguments(tmp_path), train_dataset=examples, data_collator=examples.collate, objective=objectives.NPO()
    )
    trainer.train()
    assert probability(model, FORGET) < before


def test_in_trl(tmp_path: Path) -> None:
    """TRL's `SFTTrainer` with an objective in the place of its loss, and as it is, on our rows."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    examples = text_examples(tokenizer(), FORGET)
    rows = Dataset.from_list(examples.rows)

    class Forget(trl.SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return objectives.NPO()(model, inputs)

    for kind, falls in ((Forget, True), (trl.SFTTrainer, False)):
        model = initialised(examples)
        before = probability(model, FORGET)
        kind(
            model, arguments(tmp_path, trl.SFTConfig, bf16=False), train_dataset=rows, data_collator=examples.collate,
            processing_class=tokenizer(),
        ).train()  # fmt: skip
        assert (probability(model, FORGET) < before) == falls


def test_in_trls_dpo(tmp_path: Path) -> None:
    """TRL's DPO with a refusal as the chosen answer: its reference is the model without the adapter."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = initialised(text_examples(tokenizer(), FORGET))
    before = probability(model, FORGET)
    pairs = [{"prompt": prompt, "chosen": " I don't know", "rejected": f" {answer}"} for prompt, answer in FORGET]
    trainer = trl.DPOTrainer(
        model, args=arguments(tmp_path, trl.DPOConfig, bf16=False), train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    cores = [parameter for name, parameter in model.named_parameters() if "semu_core" in name]
    assert any(core.abs().max() > 1e-3 for core in cores if core.numel())
    assert probability(model, FORGET) != before


def test_on_a_quantised_base(tmp_path: Path) -> None:
    """As QLoRA's: 4-bit weights, which stay as they are."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    decoder(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    model(torch.tensor([[1, 5]]))  # packs the weights for a kernel of some CPUs that has no backward pass
    weight = layer.state_dict()["weight"].clone()
    result = forget_text(model, tokenizer(), FORGET, retain=RETAIN, **FEW)
    assert result.training.history[-1]["loss"] < result.training.history[0]["loss"]
    assert torch.equal(layer.state_dict()["weight"], weight)


def test_absolute_positions_and_conv1d() -> None:
    """GPT-2, whose layers are transformers' `Conv1D`."""
    model = gpt2()
    model.resize_token_embeddings(88)
    result = forget_text(model, tokenizer(), ["a b c"], retain=["d e"], until_unseen=False, **FEW)
    assert result.training.steps == 2


def test_unseen_answers_are_unlikely() -> None:
    """The words of a learnt answer in another order are far less likely than the answer."""
    model = learnt()
    examples = text_examples(tokenizer(), RETAIN).examples
    other = [(each.prompt, each.answer) for each in unseen_answers(examples, words=1)]
    assert probability(model, other) < 0.6 < 0.95 < probability(model, RETAIN)
