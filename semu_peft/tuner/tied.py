"""The correction of layers that share their weight with the input embedding, such as a tied language model head."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .config import SemuConfig
from .embedding import Embedding
from .layer import SemuLayer
from .linear import Linear
from .tensors import AdapterTensors

_OF_THE_SOURCE = {*Embedding.other_param_names, "semu_core", "layer_name"} - {"semu_U", "semu_V"}


class TiedLayer(SemuLayer):
    """A layer whose weight is the input embedding's and that computes with the embedding's adapters, by reference.

    It owns nothing: a tied weight has one correction, which is initialised, trained, saved and merged where the
    embedding is. `SemuConfig.ensure_weight_tying` puts such layers in.
    """

    def __init__(self, base_layer: nn.Module, source: Embedding) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._source = (source,)  # in a tuple, so that the embedding is not registered a second time
        self._weight_use = self.find_weight_use()
        self._disable_adapters = source.disable_adapters
        self._active_adapter = source.active_adapter

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_SOURCE:
            return getattr(self.source, name)
        return super().__getattr__(name)

    @property
    def source(self) -> Embedding:
        """The embedding that the weight is tied to."""
        return self._source[0]

    # The embedding may lie on another device: in another stage of a model, or in DataParallel's first replica.

    @property
    def semu_U(self) -> Any:  # type: ignore[override]
        return {name: self.source.token_basis(name).to(self._device) for name in self.source.semu_U}

    @property
    def semu_V(self) -> Any:  # type: ignore[override]
        return {name: self.source.semu_V[name].to(self._device) for name in self.source.semu_V}

    def get_core(self, adapter_name: str, *, scaled: bool = True) -> Tensor:
        return self.source.get_core(adapter_name, scaled=scaled).to(self._device)

    @property
    def _device(self) -> torch.device | None:
        return self.execution_device if self.base_weight.is_meta else self.base_weight.device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing to move here: the embedding has the adapter."""

    def tensors_of(self, adapter_name: str) -> list[AdapterTensors]:
        return self.source.tensors_of(adapter_name)

    @property
    def merged(self) -> bool:
        return self.source.merged

    def update_layer(self, adapter_name: str, config: SemuConfig, requested: int | None = None) -> None:
        """Nothing to add here: the embedding has the adapter."""

    def follow_dtype(self, adapter_name: str) -> None:
        """Nothing to round here: the embedding has the adapter."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to add here: the embedding's merge has changed the weight of both."""

    def unmerge(self) -> None:
        if self.source.merged:
            self.source.unmerge()

    def scale_layer(self, scale: float) -> None:
        """Nothing to scale here: the scale is the embedding's."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing to scale here: the scale is the embedding's."""

    @classmethod
    def of(cls, base_layer: nn.Module, source: Embedding) -> TiedLayer:
        """Tie a linear layer or an embedding to `source`."""
        tied_class = TiedLinear if isinstance(base_layer, nn.Linear) else TiedEmbedding
        return tied_class(base_layer, source)


class TiedLinear(TiedLayer, Linear):
    """A head tied to the input embedding: `W` is `(vocabulary, dimension)` in both."""


class TiedEmbedding(TiedLayer, Embedding):
    """A further embedding tied to the first, as in T5."""


def part_shared_embeddings(model: Any, names: Collection[str]) -> None:
    """Let each place that is to be tied hold a module of its own, with the one weight.

    In T5 before transformers 5 encoder and decoder hold the very module that is the input embedding. PEFT would replace
    it in one of its places only.
    """
    if not names:
        return
    source = model.get_input_embeddings()
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name in modules and modules[name] is source:
            separate = copy.copy(source)
            separate._parameters = dict(source._parameters)
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, separate)
