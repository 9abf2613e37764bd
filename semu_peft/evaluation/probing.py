"""Probes: is it still inside, layer by layer, where the output no longer says it?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_model
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import check_batches, run_batch
from semu_peft.objectives.examples import examples_in
from semu_peft.objectives.tokens import Tokens, read_tokens
from semu_peft.tuner.adapted import base_model, token_head
from semu_peft.tuner.keys import without_wrappers

FEWEST_EXAMPLES = 4  # of each side: half of them fit the probe


@dataclass(frozen=True)
class Probes:
    """What can be read from each layer, in percent, beside the same layers of a reference.

    Attributes:
        kind: What reads.
        layers: The layers, from the input on.
        found: What is read from each.
        reference: The same of the reference.
        chance: What a reader without anything to read gets.

    Examples:
        >>> Probes("linear probe", ("blocks.0", "blocks.1"), (80.0, 94.0), (79.0, 89.0))
        Probes(linear probe: best 94.0% at 'blocks.1', last 94.0%; reference 89.0%, 89.0%; chance 50.0%)
    """

    kind: str
    layers: tuple[str, ...]
    found: tuple[float, ...]
    reference: tuple[float, ...] = field(default=(), repr=False)
    chance: float = 50.0

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        other = "" if not self.reference else f"best {max(self.reference):.1f}%, last {self.reference[-1]:.1f}%"
        return self.kind, self._found(), other

    def _found(self) -> str:
        best = max(self.found)
        return f"best {best:.1f}% at {self.layers[self.found.index(best)]!r}, last {self.found[-1]:.1f}%"

    def __repr__(self) -> str:
        other = "" if not self.reference else f"; reference {max(self.reference):.1f}%, {self.reference[-1]:.1f}%"
        return f"Probes({self.kind}: {self._found()}{other}; chance {self.chance:.1f}%)"


def linear_probes(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    reference: nn.Module | None = None,
    max_examples: int = 500,
    seed: int = 0,
) -> Probes:
    """Tell forget from retain inputs by a logistic regression on each layer's pooled activations.

    Half of the examples fit it and the other half are asked, with the two sides balanced: 50% is chance. A retrained
    model's features tell most classes apart as well, as they are unlike each other: what counts is the distance to the
    `reference`, not to chance.

    Args:
        model: The unlearned model.
        forget: Batches of what was forgotten.
        retain: Batches of the rest.
        layers: Names of the layers; by default the model's blocks, and the layers in a sequence, as they are called.
        reference: The retrained model, with layers of the same names.
        max_examples: Most examples a side.
        seed: Seed of the halves.

    Returns:
        The balanced accuracy by layer.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: The model or the reference has no such layer, or it gives no tensor, or there are fewer than four
            examples a side.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import linear_probes
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
        >>> forget, retain = ([(torch.randn(20, 2) + at, torch.zeros(20))] for at in (5, -5))
        >>> linear_probes(model, forget, retain).found[0]
        100.0
    """
    check_model(model)
    check_count("max_examples", max_examples, least=4)
    names = _blocks(model) if layers is None else list(layers)
    for side, given in (("forget", forget), ("retain", retain)):
        check_batches(given, side)
    batches = list(forget), list(retain)
    if not all(batches):
        raise ValueError(
            "`forget` and `retain` must give a batch each, got none of one. Check that it was not used up."
        )
    _check_layers(model, names, "`layers` must name layers of the model")
    if reference is not None:
        check_model(reference, "reference")
        _check_layers(reference, names, "`reference` must have the layers that are read of the model")
    found = _probed(model, names, batches, max_examples, seed)
    other = {} if reference is None else _probed(reference, names, batches, max_examples, seed)
    read = [name for name in layers or found if name in found and (reference is None or name in other)]
    if not read or (layers is not None and read != names):
        raise ValueError(
            f"`layers` must name layers that give tensors, got {sorted({*names} - {*read})[:3] or 'none'}. Name those "
            "that the model calls itself, and not a list of them."
        )
    return Probes(
        "linear probe", tuple(read), tuple(found[name] for name in read), tuple(other[name] for name in read if other)
    )


def logit_lens(
    model: nn.Module, batches: Iterable[Any], *, reference: nn.Module | None = None, kind: str = "logit lens"
) -> Probes:
    """Read a language model's answer from every layer: hidden states through the last norm and the head.

    The mean probability of the labels, token by token (nostalgebraist 2020): an answer that stands in the middle of
    the model and is only blocked at its end is seen here.

    Args:
        model: A causal language model of transformers, with an adapter or without.
        batches: Mappings with `input_ids` and `labels`.
        reference: The retrained model.
        kind: What to call it.

    Returns:
        The mean probability by layer, in percent, from the embeddings on.

    Raises:
        ValueError: The model has no head that hidden states could be read by.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from semu_peft.evaluation import logit_lens
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> ids = torch.tensor([[3, 4, 5]])
        >>> len(logit_lens(model, [{"input_ids": ids, "labels": ids}]).found)
        3
    """
    check_model(model)
    check_batches(batches)
    data = list(batches)
    found = _lens(model, data)
    other = () if reference is None else tuple(_lens(reference, data))
    layers = ("embeddings", *(f"layer {number}" for number in range(1, len(found))))
    return Probes(kind, layers, tuple(found), other, 100 / token_head(model).weight.shape[0])


@dataclass(frozen=True)
class LensAttack:
    """How often the answer is among the few tokens that some layer puts first or last, in percent.

    Attributes:
        found: By what is ranked: `"lens"`, the tokens' probabilities at a layer; `"rise"`, by how much these rise from
            the layer before; `"turn"`, by how much that rise changes.
        reference: The same of the reference, such as the original model, of which no attack may find less.
        budget: How many tokens from each end are tried.

    Examples:
        >>> LensAttack({"lens": 12.0, "rise": 20.0, "turn": 8.0}, {}, 4)
        LensAttack(lens 12.0%, rise 20.0%, turn 8.0% within 4)
    """

    found: Mapping[str, float]
    reference: Mapping[str, float] = field(repr=False)
    budget: int

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        return f"lens, {self.budget} tokens", _told(self.found), _told(self.reference)

    def __repr__(self) -> str:
        return f"LensAttack({_told(self.found)} within {self.budget})"


def lens_attack(
    model: nn.Module, batches: Iterable[Any], *, reference: nn.Module | None = None, budget: int = 4
) -> LensAttack:
    """Try the few tokens that the layers put first or last for an answer: white-box attacks on a deleted fact.

    An attacker reads each layer through the last norm and the head (*lens*); what a layer adds (*rise*: the difference
    of two layers' probabilities) or turns back (*turn*: that of two rises) shows an answer that is suppressed later on.
    It succeeds where the first token of the answer is among the first or last `budget` at any layer; a token that
    shares its place with others has the last of their places. What the last layer gives is normalised already. Of a
    model that has diverged, so that a layer gives NaN, the shares are NaN.

    Source: UnLOK-VQA, TMLR 2024, and Patil et al. 2023, arXiv 2309.17410: 4 tokens, the upper layers.

    Args:
        model: A causal language model of transformers, with an adapter or without.
        batches: Mappings with `input_ids` and `labels`.
        reference: Another model, attacked alike.
        budget: Tokens from each end.

    Raises:
        ValueError: The model has no head, or there is no answer.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from semu_peft.evaluation import lens_attack
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> ids = torch.tensor([[3, 4, 5]])
        >>> lens_attack(model, [{"input_ids": ids, "labels": ids}], budget=16)
        LensAttack(lens 100.0%, rise 100.0%, turn 100.0% within 16)
    """
    check_model(model)
    check_count("budget", budget)
    check_batches(batches)
    data = list(batches)
    other = {} if reference is None else _tried(reference, data, budget)
    return LensAttack(_tried(model, data, budget), other, budget)


# ---- linear probes ----


def _blocks(model: nn.Module) -> list[str]:
    """The members of the outermost lists and sequences of modules, else the children that have weights."""
    root = base_model(model)
    found: list[str] = []
    for name, module in root.named_modules():
        inside = any(name == each or name.startswith(f"{each}.") for each in found)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not inside and "base_layer" not in name:
            found += [  # a list is never called: its own members are
                f"{name}.{key}" if name else key
                for key, child in module.named_children()
                if not isinstance(child, nn.ModuleList)
            ]
    names = found or [name for name, child in root.named_children() if next(child.parameters(), None) is not None]
    return [without_wrappers(name) for name in names]


def _check_layers(model: nn.Module, names: Sequence[str], wanted: str) -> None:
    there = [without_wrappers(name) for name, _ in base_model(model).named_modules()]
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"{wanted}, got none of the name {missing[0]!r}. It has {there[1:6]} …")


def _probed(
    model: nn.Module, names: Sequence[str], sides: tuple[list[Any], list[Any]], most: int, seed: int
) -> dict[str, float]:
    forget, retain = (_activations(model, names, batches, most) for batches in sides)
    return {name: _balanced_accuracy(forget[name], retain[name], seed) for name in forget if name in retain}


@torch.no_grad()
def _activations(model: nn.Module, names: Sequence[str], batches: list[Any], most: int) -> dict[str, Tensor]:
    """The pooled outputs `(N, D)` of layers that give a tensor, as they are called; the last of one called again."""
    modules = {name: _outermost(base_model(model), name) for name in names}
    seen: dict[str, list[Tensor]] = {}
    last: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
            if isinstance(first, Tensor):
                last[name] = _pooled(first.float(), mask)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    count = 0
    try:
        with eval_mode(model):
            for batch in batches:
                batch = send_to_device(batch, device_of(model))
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                run_batch(model, batch)
                for name in list(last):
                    seen.setdefault(name, []).append(last.pop(name).cpu())
                count += examples_in([batch])
                if count >= most:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts)[:most] for name, parts in seen.items()}


def _outermost(root: nn.Module, name: str) -> nn.Module:
    """The module of this name with the adapters around it, so that their correction is seen."""
    return next(module for path, module in root.named_modules() if without_wrappers(path) == name)


def _pooled(output: Tensor, mask: Tensor | None) -> Tensor:
    if output.dim() <= 2:
        return output.reshape(len(output), -1)
    if output.dim() == 3:  # tokens
        if mask is None or mask.shape != output.shape[:2]:
            return output.mean(1)
        weights = mask.to(output).unsqueeze(2)
        return (output * weights).sum(1) / weights.sum(1).clamp(min=1)
    return output.flatten(2).mean(2)


def _balanced_accuracy(forget: Tensor, retain: Tensor, seed: int) -> float:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            'linear_probes needs scikit-learn: run `pip install ".[evaluation]"` in a clone of semu-peft.'
        ) from error
    generator = torch.Generator().manual_seed(seed)
    halves: list[list[Tensor]] = [[], []]
    labels: list[list[int]] = [[], []]
    for label, side in enumerate((retain, forget)):
        if len(side) < FEWEST_EXAMPLES:
            raise ValueError(
                f"`forget` and `retain` must have {FEWEST_EXAMPLES} examples each or more, got {len(side)}. Give more, "
                "as half of them fit the probe."
            )
        order = torch.randperm(len(side), generator=generator)
        for half, rows in enumerate(order.chunk(2)):
            halves[half].append(side[rows].double())
            labels[half] += [label] * len(rows)
    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    probe.fit(torch.cat(halves[0]).numpy(), labels[0])
    right = torch.tensor(probe.predict(torch.cat(halves[1]).numpy())) == torch.tensor(labels[1])
    told = torch.tensor(labels[1]) == 1
    return float(50 * (right[told].double().mean() + right[~told].double().mean()))


# ---- the logit lens ----


@torch.no_grad()
def _lens(model: nn.Module, batches: Sequence[Any]) -> list[float]:
    totals: dict[int, float] = defaultdict(float)
    count = 0
    for read in _read_by_layer(model, batches):
        for number, tokens in enumerate(read):
            told = tokens.logits.float().softmax(-1).gather(1, tokens.labels.unsqueeze(1))
            totals[number] += float(told.double().sum())
        count += len(tokens.labels)
    return [100 * total / max(count, 1) for total in totals.values()]


def _read_by_layer(model: nn.Module, batches: Sequence[Any]) -> Iterator[Iterator[Tokens]]:
    """What each layer predicts at the tokens that count, batch by batch; of one layer at a time, as it is much."""
    root, head = base_model(model), token_head(model)
    with eval_mode(model):
        for batch in batches:
            batch = send_to_device(batch, device_of(model))
            states, norm = _hidden_states(model, root, batch)
            last = len(states) - 1
            every = (head(s if norm is None or number == last else norm(s)) for number, s in enumerate(states))
            yield (read_tokens(_Says(logits), batch, shift_labels=True) for logits in every)


@torch.no_grad()
def _tried(model: nn.Module, batches: Sequence[Any], budget: int) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {"lens": [], "rise": [], "turn": []}
    for read in _read_by_layer(model, batches):
        by_layer = []
        for tokens in read:
            first = tokens.places() == 0
            labels = tokens.labels[first]
            by_layer.append(tokens.logits[first].double().softmax(-1))
        ranked = torch.stack(by_layer)  # (layers, N, vocabulary)
        for kind in found:
            if len(ranked):
                found[kind].append(_among_few(ranked, labels, budget))
            ranked = ranked.diff(dim=0)
    if not found["lens"]:
        raise ValueError("`batches` must hold an answer at least, got none. Check that it has not been used up.")
    return {kind: 100 * float(torch.cat(hits).mean()) for kind, hits in found.items() if hits}


def _told(found: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {value:.1f}%" for kind, value in found.items())


def _among_few(ranked: Tensor, labels: Tensor, budget: int) -> Tensor:
    """1 for each label that is among the first or last few at any layer, else 0; NaN where a layer has it, `(N,)`."""
    own = ranked.gather(2, labels.expand(len(ranked), -1).unsqueeze(2))
    places = torch.minimum((ranked >= own).sum(2), (ranked <= own).sum(2))
    hits = (places <= budget).any(0).double()
    return hits.masked_fill(ranked.isnan().any(2).any(0), torch.nan)  # which is above and below nothing


class _Says(nn.Module):
    """Answers whatever it is asked with the same logits, so that labels are read as for the model itself."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.logits


def _hidden_states(model: nn.Module, root: nn.Module, batch: Any) -> tuple[Sequence[Tensor], nn.Module | None]:
    """The states after each layer, and the norm that the last of them has come through."""
    outputs: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    handles = [module.register_forward_hook(note) for module in root.modules() if "Norm" in type(module).__name__]
    try:
        output, _, _ = run_batch(model, batch, output_hidden_states=True, return_dict=True)
        states = output.hidden_states
    finally:
        for handle in handles:
            handle.remove()
    same = (module for module, output in reversed(outputs) if output.data_ptr() == states[-1].data_ptr())
    return states, next(same, None)
