"""What a model makes of its inputs at one layer: the states by which gates tell prompts apart."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_kind
from semu_peft.model_state import aside
from semu_peft.objectives.batches import ALTERNATE, IGNORED, TOKEN_MASK, as_labels, split_batch
from semu_peft.tuner.adapted import base_model
from semu_peft.tuner.keys import without_prefix, without_wrappers

from .intervention import Hooks

Pool = Literal["any", "last", "mean"]
_NOT_FOR_A_LOOK = ("labels", "past_key_values", "use_cache", "cache_position", "logits_to_keep", "return_dict")


@dataclass(frozen=True)
class HiddenStates:
    """The states of a named layer for each example of a batch, padding left out.

    Attributes:
        layer: The layer's name, such as `"model.norm"` or `"model.layers.5"`, in the bare model; or several, whose
            states, of one size, stand side by side.
        side: What it gives, or what it takes in: the keys of a feed-forward block are the inputs of its last layer.
        pool: `"last"`: the state of the last token. `"mean"`: over all tokens. `"any"`: every token's state, so that a
            text can only be found nearer as it goes on; of a prompt that is remembered, the last.

    Examples:
        >>> import torch
        >>> from semu_peft.gates import HiddenStates
        >>> states, real = HiddenStates("0")(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(2, 4))
        >>> states.shape, real.shape
        (torch.Size([2, 1, 3]), torch.Size([2, 1]))
    """

    layer: str | Sequence[str]
    side: Literal["output", "input"] = "output"
    pool: Pool = "any"

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str):
            kind, mend = "the name of a layer, or several", "`model.named_modules()` lists them."
            check_kind("layer", self.layer, Sequence, kind, mend)
            object.__setattr__(self, "layer", tuple(self.layer))  # also where it comes out of a file
            if not self.layer or not all(isinstance(name, str) for name in self.layer):
                raise ValueError(f"`layer` must be {kind}, got {self.layer!r}. {mend}")
        for name, known in (("side", ("output", "input")), ("pool", ("any", "last", "mean"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}. Use one of these.")

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers."""
        return (self.layer,) if isinstance(self.layer, str) else tuple(self.layer)

    @torch.no_grad()
    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The states of the model's inputs.

        Returns:
            States `(N, T, D)` in float32, and which of them are real, `(N, T)`: all tokens, or one pooled state.
        """
        states = self._states(model, args, kwargs)
        return self._pooled(states, real_tokens(states, kwargs))

    @torch.no_grad()
    def of_prompts(self, model: nn.Module, batch: Any) -> Tensor:
        """One state for each example of a batch with labels: of its prompt, which the labels leave out.

        Args:
            model: The model.
            batch: A mapping, or a tuple `(*inputs, labels)`; of a text without a prompt all tokens are taken.

        Returns:
            `(N, D)` in float32.
        """
        states, _, prompt = self._of_batch(model, batch)
        single = HiddenStates(self.layer, self.side, "mean" if self.pool == "mean" else "last")
        return single._pooled(states, prompt)[0][:, 0]

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """All states of a batch that the gate may come to see: of the prompts as well as of the whole texts."""
        states, real, prompt = self._of_batch(model, batch)
        if self.pool == "any":
            return states, real
        pooled = [self._pooled(states, which) for which in (prompt, real)]
        return torch.cat([each for each, _ in pooled], 1), torch.cat([held for _, held in pooled], 1)

    def _of_batch(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """States, which of them are of real tokens, and which of the prompt's."""
        args, kwargs, labels = inputs_of(batch)
        states = self._states(model, args, kwargs)
        real = prompt = real_tokens(states, kwargs)
        if labels is not None and labels.shape == real.shape:
            told = real & (labels.to(real.device) == IGNORED)
            prompt = torch.where(told.any(-1, keepdim=True), told, real)
        return states, real, prompt

    def _pooled(self, states: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        if self.pool == "any":
            return states, real
        if self.pool == "mean":
            held = real.unsqueeze(-1).to(states)
            pooled = (states * held).sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp_min(1)
        else:
            places = torch.arange(real.shape[1], device=real.device)
            last = torch.where(real, places, -1).amax(-1).clamp_min(0)
            pooled = states[torch.arange(len(states), device=states.device), last].unsqueeze(1)
        return pooled, real.any(-1, keepdim=True)

    def _states(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor:
        seen: dict[str, Any] = {}

        def look(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any, *, name: str) -> None:
            seen[name] = output if self.side == "output" else (*inputs, *named.values())[0]

        hooks = [(find_layer(model, name), partial(look, name=name)) for name in self.layers]
        with aside(), Hooks(hooks, with_kwargs=True):
            model(*args, **for_a_look(model, kwargs))
        missing = [name for name in self.layers if name not in seen]
        if missing:
            raise ValueError(
                f"`layer` must be called when the model is, got {missing[0]!r}, which is not. Name another."
            )
        states = [_as_states(seen[name], name) for name in self.layers]
        if len({each.shape for each in states}) > 1:
            sizes = [tuple(each.shape) for each in states]
            raise ValueError(
                f"`layer` must name layers whose states have one size, got {sizes}. Name blocks of one kind."
            )
        return torch.cat(states, -1)


def _as_states(value: Any, name: str) -> Tensor:
    states = torch.as_tensor(value[0] if isinstance(value, (tuple, list)) else value).detach()
    if states.dim() == 4:  # of an image: the mean over its places
        states = states.flatten(2).mean(-1)
    states = states.unsqueeze(1) if states.dim() == 2 else states
    if states.dim() != 3:
        raise ValueError(
            f"`layer` must have states `(N, D)`, `(N, L, D)` or `(N, C, H, W)`, got {tuple(states.shape)} at {name!r}. "
            "Name another."
        )
    return states.float()


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """The inputs in a batch, and its labels where it has some.

    Examples:
        >>> from semu_peft.gates.hidden import inputs_of
        >>> inputs_of(torch.zeros(1))
        ((tensor([0.]),), {}, None)
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, dict) and not {"labels", "label"} & set(batch):
        return (), batch, None
    args, kwargs, labels = split_batch(batch)
    named = {key: value for key, value in kwargs.items() if not key.startswith((ALTERNATE, TOKEN_MASK))}
    return args, named, as_labels(labels)


def real_tokens(states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Which states are of tokens and not of padding, `(N, L)`.

    Examples:
        >>> from semu_peft.gates.hidden import real_tokens
        >>> real_tokens(torch.zeros(1, 2, 3), {"attention_mask": torch.tensor([[0, 1]])})
        tensor([[False,  True]])
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == states.shape[:2]:
        return mask.to(states.device).bool()
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def for_a_look(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs for a pass that fills no cache, tokens numbered from the first that is real, as `generate` does.

    Examples:
        >>> from semu_peft.gates.hidden import for_a_look
        >>> for_a_look(nn.Linear(2, 2), {"labels": torch.zeros(1)})
        {}
    """
    named = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_A_LOOK}
    plain: Any = base_model(model)
    known = inspect.signature(plain.forward).parameters
    mask, ids = named.get("attention_mask"), named.get("input_ids")
    if "position_ids" in known and "position_ids" not in named and isinstance(mask, Tensor) and mask.dim() == 2:
        named["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    if "use_cache" in known:
        named["use_cache"] = False
    config: Any = getattr(plain, "config", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(ids, Tensor) and "decoder_input_ids" not in named:
        named["decoder_input_ids"] = ids.new_full((len(ids), 1), config.decoder_start_token_id or 0)
    return named


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of that name in the bare model, whatever wrappers are around it.

    Raises:
        ValueError: There is none.

    Examples:
        >>> from semu_peft.gates.hidden import find_layer
        >>> find_layer(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    named = {without_prefix(without_wrappers(path)): module for path, module in reversed(list(model.named_modules()))}
    if name and name in named:
        return named[name]
    known = [path for path in reversed(named) if path and path.count(".") < 2]
    raise ValueError(
        f"`layer` must be the name of a module of the model, got {name!r}. There are {', '.join(known[:8])} …; "
        "`model.named_modules()` lists them."
    )
