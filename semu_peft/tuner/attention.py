"""What PyTorch's own transformer modules need, which read the weights of their parts without calling them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def attention_weights(attention: nn.MultiheadAttention) -> list[str]:
    """The parameters of an attention that are corrected, each by a [`ParamWrapper`] of its own, the inmost first.

    The projections of query, key and value are one matrix `(3 · embed_dim, embed_dim)` where they have one size.
    """
    if attention.in_proj_weight is not None:
        return ["in_proj_weight", "out_proj.weight"]
    return ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def keep_called(layer: nn.Module, parent: nn.Module) -> None:
    """Make sure that `parent` calls a corrected layer in it.

    In inference `nn.TransformerEncoderLayer` hands the weights of its parts to one fused kernel, past the corrections.
    It does not where a part has a hook, so the layer gets one that does nothing; it goes when the layer goes.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_do_nothing)


def keep_padded(model: nn.Module, layer_name: str) -> list[RemovableHandle]:
    """Make sure that an `nn.TransformerEncoder` around a corrected layer can be trained in eval mode.

    There it packs padded inputs into nested tensors unless its first layer's own weights need gradients, and fails
    when anything else does. With gradients on, the inputs stay padded; without them nothing changes.

    Returns:
        What to call `remove()` on when the corrections are taken out.
    """
    handles = []
    names = layer_name.split(".")
    for depth in range(len(names)):
        encoder = model.get_submodule(".".join(names[:depth]))
        if isinstance(encoder, nn.TransformerEncoder) and _no_nesting not in encoder._forward_pre_hooks.values():
            handles.append(encoder.register_forward_pre_hook(_no_nesting))
            handles.append(encoder.register_forward_hook(_nesting_again, always_call=True))
    return handles


def _do_nothing(module: nn.Module, args: Any) -> None:
    pass


def _no_nesting(encoder: Any, args: Any) -> None:
    if torch.is_grad_enabled() and encoder.use_nested_tensor:
        encoder.use_nested_tensor = False
        encoder.nests_in_inference = True


def _nesting_again(encoder: Any, args: Any, output: Any) -> None:
    if vars(encoder).pop("nests_in_inference", False):
        encoder.use_nested_tensor = True
