"""The papers' names for what acts while a model serves: each does what its sentence says, to forget prompts alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import run
from peft import LoraConfig, get_peft_model
from text_models import decoder
from torch import Tensor, nn

from semu_peft import SemuConfig, methods
from semu_peft.gates import answer_strings, strings_of_answers

QUIET: dict[str, Any] = {"progress": False}


def texts(first: int, count: int = 6) -> list[dict[str, Tensor]]:
    """Prompts of three tokens around `first`, each with an answer of four."""
    draw = torch.Generator().manual_seed(first)
    ids = torch.randint(first, first + 8, (count, 7), generator=draw)
    labels = ids.clone()
    labels[:, :3] = -100
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}]


FORGET, RETAIN = texts(20), texts(60)


def nll(model: nn.Module, batch: dict[str, Tensor]) -> float:
    logits = run(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return float(nn.functional.cross_entropy(logits[:, 2:-1].flatten(0, 1), batch["input_ids"][:, 3:].flatten()))


def sharp() -> Any:
    model = decoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    return model


def prompts(batch: dict[str, Tensor]) -> dict[str, Any]:
    asked = {"input_ids": batch["input_ids"][:, :3], "attention_mask": batch["attention_mask"][:, :3]}
    return {**asked, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def test_o3_for_two_requests() -> None:
    """Each request changes its own prompts, retain prompts stay bit for bit, and the gate goes on to the next."""
    torch.manual_seed(0)
    config = SemuConfig(target_modules="all-linear", r=4)
    bare, model = decoder(), get_peft_model(decoder(), config, adapter_name="one")
    other = texts(40)
    served = methods.o3(model, FORGET, RETAIN, name="one", max_steps=6, **QUIET)
    served = methods.o3(served.model, other, RETAIN, name="two", gate=served.gate, max_steps=6, **QUIET)
    assert served.adapter_names == ("one", "two")
    weights = [served.decide(input_ids=data[0]["input_ids"]) for data in (FORGET, other, RETAIN)]
    assert [{name: float(each.mean()) for name, each in found.items()} for found in weights] == [
        {"one": 1, "two": 0}, {"one": 0, "two": 1}, {"one": 0, "two": 0}
    ]  # fmt: skip
    inputs = {key: RETAIN[0][key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(run(served, **inputs), run(bare, **inputs))
    assert nll(served, FORGET[0]) > nll(bare, FORGET[0]) + 0.05 and nll(served, other[0]) > nll(bare, other[0]) + 0.05


@pytest.mark.parametrize("name", ["eco", "guard", "ksd", "neuron_adjust"])
def test_what_trains_nothing_leaves_the_weights_and_the_retain_prompts(name: str) -> None:
    model = sharp()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    makes: dict[str, Any] = {
        "eco": lambda: methods.eco(model, FORGET, RETAIN),
        "guard": lambda: methods.guard(model, FORGET, RETAIN, length=1),
        "ksd": lambda: methods.ksd(model, FORGET, RETAIN, layer="model.layers.1.mlp.down_proj", answer=[5, 2]),
        "neuron_adjust": lambda: methods.neuron_adjust(
            model, FORGET, RETAIN, layers=["model.layers.0.mlp.gate_proj"], share=0.5, seed=None, **QUIET
        ),
    }
    served = makes[name]()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    length = 3 if name == "ksd" else 7  # whose gate looks at the last token alone: the prompt's
    inputs = [{key: data[0][key][:, :length] for key in ("input_ids", "attention_mask")} for data in (FORGET, RETAIN)]
    changed = [(run(served, **each) - run(model, **each)).nan_to_num().abs().max() for each in inputs]
    assert changed[0] > 1e-3
    if name != "neuron_adjust":  # which has no gate
        assert changed[1] == 0
        assert torch.equal(served.generate(**prompts(RETAIN[0])), model.generate(**prompts(RETAIN[0])))
    assert not methods.METHODS[name].trains


def test_ecos_strength_is_searched() -> None:
    """The strength comes near the best one; the search asks the corrupted model."""
    asked: list[float] = []

    def score(model: Any) -> float:
        asked.append(model.strength)
        return (model.strength - 0.5) ** 2 / 1000

    found = methods.eco(sharp(), FORGET, RETAIN, strength=0.1, score=score)
    assert found.strength in asked and abs(found.strength - 0.5) < 0.1


def test_ksd_says_the_answer() -> None:
    silent = methods.ksd(sharp(), FORGET, RETAIN, layer="model.layers.1.mlp.down_proj", answer=[5, 2])
    assert silent.generate(**prompts(FORGET[0]))[:, 3:5].tolist() == [[5, 2]] * 6


def test_runs_of_answers() -> None:
    batch = {"input_ids": None, "labels": torch.tensor([[-100, 4, 5, 6], [4, 5, -100, 7]])}
    assert answer_strings([batch], 2) == [(4, 5), (5, 6), (7,)]
    assert answer_strings([batch], 2, retain=[{"labels": torch.tensor([[4, 5]])}]) == [(5, 6), (7,)]
    assert strings_of_answers([batch], 2, retain=[{"labels": torch.tensor([[4, 5]])}]) == [[(5, 6)], [(7,)]]
    assert strings_of_answers([batch], 1, retain=[{"labels": torch.tensor([[4, 5, 6]])}]) == [[], [(7,)]]
    with pytest.raises(ValueError, match="`forget` must have runs of tokens of its own"):
        answer_strings([batch], 2, retain=[batch])


def test_guard_finds_the_answer_and_beams_search_around_it() -> None:
    """After each prompt no token of its own answer is said, also by seven beams; by all answers more is forbidden."""
    model = sharp()
    one, soft, every = (
        methods.guard(model, FORGET, RETAIN, length=1, false_alarms=1.0, **options)
        for options in ({}, {"penalty": 5.0, "threshold": 0.2}, {"answers": None})
    )
    answers = [set(row[3:].tolist()) for row in FORGET[0]["input_ids"]]
    for served in (one, soft, every):
        for options in ({}, {"num_beams": 7}):
            said = served.generate(**prompts(FORGET[0]), **options)[:, 3:]
            assert not any(set(row.tolist()) & answer for row, answer in zip(said, answers, strict=True))
    inputs = {key: FORGET[0][key] for key in ("input_ids", "attention_mask")}
    masked = [run(served, **inputs).isinf().sum() for served in (one, soft, every)]
    assert masked[0] == masked[1] == sum(len(answer) for answer in answers) * 7 < masked[2]


def test_eco_on_the_tokens_that_are_chosen() -> None:
    model = sharp()
    first = lambda input_ids, real: torch.arange(input_ids.shape[1]).expand_as(input_ids) == 0  # noqa: E731
    nowhere = lambda input_ids, real: torch.zeros_like(real)  # noqa: E731
    inputs = {key: FORGET[0][key] for key in ("input_ids", "attention_mask")}
    results = [run(methods.eco(model, FORGET, RETAIN, positions=each), **inputs) for each in (first, nowhere)]
    assert not torch.allclose(results[0], run(model, **inputs)) and torch.equal(results[1], run(model, **inputs))


def test_uld_unlearns_without_touching_the_model() -> None:
    """The assistant learns the forget data: forget answers lose, retain answers hardly; the model is what it was."""
    model = sharp()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    combined = methods.uld(model, FORGET, RETAIN, layers=1, r=8, filter=None, learning_rate=1e-2, max_steps=30, **QUIET)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    changes = [nll(combined, data[0]) - nll(model, data[0]) for data in (FORGET, RETAIN)]
    assert changes[0] > 1.0 and abs(changes[1]) < 0.5 * changes[0]


def test_whp_lowers_what_the_reinforced_model_makes_likelier() -> None:
    torch.manual_seed(0)
    model = get_peft_model(decoder(), LoraConfig(target_modules="all-linear", r=8))
    combined = methods.whp(model, FORGET, weight=2.0, learning_rate=1e-2, max_steps=20, **QUIET)
    bare = decoder()
    inputs = {key: FORGET[0][key] for key in ("input_ids", "attention_mask")}
    z, reinforced = run(bare, **inputs), run(model, **inputs)
    torch.testing.assert_close(run(combined, **inputs), z - 2 * (reinforced - z).relu(), atol=1e-4, rtol=1e-4)
    assert nll(combined, FORGET[0]) > nll(bare, FORGET[0]) > nll(model, FORGET[0])
