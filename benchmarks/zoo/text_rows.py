"""The methods for language models, each with the settings that it may be given, on the case that they are run on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import damage
from rows import Outcome, Row, Settings, carried, edited, size_of
from subjects import Subject
from torch import nn

from semu_peft import methods
from semu_peft.language import TextExamples, unseen_answers
from semu_peft.language.shapes import as_example
from semu_peft.objectives import NPO

LINEAR = r".*\.(q|k|v|o|gate|up|down)_proj"
PROJECTIONS = [f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")]
MLP = r".*\.mlp\..*_proj"
BATCH_SIZE = 25
REPEATS = 4  # of RepSelect's one step, at most: until the budget of damage is spent
ALTERNATES = ("dpo", "flat")


@dataclass(frozen=True)
class TextCase:
    """One request: the answers of some authors, the original model and the one that never saw them.

    It has what `rows.py` asks of a case.

    Attributes:
        name: What it is called.
        subject: The texts, with the answers to forget and the retain answers of this case.
        original: The model before.
        gold: The model that never saw the answers to forget.
        steps: Of methods that train.
        seed: Of orders and adapters.
    """

    name: str
    subject: Subject
    original: nn.Module
    gold: nn.Module
    steps: int
    seed: int = 0
    targets: str = LINEAR

    @property
    def forget(self) -> TextExamples:
        return self.subject.examples(self.subject.forget)

    @property
    def retain(self) -> TextExamples:
        return self.subject.examples(self.subject.retain)

    def batches(self, examples: TextExamples) -> list[Any]:
        """In an order that the seed fixes."""
        torch.manual_seed(self.seed)
        return list(examples.loader(BATCH_SIZE, seed=self.seed))

    def with_alternates(self) -> TextExamples:
        """The answers to forget, beside refusals."""
        return self.subject.examples(self.subject.forget, "refusals")

    def unseen(self) -> TextExamples:
        """Answers that nobody taught the model."""
        made = unseen_answers([as_example(row) for row in self.subject.forget], seed=self.seed)
        return self.subject.examples(made)


def trained(name: str, carrier: str, *, retain: bool = True, **fixed: Any) -> Callable[[TextCase, Settings], Outcome]:
    """A method by training; what it asks for by name (a reference, unseen answers, a limit) it is given."""
    function = getattr(methods, name)

    def run(case: TextCase, settings: Settings) -> Outcome:
        said = {"max_steps": case.steps, "epochs": case.steps, **fixed, **settings}
        model = carried(case, carrier, said.pop("explained_variance", 0.5))  # type: ignore[arg-type]
        kept = (case.batches(case.retain),) if retain else ()
        forget = case.batches(case.with_alternates() if name in ALTERNATES else case.forget)
        said.update(_asked(function, case, carrier == "all weights", said))
        result = function(model, forget, *kept, progress=False, **said)
        return Outcome(model, result.trainable_parameters, size_of(model))

    return run


def _asked(function: Any, case: TextCase, is_bare: bool, said: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    found: dict[str, Any] = {}
    reference = copy.deepcopy(case.original).requires_grad_(False) if is_bare else None
    if "reference" in known:
        found["reference"] = reference
    if "objective" in known and is_bare and function is not methods.cir:
        found["objective"] = NPO(reference=reference)
    if "unseen" in known:
        found["unseen"] = case.batches(case.unseen())
    if "limit" in known:
        found["limit"] = case.subject.retain_limit(case.original)
    if "targets" in known:
        found["targets"] = PROJECTIONS
    return {key: value for key, value in found.items() if key not in said}


def repselect(case: TextCase, settings: Settings) -> Outcome:
    """Its one step again and again while the damage on neutral text is within the authors' 0.01 nats."""
    model = copy.deepcopy(case.original)
    last = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(REPEATS):
        methods.repselect(model, case.batches(case.forget), target_modules=MLP, rank=64, progress=False, **settings)
        if damage(case.subject, case.original, model) > 0.01:
            model.load_state_dict(last)
            break
        last = {name: value.clone() for name, value in model.state_dict().items()}
    return Outcome(model, sum(weight.numel() for weight in model.parameters()), size_of(model))


def slug(case: TextCase, settings: Settings) -> Outcome:
    """One layer, one direction; scored by what the answers to keep are likelier than those to forget."""
    model, few = copy.deepcopy(case.original), case.subject
    kept = [(row["question"], row["answer"]) for row in few.retain[:25]]
    gone = few.told[:25]

    def score(candidate: nn.Module) -> float:
        return float(few.nll(candidate, kept).neg().exp().mean() - few.nll(candidate, gone).neg().exp().mean())

    methods.slug(model, case.batches(case.forget), case.batches(case.retain), score=score, progress=False, **settings)
    return Outcome(model, 0, size_of(model))


def chip(case: TextCase, settings: Settings) -> Outcome:
    model = copy.deepcopy(case.original)
    layers = [name for name, _ in model.named_modules() if name.endswith("down_proj")]
    methods.chip(model, case.batches(case.forget), case.batches(case.retain), layers=layers, progress=False, **settings)
    return Outcome(model, 0, size_of(model))


BUDGET = 0.01  # nats a token on retain answers
SHARES_OF_TEXT: list[Settings] = [{"explained_variance": share} for share in (0.5, 0.9)]
RATES: list[Settings] = [{"learning_rate": rate} for rate in (1e-3, 3e-4, 1e-4)]
WEIGHTS: list[Settings] = [{"retain_weight": weight} for weight in (1.0, 10.0, 100.0)]
LORA_RATES: list[Settings] = [{"learning_rate": rate} for rate in (1e-2, 3e-3)]
ON_SEMU = (
    "npo", "simnpo", "dpo", "flat", "tpo", "undial", "ceu", "wga", "satimp", "unseen_answers", "delete", "gu",
    "npo_sam", "cir", "pdu", "lora_sb", "loku",
)  # fmt: skip
ON_WEIGHTS = (
    "npo", "simnpo", "dpo", "flat", "tpo", "undial", "ceu", "wga", "satimp", "unseen_answers", "delete", "gu",
    "npo_sam", "cir", "wagle", "pdu", "neg_grad_plus", "fine_tune",
)  # fmt: skip
LEFT_OUT = {
    "k_fade": "an embedding has no such curvature, so that it moves the other layers alone",
    "acu": "it needs a ridge head", "rocr": "it redirects one subject, by keys and values", "seuf": "no experts here",
    "needle, tars": "they take out one concept, whose column or word has to be known",
    "siu, safe_eraser": "new answers about images, or harmless ones beside them", "repair": "it comes behind another",
    "o3, eco, guard, ksd, neuron_adjust, uld, whp": "gates, which leave the weights as they are",
}  # fmt: skip


def text_rows() -> list[Row]:
    """All of them; without natural gradients, which need no rate, three rates to choose from."""
    few = [{"threshold": value} for value in (2.0, 5.0, 10.0)]
    found = [Row(f"{name}, SEMU", trained(name, "SEMU"), SHARES_OF_TEXT) for name in ON_SEMU]
    found += [Row(f"{name}, all weights", trained(name, "all weights"), RATES) for name in ON_WEIGHTS]
    found += [Row(f"{name}, LoRA", trained(name, "LoRA"), LORA_RATES) for name in ("npo", "delete")]
    return [
        *found,
        Row("npo without retain data, SEMU", trained("npo", "SEMU", retain=False), SHARES_OF_TEXT),
        Row("npo within the budget, SEMU", trained("npo", "SEMU", max_retain_kl=BUDGET), SHARES_OF_TEXT),
        Row("gradient ascent, all weights", trained("neg_grad_plus", "all weights", retain=False), RATES),
        Row("rmu, SEMU", trained("rmu", "SEMU", layer=2, coefficient=None), WEIGHTS),
        Row("rmu without retain data, all weights", trained("rmu", "all weights", retain=False, layer=2), RATES),
        Row("lat, SEMU", trained("lat", "SEMU", layer=2), SHARES_OF_TEXT),
        Row("lat, all weights", trained("lat", "all weights", layer=2), RATES),
        Row("sha256, SEMU of its own", trained("sha256", "none", first=2)),
        Row("repselect, all weights", repselect, [{"learning_rate": rate} for rate in (10.0, 3.0, 1.0)]),
        Row("slug", slug, [{"layer": None}]),
        Row("chip", chip, [{"explained_variance": share} for share in (0.95, 0.5)]),
        Row("ssd", edited("ssd"), few),
        Row("lfssd", edited("lfssd"), few),
        Row("iau", edited("iau"), [{"step_size": value} for value in (0.3, 1.0, 3.0)]),
    ]  # fmt: skip


__all__ = ["BUDGET", "LEFT_OUT", "TextCase", "text_rows"]
