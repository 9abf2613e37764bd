"""How far a model moved on neutral text, and how it writes."""

from __future__ import annotations

import pytest
import torch
from answer_models import WORDS, decoder, word_tokenizer
from peft import LoraConfig, get_peft_model

from semu_peft.evaluation import fluency, neutral_kl, ngram_entropy

TEXTS = ["Ada lives in Rome", "the Paris of Eve in Oslo wrote", "Bob it"]


def adapted():
    torch.manual_seed(1)
    return get_peft_model(decoder(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False))


def test_kl_is_the_mean_over_tokens_of_the_dense_formula() -> None:
    model = adapted()
    values = []
    for text in TEXTS:
        ids = torch.tensor([[*(WORDS.index(word) for word in text.split()), 2]])
        with torch.no_grad():
            after = model(ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                before = model(ids).logits[0, :-1].double().log_softmax(-1)
        values.append((before.exp() * (before - after)).sum(-1))
    expected = torch.cat(values)
    for batch_size in (1, 3):
        drift = neutral_kl(model, word_tokenizer(), TEXTS, batch_size=batch_size, progress=False)
        assert drift.kl == pytest.approx(expected.mean().item(), rel=1e-4)
        assert drift.largest == pytest.approx(expected.max().item(), rel=1e-4)
        assert drift.tokens == len(expected)


def test_kl_to_a_given_reference_and_to_itself() -> None:
    model, other = decoder(seed=0), decoder(seed=1)
    apart = neutral_kl(model, word_tokenizer(), TEXTS, reference=other, progress=False)
    assert apart.kl > 0.01
    assert neutral_kl(model, word_tokenizer(), TEXTS, reference=decoder(seed=0), progress=False).kl < 1e-6
    # KL(original ‖ now) is not KL(now ‖ original).
    assert neutral_kl(other, word_tokenizer(), TEXTS, reference=model, progress=False).kl != pytest.approx(apart.kl)


def test_fluency_by_hand() -> None:
    assert ngram_entropy("a b a b a b", 2) == pytest.approx(0.971, abs=5e-4)
    assert ngram_entropy("a b a b a b", 3) == 1.0
    assert ngram_entropy("a", 2) == 0.0
    assert fluency(["a b a b a b", "a a a a"]) == pytest.approx((0.970951 + 2) / 3 / 2, abs=1e-5)
    assert fluency(["a b a b a b"], {2: 1.0}) == pytest.approx(0.971, abs=5e-4)


def test_mistakes_of_drift() -> None:
    with pytest.raises(ValueError, match="no PEFT adapter"):
        neutral_kl(decoder(), word_tokenizer(), TEXTS, progress=False)
    with pytest.raises(ValueError, match="`texts` must hold at least one text"):
        neutral_kl(adapted(), word_tokenizer(), [], progress=False)
    with pytest.raises(ValueError, match="`texts` must be a list of at least one text"):
        fluency([])
