"""What is trained, read as matrices: the weight of a layer, or the core that corrects it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from semu_peft.tuner.keys import without_prefix, without_wrappers
from semu_peft.tuner.layer import SemuLayer

from .base import Step


@dataclass(frozen=True, eq=False)
class TrainedMatrix:
    """A trained parameter as a matrix `(m, n)`, or a batch of matrices.

    Attributes:
        name: The parameter's name.
        layer: The layer's full name in the base model, as `gather` and `SemuConfig.ranks` have it.
        shape: The parameter's shape.
        kind: How the parameter is read: `"matrix"`, `"transposed"`, `"filters"` of a convolution, or a `"diagonal"`.
        left: `U`, `(m, r)`, where the parameter is a core.
        right: `V`, `(n, r)`.
    """

    name: str
    layer: str
    shape: torch.Size
    kind: str
    left: Tensor | None = field(default=None, repr=False)
    right: Tensor | None = field(default=None, repr=False)

    def read(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as the matrix."""
        if self.kind == "diagonal":
            return torch.diag_embed(tensor)
        if self.kind == "filters":
            return tensor.flatten(1)
        return tensor.mT if self.kind == "transposed" else tensor

    def write(self, matrix: Tensor) -> Tensor:
        """The inverse of `read`; of a diagonal, what lies on it."""
        if self.kind == "diagonal":
            return matrix.diagonal(dim1=-2, dim2=-1)
        return (matrix.mT if self.kind == "transposed" else matrix).reshape(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        if self.kind == "diagonal":
            return (*self.shape, self.shape[-1])
        if self.kind == "filters":
            return self.shape[0], math.prod(self.shape[1:])
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.kind == "transposed" else tuple(self.shape)


def trained_matrices(step: Step) -> list[TrainedMatrix]:
    """What of a step's parameters is a matrix, in their order; biases and norms are not.

    A SEMU core is the matrix `R` within its bases. The filters of a convolution are one matrix, `out × (in · kernel)`;
    any other parameter of three dimensions is a batch of matrices, such as the experts of a fused layer.

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> [(each.layer, each.matrix_shape) for each in trained_matrices(Step(0, layer, {"weight": layer.weight}))]
        [('', (2, 3))]
    """
    cores = _cores(step.model)
    modules = dict(step.model.named_modules())
    found = []
    for name, parameter in step.parameters.items():
        if id(parameter) in cores:
            found.append(_core(name, parameter, *cores[id(parameter)]))
        elif parameter.dim() >= 2:
            path = name.rpartition(".")[0]
            layer = without_prefix(without_wrappers(path))
            found.append(TrainedMatrix(name, layer, parameter.shape, _kind(modules.get(path))))
    return found


def of_layer(tensors: Mapping[str, Tensor], matrix: TrainedMatrix) -> Tensor | None:
    """What a mapping by layer has for a matrix: by its layer's name, or by the parameter's."""
    found = tensors.get(matrix.layer)
    return tensors.get(matrix.name) if found is None else found


def _cores(model: nn.Module) -> dict[int, tuple[SemuLayer, str]]:
    layers = [module for module in model.modules() if isinstance(module, SemuLayer) and "semu_core" in module._modules]
    return {
        id(layer.semu_core.stored_parameter(adapter)): (layer, adapter)
        for layer in layers
        for adapter in layer.semu_core
    }


def _core(name: str, core: Tensor, layer: SemuLayer, adapter_name: str) -> TrainedMatrix:
    kind = "diagonal" if layer.configs[adapter_name].core == "diagonal" else "matrix"
    bases = layer.semu_U[adapter_name], layer.semu_V[adapter_name]
    return TrainedMatrix(name, layer.layer_name, core.shape, kind, *bases)


def _kind(module: nn.Module | None) -> str:
    if isinstance(module, _ConvNd):
        return "filters"
    return "transposed" if isinstance(module, Conv1D) else "matrix"
