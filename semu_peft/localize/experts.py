"""Which experts of a mixture the forget data go through: their routers' own weights say so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.arguments import check_model, check_switch
from semu_peft.gradients.processes import sum_over_processes
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.examples import count_examples
from semu_peft.objectives.routers import find_mixtures, watched_routers
from semu_peft.tuner.adapted import base_model
from semu_peft.tuner.keys import without_wrappers

from .table import Localization


def expert_affinity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> Localization:
    """How much of the forget data each expert is given, the most of all layers first.

    `affinity` is the mean over sequences of the mean over tokens of the expert's gate, 0 where it is not among the
    chosen ones: over the experts of a layer it sums to the mean mass of these, 1 where gates are normalised.
    `probability` is the same of the router's distribution over all experts. Padding does not count.

    Source: SEUF (UOE), Zhuang et al., ACL 2025, arXiv 2411.18797, equation 3: the one best expert of all layers is
    unlearned.

    Args:
        model: A model with mixtures of experts, fused or listed (Mixtral, Qwen-MoE, GPT-OSS, DeepSeek …).
        batches: The forget data.
        call: `(model, batch)`, runs the model; by default with the batch's tensors but `labels`, or with the batch.
        progress: Show a progress bar.

    Returns:
        The experts as `…experts.3`, for [`expert_targets`][semu_peft.localize.experts.expert_targets].

    Raises:
        ValueError: The model has no mixture, or there is no batch.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        >>> config = MixtralConfig(**sizes, num_hidden_layers=1, num_key_value_heads=1, num_local_experts=3)
        >>> table = expert_affinity(MixtralForCausalLM(config), [{"input_ids": torch.arange(8)[None]}], progress=False)
        >>> len(table), round(sum(table.columns["affinity"]), 4)
        (3, 1.0)
    """
    check_model(model)
    check_batches(batches)
    check_switch("progress", progress)
    run = call or _run
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64)
    with watched_routers(model) as heard, torch.no_grad(), eval_mode(model):
        for batch in tqdm(batches, desc="Experts", disable=not progress, leave=False):
            batch = send_to_device(batch, device_of(model))
            run(model, batch)
            examples = 0
            for name, calls in heard.items():
                for routing in calls:
                    each = torch.stack([routing.gates.double(), routing.probabilities.double()])
                    means = _means(each, batch)
                    examples = means.shape[1]
                    total = means.sum(1).cpu()
                    sums[name] = sums[name] + total if name in sums else total
                calls.clear()
            count += examples
    count = sum_over_processes(count.to(device_of(model))).cpu()
    if not count:
        raise ValueError("`batches` must give at least one batch that the routers see, got none. Check the data.")
    rows = {}
    for name, total in sums.items():
        means = sum_over_processes(total.to(device_of(model))).cpu() / count
        for expert, (gate, probability) in enumerate(means.T.tolist()):
            rows[f"{name}.{expert}"] = {"affinity": gate, "probability": probability}
    return Localization.of(rows, by="affinity")


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**{key: value for key, value in batch.items() if key != "labels" and not key.startswith("alternate_")})
    else:
        model(batch)


def _means(values: Tensor, batch: Any) -> Tensor:
    """`(2, tokens, experts)` as the mean over each sequence's tokens, `(2, sequences, experts)`."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != values.shape[1]:
        examples = count_examples(batch) or 1
        return values.unflatten(1, (examples if values.shape[1] % examples == 0 else 1, -1)).mean(2)
    weights = mask.to(values)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    return (values.unflatten(1, tuple(mask.shape)) * weights[..., None]).sum(2)


def expert_targets(model: nn.Module, expert: str, *, router: bool = False) -> dict[str, Any]:
    """What a `SemuConfig` needs to correct one expert alone: its slice of fused parameters, or its layers.

    Args:
        model: The model.
        expert: The expert, as [`expert_affinity`][semu_peft.localize.experts.expert_affinity] names it.
        router: Correct the router of its layer as well, as SEUF does (with an anchor that keeps the expert chosen).

    Raises:
        ValueError: There is no such expert.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        >>> config = MixtralConfig(**sizes, num_hidden_layers=1, num_key_value_heads=1, num_local_experts=3)
        >>> targets = expert_targets(MixtralForCausalLM(config), "model.layers.0.mlp.experts.2")  # transformers 5
        >>> targets["target_experts"]
        {'model.layers.0.mlp.experts.down_proj': [2], 'model.layers.0.mlp.experts.gate_up_proj': [2]}
    """
    owner, _, index = expert.rpartition(".")
    mixture = find_mixtures(model).get(owner)
    if mixture is None or not index.isdigit() or int(index) >= mixture.count:
        raise ValueError(f"`expert` must be one of the model's, got {expert!r}. See `localize.expert_affinity`.")
    named = {without_wrappers(name): module for name, module in base_model(model).named_modules()}
    linear = isinstance(mixture.router, nn.Linear)
    targets: dict[str, Any] = {"target_modules": [mixture.router_name] if router and linear else []}
    parameters = [] if linear or not router else [f"{mixture.router_name}.weight"]
    if isinstance(mixture.experts, nn.ModuleList):
        inside = {name: module for name, module in named.items() if name.startswith(f"{expert}.")}
        targets["target_modules"] += [name for name, module in inside.items() if isinstance(module, nn.Linear)]
    else:
        fused = [key for key, parameter in mixture.experts.named_parameters(recurse=False) if parameter.dim() == 3]
        targets["target_experts"] = {f"{owner}.{key}": [int(index)] for key in sorted(fused)}
        parameters += list(targets["target_experts"])
    if parameters:
        targets["target_parameters"] = parameters
    return targets
