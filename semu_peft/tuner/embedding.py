"""The correction of embeddings."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import SemuLayer


class Embedding(SemuLayer):
    """`torch.nn.Embedding` with SEMU corrections, also where a subclass multiplies its output by an `embed_scale`.

    The weight `(vocabulary, dimension)` is the matrix: `U` has a row for each token, which is looked up as the weight's
    is, so that no correction is ever formed for the whole vocabulary. The row at `padding_idx`, which PyTorch gives no
    gradient, is never corrected. `sparse` and `scale_grad_by_freq` shape the forget gradient, and so the bases, as
    they would shape the training of the weight; the core's own gradient is dense and unscaled.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> layer = get_peft_model(torch.nn.Sequential(torch.nn.Embedding(10, 4)), config).base_model.model[0]
        >>> tuple(layer.semu_U["default"].shape), tuple(layer.semu_V["default"].shape)
        ((10, 2), (4, 2))
    """

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        if getattr(base_layer, "max_norm", None) is not None:
            return "`max_norm` rewrites its weight at every forward pass; set `max_norm=None`"
        return super().refusal(base_layer)

    @property
    def in_features(self) -> int:
        """The size of the vocabulary, by the name that PEFT's layers have for it."""
        return cast(nn.Embedding, self.get_base_layer()).num_embeddings

    @property
    def out_features(self) -> int:
        """The dimension of the embedding."""
        return cast(nn.Embedding, self.get_base_layer()).embedding_dim

    def weight_to_matrix(self, weight: Tensor, adapter_name: str) -> Tensor:
        return weight

    def matrix_to_weight(self, matrix: Tensor, adapter_name: str) -> Tensor:
        return matrix

    def token_basis(self, adapter_name: str) -> Tensor:
        """`U`, with zeros in the padding row."""
        left, padding = self.semu_U[adapter_name], self.get_base_layer().padding_idx
        if padding is None:
            return left
        return left.index_fill(0, torch.tensor([padding], device=left.device), 0.0)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        return self.token_basis(adapter_name) @ self.get_core(adapter_name) @ self.semu_V[adapter_name].mT

    def add_correction(self, output: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """`output + (U[x] R) Vᵀ`, with `(..., dimension)` the shape of `output` and `(...)` that of the tokens `x`."""
        right, core = self.semu_V[adapter_name], self.get_core(adapter_name)
        hidden = F.linear(F.embedding(x, self.token_basis(adapter_name)), core.mT)
        scale = self._get_embed_scale()
        if scale is not None:
            hidden = hidden * scale.to(self.base_weight.dtype).to(hidden.dtype)
        return output + F.linear(hidden.to(output.dtype), right.to(output.dtype)).to(output.dtype)
