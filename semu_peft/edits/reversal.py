"""Rows that read a concept turned against it: what a concept's vector is, and which rows are most like it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from semu_peft.arguments import check_count, check_kind, check_model, check_positive, check_share
from semu_peft.tuner.adapted import own_modules, token_head

from .deltas import Sparse, at_places
from .edit import Edit


def reverse_rows(model: nn.Module, layers: Collection[str], target: Tensor, *, threshold: float = 0.5) -> Edit:
    """Turn the rows of linear layers that are most like a vector against it, `w ← −‖w‖ t / ‖t‖` where `cos(w, t) ≥ τ`.

    Row `i` of an up- or gate-projection is what neuron `i` reads the hidden state by: where it answered the vector
    most, it then answers it least. All other rows stay bit for bit.

    Source: TARS, *Targeted Angular Reversal of Weights*, 2024, arXiv 2412.10257.

    Args:
        model: The model; it is not changed.
        layers: Names of linear layers that read the hidden state.
        target: `t`, `(hidden,)`; [`concept_target`][semu_peft.edits.reversal.concept_target] finds one.
        threshold: `τ`, in (0, 1].

    Raises:
        ValueError: There is no such linear layer, the vector does not fit it, or no row is so much like it.

    Examples:
        >>> from semu_peft.edits import reverse_rows
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> with reverse_rows(model, ["0"], torch.tensor([1.0, 0.0]), threshold=0.6).apply(model):
        ...     model[0].weight.tolist()
        [[-5.0, 0.0], [0.0, 1.0]]
    """
    check_model(model)
    mend = "Write ['model.layers.3.mlp.up_proj']."
    if isinstance(layers, str) or not isinstance(layers, Collection) or not layers:
        raise ValueError(f"`layers` must name linear layers of the model, got {layers!r}. {mend}")
    check_kind("target", target, Tensor, "a vector", "Take one from `concept_target`.")
    check_share("threshold", threshold)
    if target.dim() != 1 or not bool(torch.isfinite(target).all()) or not bool(target.any()):
        raise ValueError("`target` must be a finite vector other than 0. Take one from `concept_target`.")
    modules, direction, best, deltas = own_modules(model), target.detach().float().cpu(), -1.0, {}
    for name in layers:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(modules.get(name), nn.Linear) or weight is None or weight.shape[1] != len(direction):
            raise ValueError(
                f"`layers` must name linear layers that read {len(direction)} numbers, got {name!r}. {mend}"
            )
        rows = weight.detach().float().cpu()
        cosines = cosine_similarity(rows, direction[None], dim=1)
        best, found = max(best, cosines.max().item()), cosines >= threshold - 1e-6  # a rounding is no difference
        if found.any():
            reversed_rows = -rows.norm(dim=1, keepdim=True) * direction / direction.norm()
            places = found[:, None].expand_as(rows)
            deltas[f"{name}.weight"] = at_places(Sparse, places, reversed_rows - rows)
    if not deltas:
        raise ValueError(
            f"`threshold` must be reached by a row at least, got {threshold}; the highest cosine is {best:.3f}. Lower "
            "it, or name other layers."
        )
    return Edit(deltas, "reverse_rows", {"threshold": threshold})


@torch.no_grad()
def concept_target(
    model: nn.Module, hidden: Tensor, token: int, *, std: float = 0.1, tries: int = 1000, seed: int = 0
) -> Tensor:
    """The vector of a concept: a hidden state near a prompt's from which the head reads the concept's token first.

    `t = h + σ rms(h) ε` with the first `ε ~ N(0, I)` that gives `argmax(W_head t) = token`; `t = h` where `h` does.

    Source: TARS, 2024, arXiv 2412.10257.

    Args:
        model: A transformers language model, with or without adapters.
        hidden: `h`, `(hidden,)`: what the head reads at the end of a detailed prompt for the concept, such as
            `model(**prompt, output_hidden_states=True).hidden_states[-1][0, -1]`.
        token: The index of the concept's first token.
        std: `σ`, in parts of the size of `h`.
        tries: So many draws at the most.
        seed: Of the draws.

    Raises:
        ValueError: The model has no head over tokens, `hidden` or `token` does not fit it, or no try gave the token.

    Examples:
        >>> from semu_peft.edits import concept_target
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
        >>> target = concept_target(gpt2, gpt2.lm_head.weight[5].detach(), 5, std=1.0)
        >>> int(gpt2.lm_head(target).argmax())
        5
    """
    check_model(model)
    check_kind("hidden", hidden, Tensor, "a vector", "Take it from the model's last hidden state.")
    check_count("token", token, least=0)
    check_positive("std", std)
    check_count("tries", tries)
    check_count("seed", seed, least=0)
    head = token_head(model)
    tokens, size = head.weight.shape
    if hidden.shape != (size,) or not bool(torch.isfinite(hidden).all()):
        raise ValueError(f"`hidden` must be ({size},) and finite, got {tuple(hidden.shape)}. Take one position's.")
    if token >= tokens:
        raise ValueError(f"`token` must be below {tokens}, got {token}. Take it from the model's own tokenizer.")
    start, generator = hidden.detach().float().cpu(), torch.Generator().manual_seed(seed)
    scale, candidate = std * start.square().mean().sqrt(), start
    for _ in range(tries + 1):  # the first without noise
        if int(head(candidate.to(head.weight)).argmax()) == token:
            return candidate
        candidate = start + scale * torch.randn(size, generator=generator)
    raise ValueError(
        f"`tries`: in {tries} the head did not read token {token} first. Describe the concept in more detail in the "
        "prompt, or take a larger `std` or more `tries`."
    )
