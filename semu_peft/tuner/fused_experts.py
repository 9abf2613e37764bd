"""Names of experts from before transformers 5 fused them: `w1` of Mixtral, `gate_proj` of Qwen's mixtures."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .adapted import targets_for
from .config import SemuConfig
from .keys import without_wrappers

try:
    from peft.utils import transformers_weight_conversion as _conversion
except ImportError:  # it is only there with transformers 5 and a PEFT that knows of it
    _conversion = None  # type: ignore[assignment]


class ExpertNames:
    """What PEFT knows of a mixture's names: `old` ones of layers, the `new` ones of the parameters they are part of.

    Args:
        model: The model; one of another kind has no such names.
        layers: The names of the layers that can be corrected.
    """

    def __init__(self, model: nn.Module, layers: Collection[str]) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        base = getattr(_conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind, kind)
        new: dict[str, str] = getattr(_conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(base, {})
        every = [without_wrappers(name) for name, _ in model.named_parameters()] if new else []
        found = {old: [name for name in every if name.endswith(f".{ending}")] for old, ending in new.items()}
        # A router that is still a linear layer keeps its name.
        self.places = {
            old: [name for name in names if name.removesuffix(".weight") not in layers] for old, names in found.items()
        }
        self.new = {old: ending for old, ending in new.items() if self.places[old]}
        self.alone = {old for old in self.new if len(found[old]) == len(self.places[old])}
        self.fused: dict[str, list[str]] = getattr(_conversion, "_MOE_FUSED_TARGETS", {}).get(base, {})

    def parameters_of(self, olds: Collection[str]) -> set[str]:
        """The parameters that the old names mean.

        Raises:
            ValueError: One fused parameter is named by a part of its parts.
        """
        for new, parts in self.fused.items():
            named = [old for old in parts if old in olds]
            if 0 < len(named) < len(parts):
                missing = [part for part in parts if part not in named]
                raise ValueError(
                    f"`target_modules` names {named}, which transformers 5 has fused with {missing} into one parameter "
                    f"{new!r}. Name {parts} together, or {new!r} in `target_parameters`."
                )
        return {name for old in olds for name in ([self.new[old]] if old in self.alone else self.places[old])}

    def in_pattern(self, pattern: str) -> set[str]:
        """The old names that a regular expression means, of layers as they were called in each expert."""
        return {old for old in self.new if any(re.fullmatch(pattern, key) for key in self._old_keys(old))}

    def _old_keys(self, old: str) -> Iterable[str]:
        for place in self.places[old]:
            owner = place.removesuffix(f".{self.new[old]}")
            yield from (f"{owner}.{old}", f"{owner}.0.{old}")


def name_fused_experts(config: SemuConfig, model: nn.Module, layers: Collection[str], everything: bool) -> None:
    """Put parameters into `target_parameters` for the old names of experts in `target_modules`, as PEFT does for LoRA.

    A name that a layer still goes by means that layer, where PEFT's LoRA would move it to the experts.

    Args:
        config: The configuration, which is changed.
        model: The model.
        layers: The names of the layers that can be corrected.
        everything: Whether all linear layers were asked for, which the experts and their router were.

    Raises:
        ValueError: One fused parameter is named by a part of its parts.
    """
    names, targets = ExpertNames(model, layers), config.target_modules
    if not names.new or not targets:
        return
    left: Any = targets
    if everything:
        olds = set(names.new)
    elif isinstance(targets, str):
        olds = names.in_pattern(targets)
        left = [name for name in layers if re.fullmatch(targets, name)]
        left = targets_for(model, left) if left else set()
    else:
        gone = {target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)}
        olds = {target.rpartition(".")[2] for target in gone} & set(names.new)
        left = {target for target in targets if target not in gone or target.rpartition(".")[2] not in olds}
    if olds:
        config.target_modules = left
        config.target_parameters = sorted({*(config.target_parameters or ()), *names.parameters_of(olds)})
