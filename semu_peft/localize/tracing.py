"""Which layers carry an answer: the early MLPs by default, or found by patching a state back into a corrupted run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.arguments import check_count, check_model, check_number
from semu_peft.model_state import device_of, eval_mode
from semu_peft.tuner.adapted import base_model
from semu_peft.tuner.keys import without_wrappers
from semu_peft.tuner.layer import SemuLayer

from .table import Localization

_LINEAR = (nn.Linear, Conv1D, SemuLayer)


def mlp_modules(model: nn.Module) -> list[list[str]]:
    """The names of the MLPs of each transformer block, the first block first; of single layers where it has no MLP.

    A block is an entry of the longest list of modules of one type; its MLP is what has linear layers or experts, and is
    no attention.

    Args:
        model: A transformer, with or without adapters.

    Raises:
        ValueError: The model has no list of alike blocks.

    Examples:
        >>> block = nn.ModuleDict({"attention": nn.Linear(2, 2), "fc1": nn.Linear(2, 4), "fc2": nn.Linear(4, 2)})
        >>> mlp_modules(nn.ModuleDict({"layers": nn.ModuleList([block])}))
        [['layers.0.fc1', 'layers.0.fc2']]
    """
    check_model(model)
    lists = {
        name: blocks
        for name, blocks in base_model(model).named_modules()
        if isinstance(blocks, nn.ModuleList) and len(blocks) and len({type(block) for block in blocks}) == 1
    }
    if not lists:
        raise ValueError(f"`model` must have a list of blocks, got {type(model).__name__} without. Name its `modules`.")
    name, blocks = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    prefix = f"{without_wrappers(name)}." if name else ""
    return [
        [f"{prefix}{place}.{key}" for key, child in block.named_children() if _is_mlp(key, child)]
        for place, block in enumerate(blocks)
    ]


def _is_mlp(name: str, module: nn.Module) -> bool:
    if "attn" in name.lower() or "attention" in f"{name} {type(module).__name__}".lower():
        return False
    inner = list(module.named_modules())
    return any(isinstance(each, _LINEAR) or key.endswith("experts") for key, each in inner)


def causal_layers(model: nn.Module, first: int = 6) -> list[str]:
    """The linear layers in the MLPs of the first blocks, where causal mediation found that facts about subjects lie.

    They are names for `target_modules`. Fused experts are parameters and no layers: name those in `target_parameters`.
    [`trace`][semu_peft.localize.tracing.trace] finds out for a model and a fact.

    Source: SHA256 at SemEval-2025 task 4, arXiv 2504.12996: layers 0 to 5 of OLMo.

    Args:
        model: A transformer, with or without adapters.
        first: How many blocks.

    Raises:
        ValueError: The model has no list of alike blocks.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
        >>> causal_layers(gpt2, first=1)
        ['transformer.h.0.mlp.c_fc', 'transformer.h.0.mlp.c_proj']
    """
    check_count("first", first)
    modules = {without_wrappers(name): module for name, module in base_model(model).named_modules()}
    found = []
    for place in [name for names in mlp_modules(model)[:first] for name in names]:
        inside = [name for name in modules if name == place or name.startswith(f"{place}.")]
        found += [name for name in inside if isinstance(modules[name], _LINEAR)]
    return list(dict.fromkeys(found))


def trace(
    model: nn.Module,
    batch: Any,
    score: Callable[[nn.Module, Any], float],
    *,
    corrupted: Any = None,
    noise: float = 3.0,
    modules: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    seed: int = 0,
) -> Localization:
    """Which module's state, put back into a corrupted run, brings the answer back: causal tracing.

    The model runs on the batch as it is, and corrupted; then corrupted once more for each module, with that module's
    output as it was in the clean run. `recovery = (restored − corrupted) / (clean − corrupted)` of the score: 1 where
    the state carries all of the answer, 0 where it carries nothing.

    Source: Meng et al., NeurIPS 2022, arXiv 2202.05262, section 2; for unlearning arXiv 2504.12996.

    Args:
        model: The model; it is run in eval mode, and its hooks come off.
        batch: The prompt, with what `score` needs.
        score: `(model, batch) -> float`, say the log-probability of the answer. It runs the model once.
        corrupted: The same with another subject, of the same shape; by default noise on the input embeddings.
        noise: How much, in standard deviations of the embedding's weight.
        modules: The modules whose outputs are put back, by default the MLPs of all blocks (of a block's single layers
            the last). Whole blocks carry everything on, and recover it.
        positions: The tokens that are corrupted by noise and put back, by default all; negative ones from the end.
        seed: Of the noise.

    Raises:
        ValueError: There is no such module or position, the corruption changes nothing, or shapes differ.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
        >>> def score(model, ids):
        ...     return model(ids).logits[0, -1].log_softmax(-1)[3]
        >>> trace(gpt2, torch.tensor([[1, 2]]), score).columns.keys()
        dict_keys(['recovery', 'score'])
    """
    check_number("noise", noise, low=0.0)
    named = {without_wrappers(name): module for name, module in base_model(model).named_modules()}
    chosen = [names[-1] for names in mlp_modules(model) if names] if modules is None else list(modules)
    if missing := [name for name in chosen if name not in named]:
        raise ValueError(f"`modules` must name modules of the model, got {missing[:3]}. See `model.named_modules()`.")
    batch = send_to_device(batch, device_of(model))
    other = batch if corrupted is None else send_to_device(corrupted, device_of(model))
    places = None if positions is None else torch.tensor(list(positions))
    noisy = None if corrupted is not None else base_model(model).get_input_embeddings()  # type: ignore[operator]
    states: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        states[name] = output.clone()

    with torch.no_grad(), eval_mode(model):
        with _hooked({name: named[name] for name in chosen}, keep):
            clean = float(score(model, batch))
        if places is not None:
            _check_places(places, states)
        with _corrupted(noisy, noise, places, seed):
            broken = float(score(model, other))
            if not math.isfinite(clean - broken) or clean == broken:
                mend = "Raise `noise`." if corrupted is None else "Give another subject in `corrupted`."
                raise ValueError(f"The corruption must change `score`, got {clean} and {broken}. {mend}")
            if missing := [name for name in chosen if name not in states]:
                raise ValueError(f"`modules` must be called by `score`, got {missing[:3]}, which are not. Name others.")
            rows = {}
            for name in chosen:
                with _hooked({name: named[name]}, lambda name, output: _put_back(output, states[name], places)):
                    restored = float(score(model, other))
                rows[name] = {"recovery": (restored - broken) / (clean - broken), "score": restored}
    return Localization.of(rows, by="recovery")


def _check_places(places: Tensor, states: Mapping[str, Tensor]) -> None:
    for state in states.values():
        length = state.shape[1] if state.dim() > 1 else 0
        if not bool(((-length <= places) & (places < length)).all()):
            raise ValueError(
                f"`positions` must be of the {length} tokens, got {places.tolist()}. Count from 0, or -1 back."
            )


def _put_back(output: Tensor, state: Tensor, places: Tensor | None) -> Tensor:
    if output.shape != state.shape:
        raise ValueError(
            f"`corrupted` must have the shape of `batch`, got states {tuple(output.shape)} and {tuple(state.shape)}. "
            "Pad the shorter one."
        )
    if places is None:
        return state
    restored = output.clone()
    restored[:, places] = state[:, places]
    return restored


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], change: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Let `change` see each module's output, or the first tensor of it, and put another in its place."""

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            changed = change(name, output if isinstance(output, Tensor) else output[0])
            if changed is None:
                return None
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        return after

    handles: list[Any] = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _corrupted(embedding: Any, noise: float, places: Tensor | None, seed: int) -> Iterator[None]:
    """Noise on what an embedding gives, the same in every run; nothing without one."""
    if embedding is None:
        yield
        return
    size = noise * float(embedding.weight.detach().float().std())

    def shake(name: str, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = (size * torch.randn(output.shape, generator=generator)).to(output)
        if places is None:
            return output + drawn
        counted = torch.where(places < 0, places + output.shape[1], places)  # `index_add` counts from the start alone
        return output.index_add(1, counted.to(output.device), drawn[:, counted])

    with _hooked({"": embedding}, shake):
        yield
