"""The base weight of a layer in full, wherever and however it is kept."""

from __future__ import annotations

from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor

from semu_peft.tuner.layer import SemuLayer


def whole_weight(layer: SemuLayer) -> Tensor:
    """A copy of the base weight in full, wherever it is kept: offloaded, quantised or sharded."""
    with align_module_device(layer.get_base_layer()):  # brings an offloaded weight in for the moment
        weight: Any = layer.get_base_weight()
        return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.clone()
