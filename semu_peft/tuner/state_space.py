"""What state-space mixers (Mamba and its kin) need: their fused kernels read the weights of some layers in them."""

from __future__ import annotations

import inspect
import re

from torch import nn


def read_past_layer(parent: nn.Module, child_name: str) -> bool:
    """Whether a state-space mixer hands the weight of this layer of its to a fused kernel, past any correction.

    The kernels run on accelerators only, so that running the model on a CPU would not show it: the mixer's own code is
    asked. PEFT refuses such layers to LoRA by a list of names.

    Args:
        parent: The module that has the layer.
        child_name: The layer's name in it.

    Examples:
        >>> from transformers import MambaConfig
        >>> from transformers.models.mamba.modeling_mamba import MambaMixer
        >>> mixer = MambaMixer(MambaConfig(hidden_size=4, state_size=2), layer_idx=0)
        >>> [read_past_layer(mixer, name) for name in ("in_proj", "out_proj")]
        [False, True]
    """
    return isinstance(getattr(parent, "A_log", None), nn.Parameter) and child_name in _weights_in_code(type(parent))


def _weights_in_code(kind: type[nn.Module]) -> set[str]:
    try:
        return set(re.findall(r"\bself\.(\w+)\.weight\b", inspect.getsource(kind)))
    except (OSError, TypeError):  # no source at hand
        return set()
