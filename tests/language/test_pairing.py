"""Forget and retain examples in pairs: nothing twice before all have come, and the same after a resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from peft import get_peft_model
from text_models import decoder, tokenizer
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.language import ForgetRetainPairs, Part, text_examples
from semu_peft.objectives import CrossEntropy, DecoupledDistillation, RandomLabel
from semu_peft.training.trainer import UnlearnTrainer


def indices(pairs: ForgetRetainPairs, epochs: int) -> list[int]:
    found = []
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        found += [pairs.retain_index(index) for index in range(len(pairs))]
    return found


@pytest.mark.parametrize("forget, retain", [(3, 7), (7, 3), (4, 4)])
def test_no_retain_example_comes_again_before_all_have_come(forget: int, retain: int) -> None:
    """In every stretch of as many pairs as there are retain examples, from the first on, each comes once."""
    found = indices(ForgetRetainPairs(range(forget), range(retain)), retain)
    for start in range(0, len(found), retain):
        assert sorted(found[start : start + retain]) == list(range(retain))
    assert found[:retain] != found[retain : 2 * retain]
    assert max(Counter(found).values()) - min(Counter(found).values()) == 0


def test_a_pair_depends_on_seed_epoch_and_index_alone() -> None:
    first, again = (ForgetRetainPairs(range(5), range(9), seed=3) for _ in range(2))
    expected = indices(first, 4)
    again.set_epoch(3)
    assert [again.retain_index(index) for index in (4, 0, 2)] == [expected[15 + index] for index in (4, 0, 2)]
    assert expected != indices(ForgetRetainPairs(range(5), range(9), seed=4), 4)


def test_a_sum_with_an_objective_for_each_part() -> None:
    """It is what `retain=` does: the same losses, trained by natural gradients as well; draws are saved."""
    forget, retain = vector_batches(2), vector_batches(2, seed=5)
    loss = Part("forget", DecoupledDistillation()) + 2 * Part("retain", CrossEntropy())
    batches = [{"forget": one, "retain": other} for one, other in zip(forget, retain, strict=True)]
    torch.manual_seed(0)
    model = get_peft_model(Mlp().eval(), SemuConfig(target_modules=Mlp.targets))
    initialize_semu_weights(model, batches, loss, progress=False)
    expected = DecoupledDistillation()(model, forget[0]) + 2 * CrossEntropy()(model, retain[0])
    torch.testing.assert_close(loss(model, batches[0]), expected)
    assert loss.distribution == "categorical" and loss.minimum == 0
    result = unlearn(model, batches, loss, max_steps=2, progress=False)
    assert "kl" in result.history[0] and result.history[-1]["loss"] < result.history[0]["loss"]
    drawn = Part("forget", RandomLabel())
    state, first = drawn.state_dict(), drawn(model, batches[0])
    drawn.load_state_dict(state)
    assert torch.equal(drawn(model, batches[0]), first)


def test_in_the_trainer(tmp_path: Path) -> None:
    """Shuffled by its sampler over two epochs, each retain example comes before any comes again."""
    words, seen = tokenizer(), []
    forget = text_examples(words, [("What?", word) for word in "abc"])
    retain = text_examples(words, [("How?", word) for word in "abcdef"])
    pairs = ForgetRetainPairs(forget, retain)

    def loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        seen.extend(batch["retain"]["labels"].max(1).values.tolist())
        return CrossEntropy()(model, batch["retain"]) - 0.1 * CrossEntropy()(model, batch["forget"])

    model = get_peft_model(decoder(), SemuConfig(target_modules=["q_proj"], r=2, init_weights=False))
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=1, report_to="none", use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    trainer = UnlearnTrainer(model, args, train_dataset=pairs, data_collator=pairs.collate, objective=loss)
    trainer.train()
    assert len(seen) == len(set(seen)) == 6


def test_batches_of_pairs() -> None:
    words = tokenizer()
    pairs = ForgetRetainPairs(text_examples(words, [("What?", "a"), ("What?", "a b c")]), text_examples(words, ["d e"]))
    batch = next(iter(DataLoader(pairs, batch_size=2, collate_fn=pairs.collate)))
    assert batch["forget"]["labels"].shape[0] == batch["retain"]["labels"].shape[0] == 2
    assert batch["retain"]["input_ids"].shape[1] < batch["forget"]["input_ids"].shape[1]


def test_what_cannot_be_paired() -> None:
    with pytest.raises(TypeError, match="`forget` must be a data set with a length"):
        ForgetRetainPairs(iter([1]), [1])
    with pytest.raises(ValueError, match="`retain` must hold at least one example"):
        ForgetRetainPairs([1], [])
