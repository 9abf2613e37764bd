"""What a neuron speaks of: the tokens that the language model's head reads in its input weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.arguments import check_count, check_model
from semu_peft.tuner.adapted import base_model, token_head
from semu_peft.tuner.keys import without_wrappers

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False, repr=False)
class DecodedNeurons:
    """The tokens that each neuron of a model's MLPs is about, by layer.

    Attributes:
        labels: Token indices, `(neurons, k)`, best first; `(experts, neurons, k)` for fused experts.
        scores: How strongly, as the head's logits.

    Examples:
        >>> DecodedNeurons({"mlp.up_proj": torch.tensor([[3], [5]])}, {"mlp.up_proj": torch.ones(2, 1)}).of([5])
        {'mlp.up_proj': tensor([[1]])}
    """

    labels: dict[str, Tensor] = field(repr=False)
    scores: dict[str, Tensor] = field(repr=False)

    def of(self, tokens: Collection[int]) -> dict[str, Tensor]:
        """The neurons that have one of these tokens among their labels: `(found, 1)`, or expert and neuron."""
        wanted = torch.tensor(sorted(tokens))
        found = {name: torch.isin(labels, wanted).any(-1).nonzero() for name, labels in self.labels.items()}
        return {name: places for name, places in found.items() if len(places)}

    def __repr__(self) -> str:
        count = sum(labels[..., 0].numel() for labels in self.labels.values())
        return f"DecodedNeurons({count} neurons of {len(self.labels)} layers)"


@torch.no_grad()
def decode_neurons(model: nn.Module, topk: int = 1) -> DecodedNeurons:
    """Label each neuron of a language model's MLPs by the tokens whose row in the head is most like its input weights.

    `labels = topk(W_head wᵢ)` for each row `wᵢ` of the up- and gate-projections.

    Source: Decoding specialised feature neurons, arXiv 2501.02688.

    Args:
        model: A transformers language model, with or without adapters.
        topk: How many tokens a neuron.

    Raises:
        ValueError: The model has no head over tokens, or no layer that reads the hidden state in an MLP.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_inner=4, vocab_size=16))
        >>> decode_neurons(gpt2, topk=2).labels["transformer.h.0.mlp.c_fc"].shape
        torch.Size([4, 2])
    """
    check_model(model)
    check_count("topk", topk)
    plain, head = base_model(model), token_head(model)
    readout = head.weight.detach().float()
    labels, scores = {}, {}
    for name, rows in _input_rows(plain, head):
        parts = rows.flatten(0, -2).split(_ROWS_AT_ONCE)
        best = [(part.float() @ readout.mT).topk(min(topk, len(readout)), -1) for part in parts]
        shape = (*rows.shape[:-1], -1)
        labels[name] = torch.cat([each.indices for each in best]).reshape(shape).cpu()
        scores[name] = torch.cat([each.values for each in best]).reshape(shape).cpu()
    if not labels:
        raise ValueError(f"{type(plain).__name__} has no layer in an MLP that reads the hidden state. Name another.")
    return DecodedNeurons(labels, scores)


def _input_rows(model: nn.Module, head: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights by which neurons read the hidden state, `(…, neurons, hidden)`, by layer or parameter."""
    size = head.weight.shape[1]
    for path, module in model.named_modules():
        name = without_wrappers(path)
        outside = "attn" in name or "attention" in name or name.endswith(("gate", "router")) or module is head
        if outside or path.endswith("base_layer"):
            continue
        base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(base, (nn.Linear, Conv1D)):
            rows = base.weight.mT if isinstance(base, Conv1D) else base.weight
            if rows.shape[1] == size and rows.shape[0] > 1 and not _gives_hidden_state(name):
                yield name, rows.detach()
        elif name.endswith("experts"):
            for key, parameter in base.named_parameters(recurse=False):
                if parameter.dim() == 3 and not _gives_hidden_state(key):
                    transposed = getattr(base, "is_transposed", parameter.shape[-1] != size)
                    yield f"{name}.{key}", (parameter.mT if transposed else parameter).detach()


def _gives_hidden_state(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("w2", "fc2", "c_proj", "wo", "dense_4h_to_h") or last.startswith("down")
