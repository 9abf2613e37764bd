"""Put a correction that was trained on a pruned model back on the full one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semu_peft.arguments import check_kind
from semu_peft.tuner.keys import PREFIX, tensor_key


@dataclass(frozen=True)
class Kept:
    """What was kept of a layer's weight `(m, n)` when it was pruned.

    Attributes:
        shape: `(m, n)` of the full weight.
        rows: The kept outputs, in the order that the pruned layer has them; `None` for all.
        columns: The kept inputs, likewise.

    Examples:
        >>> from semu_peft.export.pruned import Kept
        >>> Kept((4, 6), rows=[0, 3]).places(0)
        [0, 3]
    """

    shape: tuple[int, int]
    rows: Sequence[int] | None = None
    columns: Sequence[int] | None = None

    def places(self, side: int) -> list[int]:
        """The kept rows (side 0) or columns (side 1), as indices into the full weight."""
        chosen = (self.rows, self.columns)[side]
        return list(range(self.shape[side])) if chosen is None else [int(index) for index in chosen]


def embed(state_dict: Mapping[str, Tensor], kept: Mapping[str, Kept]) -> dict[str, Tensor]:
    """Write the adapter of a pruned model as one of the full model, by zero rows and columns.

    With `E_r` and `E_c` the columns of the identity that were kept, `ΔW = E_r ΔW_pruned E_cᵀ`: a LoRA's `B` and a SEMU
    adapter's `U` get zero rows, `A` zero columns, `V` zero rows. So `ΔW` is the trained one where the pruned model had
    weights and 0 elsewhere, and `E_r U` and `E_c V` are as orthonormal as `U` and `V`.

    Source: LoRAM, 2025, arXiv 2502.13533.

    Args:
        state_dict: A LoRA or SEMU adapter with PEFT's file keys, as `peft.get_peft_model_state_dict` and
            `peft.load_peft_weights` give them; a SEMU adapter with its bases.
        kept: What was kept of each pruned layer, by its name. Layers without an entry stay as they are.

    Returns:
        The state dict for the full model, for the same configuration.

    Raises:
        ValueError: A layer has no linear LoRA or SEMU adapter in the state dict, or the kept rows and columns do not
            fit it.

    Examples:
        >>> from semu_peft.export.pruned import Kept, embed
        >>> pruned = {"base_model.model.fc.lora_A.weight": torch.ones(1, 2)}
        >>> pruned["base_model.model.fc.lora_B.weight"] = torch.ones(3, 1)
        >>> full = embed(pruned, {"fc": Kept((3, 4), columns=[0, 2])})
        >>> full["base_model.model.fc.lora_A.weight"]
        tensor([[1., 0., 1., 0.]])
    """
    check_kind("state_dict", state_dict, Mapping, "a state dict", "Load it with `peft.load_peft_weights(folder)`.")
    mend = "Write {'model.layers.3.mlp.up_proj': Kept((m, n), rows=[...])}."
    check_kind("kept", kept, Mapping, "what was kept by the name of its layer", mend)
    full = dict(state_dict)
    for name, layer in kept.items():
        check_kind("kept", layer, Kept, f"a mapping of names to `Kept`, as for {name!r}", mend)
        for key, side, dim in _factors(name, state_dict):
            full[key] = _scattered(name, state_dict[key], layer, side, dim)
    return full


def _factors(name: str, state_dict: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    """The keys of a layer's two factors, each with the weight's side that it spans and the factor's dimension of it."""
    layer = PREFIX + name
    lora = [(f"{layer}.lora_B.weight", 0, 0), (f"{layer}.lora_A.weight", 1, 1)]
    semu = [(tensor_key(layer, "semu_U"), 0, 0), (tensor_key(layer, "semu_V"), 1, 0)]
    for factors in (lora, semu):
        if all(key in state_dict and state_dict[key].dim() == 2 for key, _, _ in factors):
            return factors
    raise ValueError(
        f"`kept` must name linear layers with both factors of a LoRA or a SEMU adapter in `state_dict`, got {name!r}. "
        "Save a SEMU adapter with its bases, and name layers as the model without the adapter does."
    )


def _scattered(name: str, factor: Tensor, kept: Kept, side: int, dim: int) -> Tensor:
    places, size, which = kept.places(side), kept.shape[side], ("rows", "columns")[side]
    inside = all(0 <= place < size for place in places) and len(set(places)) == len(places)
    if not inside or len(places) != factor.shape[dim]:
        raise ValueError(
            f"`kept`: the {which} of {name!r} must be {factor.shape[dim]} different ones from 0 to {size - 1}, got "
            f"{len(places)}. Give those that the pruned layer has."
        )
    shape = (size, factor.shape[1]) if dim == 0 else (factor.shape[0], size)
    index = torch.tensor(places, dtype=torch.long, device=factor.device)
    return factor.new_zeros(shape).index_copy(dim, index, factor.detach())
