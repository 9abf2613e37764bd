"""The methods of the table, each with the settings that it may be given; `methods` says what they are."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from protocol import Case, accuracy, fresh
from safetensors.torch import save_file
from torch import nn

from semu_peft import SemuConfig, methods
from semu_peft.adapter.whole_model import merge_and_remove
from semu_peft.edits import Edit
from semu_peft.objectives import DecoupledDistillation, adversarial_examples

Settings = Mapping[str, Any]
GATHERED = 80  # batches that edits and passes take, at most: some go example by example
COMPARES = ("delete", "scrub", "bad_teacher", "boundary_shrink", "laf")

LEFT_OUT = {
    "unseen_confidence": "it is for random examples, in benchmarks/cifar10",
    "dmm": "it is given the logits of retrained models, and what they say is what is to be found",
    "acu": "it needs a ridge head over frozen features", "repair": "it comes behind another method",
    "lat": "it is among the methods for text", "o3": "a gate, which leaves the weights as they are",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method on a carrier, and the settings to choose from on one case.

    Attributes:
        name: What the table calls it.
        run: `(case, settings) -> Outcome`.
        grid: The settings.
    """

    name: str
    run: Callable[[Case, Settings], Outcome]
    grid: list[Settings] = field(default_factory=lambda: [{}])


@dataclass(frozen=True)
class Outcome:
    """A model after unlearning, what of it is trained, and what is shipped."""

    model: nn.Module
    trained: int
    shipped: int


def carried(case: Case, carrier: str, gamma: float) -> nn.Module:
    model = fresh(case)
    if carrier == "SEMU":
        return get_peft_model(model, SemuConfig(target_modules=case.targets, explained_variance=gamma))
    if carrier == "LoRA":
        torch.manual_seed(case.seed)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=case.targets))
    return model


def trained(name: str, carrier: str, retain: bool = False, **fixed: Any) -> Callable[[Case, Settings], Outcome]:
    """A method by training: of SEMU's cores, of a LoRA, or of all weights."""

    def run(case: Case, settings: Settings) -> Outcome:
        said = {**fixed, **settings}
        model = carried(case, carrier, said.pop("explained_variance", 0.9))
        if carrier == "all weights":
            said |= given(name, case)
        if name == "gu":  # its own default is for answers of language models
            said["objective"] = DecoupledDistillation()
        kept = (case.batches(case.retain),) if retain else ()
        result = getattr(methods, name)(model, case.batches(case.forget), *kept, progress=False, **said)
        return Outcome(model, result.trainable_parameters, size_of(model))

    return run


def edited(name: str, *, is_searched: bool = False) -> Callable[[Case, Settings], Outcome]:
    """A method in closed form, shipped as its own file; how much of it there is may be searched by a score."""

    def run(case: Case, settings: Settings) -> Outcome:
        model = fresh(case)
        said = {**settings, "score": scored(case)} if is_searched else settings
        edit: Edit = getattr(methods, name)(model, *gathered_from(case), progress=False, **said)
        with tempfile.TemporaryDirectory() as folder:
            shipped = edit.save(Path(folder) / "edit.safetensors").stat().st_size
        edit.apply(model, undoable=False)
        return Outcome(model, 0, shipped)

    return run


def gathered_from(case: Case) -> tuple[list[Any], list[Any]]:
    """Forget and retain batches for a few passes: all of them, or a part of `GATHERED` with the same share of each."""
    forget, retain = case.batches(case.forget), case.batches(case.retain)
    share = min(1.0, GATHERED / (len(forget) + len(retain)))
    return forget[: max(1, round(share * len(forget)))], retain[: max(1, round(share * len(retain)))]


def slug(case: Case, settings: Settings) -> Outcome:
    model = fresh(case)
    methods.slug(model, *gathered_from(case), score=scored(case), progress=False, **settings)
    return Outcome(model, 0, size_of(model))


def scored(case: Case) -> Callable[[nn.Module], float]:
    """What a search makes large: how much is kept less how much is known of what is to go."""

    def score(candidate: nn.Module) -> float:
        return accuracy(candidate, case.retain) - accuracy(candidate, case.forget)

    return score


def in_passes(name: str, **fixed: Any) -> Callable[[Case, Settings], Outcome]:
    """A method of all weights that goes over the data in passes: over `GATHERED` batches, as all would be thousands."""

    def run(case: Case, settings: Settings) -> Outcome:
        model = fresh(case)
        result = getattr(methods, name)(
            model, *gathered_from(case), progress=False, **given(name, case), **fixed, **settings
        )
        return Outcome(model, result.trainable_parameters, size_of(model))

    return run


def given(name: str, case: Case) -> dict[str, Any]:
    """The frozen original, for those of all weights that compare with it, and the layer whose outputs LAF reads."""
    found = {"reference": fresh(case).requires_grad_(False)} if name in COMPARES else {}
    return {**found, "layer": case.embedding} if name == "laf" else found


def amun(case: Case, settings: Settings) -> Outcome:
    """Of `GATHERED` batches, as the search for neighbours makes hundreds of passes."""
    model = fresh(case)
    result = methods.amun(model, neighbours(case), case.batches(case.retain), progress=False, **settings)
    return Outcome(model, result.trainable_parameters, size_of(model))


@lru_cache(maxsize=1)
def neighbours(case: Case) -> list[Any]:
    """Pairs of forget batches and their adversarial neighbours, searched in large batches; kept for other settings."""
    together = [torch.cat(parts).split(1000) for parts in zip(*gathered_from(case)[0], strict=True)]
    pairs = adversarial_examples(fresh(case), list(zip(*together, strict=True)))
    parts = [zip(*(tensor.split(64) for side in pair for tensor in side), strict=True) for pair in pairs]
    return [(each[:2], each[2:]) for part in parts for each in part]


def size_of(model: nn.Module) -> int:
    """Bytes that are shipped: an adapter's file, or all weights."""
    tied = {id(weight): name for name, weight in model.named_parameters()}  # one name each
    kept = {name for name, value in model.state_dict(keep_vars=True).items() if tied.get(id(value), name) == name}
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items() if name in kept}
    own = {name: value for name, value in state.items() if "semu_" in name or "lora_" in name}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shipped.safetensors"
        save_file({name: value for name, value in (own or state).items() if value.numel()}, path)
        return path.stat().st_size


RATES: list[Settings] = [{"learning_rate": rate} for rate in (1e-3, 3e-4, 1e-4)]
STEPS = {"max_steps": 60, "epochs": 60}


SHARES: list[Settings] = [{"explained_variance": gamma} for gamma in (0.9, 0.99)]


def rows() -> list[Row]:
    """All of them; natural gradients need no rate: what SEMU has to choose is how much of the gradient to take."""
    quick: list[Settings] = [{**STEPS, **rate} for rate in RATES]
    return [
        Row("delete, SEMU", trained("delete", "SEMU"), SHARES),
        Row("delete, SEMU, with retain data", trained("delete", "SEMU", retain=True), SHARES),
        Row("delete, SEMU, within the budget", trained("delete", "SEMU", retain=True, max_retain_kl=0.01), SHARES),
        Row("semu (paper), SEMU", trained("semu", "SEMU"), SHARES),
        Row("deep_delete, SEMU", trained("deep_delete", "SEMU", retain=True, max_steps=20)),
        Row("gu (delete), SEMU", trained("gu", "SEMU", retain=True), SHARES),
        Row("salun, SEMU", trained("salun", "SEMU", retain=True), SHARES),
        Row("delete, LoRA", trained("delete", "LoRA"), [{**STEPS, "learning_rate": r} for r in (1e-2, 3e-3, 1e-3)]),
        Row("delete, all weights", trained("delete", "all weights"), quick),
        Row("random labels, all weights", trained("semu", "all weights", retain=True), quick),
        Row("salun, all weights", trained("salun", "all weights", retain=True), quick),
        Row("neg_grad_plus, all weights", trained("neg_grad_plus", "all weights", retain=True), quick),
        Row("gradient ascent, all weights", trained("neg_grad_plus", "all weights"), quick),
        Row("scrub, all weights", in_passes("scrub"), RATES),
        Row("bad_teacher, all weights", trained("bad_teacher", "all weights", retain=True), quick),
        Row("boundary_shrink, all weights", trained("boundary_shrink", "all weights"), quick),
        Row("unsir, all weights", in_passes("unsir", **STEPS),
            [{"impair_rate": 2 * rate, "repair_rate": rate} for rate in (1e-2, 1e-3, 1e-4)]),
        Row("laf, all weights", in_passes("laf"), [{**STEPS, "learning_rate": r} for r in (3e-2, 1e-2, 3e-3)]),
        Row("fine_tune, all weights", trained("fine_tune", "all weights", retain=True), quick),
        Row("l1_sparse, all weights", trained("l1_sparse", "all weights", retain=True),
            [{"max_steps": 60, "learning_rate": 1e-3, "alpha": alpha} for alpha in (5e-4, 5e-3, 5e-2)]),
        Row("amun, all weights", amun, quick),
        Row("slug", slug, [{"layer": None}, *({"layer": layer} for layer in ("2", "4"))]),
        Row("ssd", edited("ssd"), [{"threshold": value} for value in (1.5, 2.5, 4.0)]),
        Row("ssd, share searched", edited("ssd", is_searched=True), [{"lower": value} for value in (1.0, 0.1, 0.0)]),
        Row("lfssd", edited("lfssd"), [{"threshold": value} for value in (1.2, 2.0, 3.0)]),
        Row("iau", edited("iau"), [{"step_size": value} for value in (0.03, 0.1, 0.3)]),
        Row("iau, step searched", edited("iau", is_searched=True), [{"step_size": 1.0}]),
        Row("k_fade", edited("k_fade"),
            [{"damping": d, "step_size": s} for d, s in ((0.1, 0.03), (1.0, 0.1), (1.0, 0.3))]),
        Row("k_fade, step searched", edited("k_fade", is_searched=True), [{"damping": d} for d in (0.1, 1.0)]),
    ]  # fmt: skip


def share_within(budget: float, damage: Callable[[float], float], halvings: int = 10) -> float:
    """The largest share of a change whose damage is within the budget, by bisection.

    Args:
        budget: What the damage may be.
        damage: Of a share of the change.
        halvings: How often to halve.
    """
    if damage(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if damage(middle) <= budget else (low, middle)
    return low


def blended(case: Case, outcome: Outcome, share: float) -> nn.Module:
    """The original with a share of the change, `W + share · ΔW`: how a change is dialled to an equal damage."""
    merged = merged_weights(case, outcome.model)
    model = fresh(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(merged[name], share)
    return model


def merged_weights(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that the changed model computes with, by the names of the original."""
    names = dict(case.original.named_parameters())
    if hasattr(model, "merge_and_unload"):
        plain = copy.deepcopy(model).merge_and_unload()
    elif any("semu_" in name for name in model.state_dict()):
        plain = merge_and_remove(copy.deepcopy(model))
    else:
        plain = model
    found = dict(plain.named_parameters())
    return {name: found[name].detach() for name in names}


__all__ = ["Outcome", "Row", "blended", "edited", "rows", "share_within", "size_of"]
