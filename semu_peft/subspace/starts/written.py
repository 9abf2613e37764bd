"""Starts in closed form that change the model at once: outputs written to some inputs, or directions taken out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from semu_peft.arguments import check_kind, check_number
from semu_peft.gradients.moments import InputMoment
from semu_peft.linalg.energy import check_explained_variance, rank_for_energy
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.layer import SemuLayer

from ..base_weight import whole_weight
from .base import LayerStart, as_core, svd_of_product
from .weight import within


@dataclass(frozen=True, eq=False)
class RankOneWrite:
    """Make a layer give other outputs for some inputs, and what it gave for the rest: ROCR's and ROME's write.

    With the keys `K`, `(n, k)`, the outputs `Y` wanted for them, and `E = Y − (W K + b)`, it is

    `ΔW = E (δ I + Kᵀ M K)⁻¹ Kᵀ M`,

    of as high a rank as there are keys. `M` keeps away from what the layer takes in on retain data, whose second moment
    is `C`: `rule="project"` is ROCR's projector on the complement of `C`'s leading eigenvectors, where `ΔW x = 0` for
    every `x` in their span; `rule="inverse"` is ROME's and MEMIT's `C⁻¹`. Without retain data `M = I`. For one key with
    `k ᵀ M k = 4` and `δ = 1` the output moves by 4/5 of the way.

    Source: ROCR, arXiv 2506.07795; MEMIT, Meng et al., arXiv 2210.07229, equation 14. It needs no gradient.

    Args:
        keys: Inputs by layer name, `(n,)` or `(k, n)`; layers that are not named stay as they are.
        values: The outputs wanted, `(m,)` or `(k, m)`.
        retain: [`InputMoment`][semu_peft.gradients.moments.InputMoment] of retain data by layer, as `gather` gives
            them, or second moments `(n, n)`.
        rule: What `M` is.
        damping: `δ > 0`; towards 0 the outputs get all the way.
        explained_variance: For `"project"`: how much of `C` the eigenvectors explain that are kept. ROCR keeps those
            with a singular value of at least 2e-2.

    Raises:
        ValueError: A setting is out of range; keys and values are not of the same layers.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights
        >>> base = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
        >>> model, key = get_peft_model(base, SemuConfig(target_modules=["0"])), torch.tensor([0.0, 2.0])
        >>> value = model(key).detach() + 5  # 5 more of everything
        >>> start, before = RankOneWrite({"0": key}, {"0": value}), model(key).detach()
        >>> _ = initialize_semu_weights(model, start=start)
        >>> torch.round(model(key) - before, decimals=4).tolist()
        [4.0, 4.0, 4.0]
    """

    keys: Mapping[str, Tensor] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    retain: Mapping[str, object] = field(default_factory=dict, repr=False)
    rule: Literal["project", "inverse"] = "project"
    damping: float = 1.0
    explained_variance: float = 0.99
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_explained_variance(self.explained_variance)
        check_number("damping", self.damping, low=0.0)
        if self.rule not in ("project", "inverse"):
            raise ValueError(f"`rule` must be 'project' or 'inverse', got {self.rule!r}. Use one of these.")
        for name, given in (("keys", self.keys), ("values", self.values), ("retain", self.retain)):
            check_kind(name, given, Mapping, "a mapping by layer name", "Write `{'fc1': ...}`.")
        if self.keys.keys() != self.values.keys() or not self.keys:
            raise ValueError(
                f"`keys` and `values` must name the same layers, got {sorted(self.keys)[:3]} and "
                f"{sorted(self.values)[:3]}. Give one output for each input."
            )

    @property
    def layer_names(self) -> set[str]:
        """The layers that are written to."""
        return set(self.keys)

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        name = layer.layer_name
        if name not in self.keys:
            return LayerStart(directions.left[..., :0], directions.right[..., :0])
        matrix = layer.weight_to_matrix(whole_weight(layer).detach(), adapter_name).double()
        keys, values = (torch.atleast_2d(part[name].to(matrix)).mT for part in (self.keys, self.values))
        if (len(values), len(keys)) != tuple(matrix.shape) or keys.shape[1] != values.shape[1]:
            raise ValueError(
                f"`keys` and `values` of layer {name!r} must fit its weight {tuple(matrix.shape)}, got "
                f"{tuple(keys.mT.shape)} and {tuple(values.mT.shape)}. Give as many rows of outputs as of inputs."
            )
        errors = values - _outputs(layer, matrix, keys)
        kept_away = self._kept_away(name, keys)
        inner = keys.mT @ kept_away
        inner.diagonal().add_(self.damping)
        left, written, right = svd_of_product(errors, torch.linalg.solve(inner, kept_away.mT).mT)
        return LayerStart(left, right, core=as_core(written, layer, adapter_name))

    def _kept_away(self, name: str, keys: Tensor) -> Tensor:
        """`M K`."""
        moment = self.retain.get(name)
        if moment is None:
            return keys
        second = moment.second if isinstance(moment, InputMoment) else moment
        if not isinstance(second, Tensor) or second.shape != (len(keys), len(keys)):
            raise ValueError(
                f"`retain` of layer {name!r} must be an `InputMoment`, or a matrix {(len(keys), len(keys))}, got "
                f"{type(moment).__name__}. Gather with `statistic=InputMoment`."
            )
        energies, vectors = (part.flip(-1) for part in torch.linalg.eigh(second.to(keys)))
        noise = energies[0].clamp_min(0.0) * len(keys) * torch.finfo(second.dtype).eps
        if self.rule == "inverse":
            return vectors / energies.clamp_min(noise) @ (vectors.mT @ keys)
        values = torch.where(energies > noise, energies, 0.0).sqrt()
        kept = vectors[:, : rank_for_energy(values, self.explained_variance)]
        return keys - kept @ (kept.mT @ keys)


def _outputs(layer: SemuLayer, matrix: Tensor, keys: Tensor) -> Tensor:
    """`W K + b`, `(m, k)`."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    outputs = matrix @ keys
    return outputs if not isinstance(bias, Tensor) else outputs + bias.detach().to(outputs)[:, None]


@dataclass(frozen=True, eq=False)
class Projection:
    """Take directions out of a layer's outputs: `W ← (I − Q Qᵀ) W`, as CHIP does, without training.

    `ΔW = −Q Qᵀ W` is a correction of the rank of `Q`, exactly, and doing it again changes nothing. Inputs whose outputs
    have no part in `Q` give what they gave. A bias is not corrected: where it has a part in `Q`, that stays, with a
    warning.

    Source: CHIP in MedForget, arXiv 2512.09867, whose `Q` is
    [`contrast_directions`][semu_peft.subspace.starts.written.contrast_directions]. They project a tenth of the output
    neurons alone; here all of a layer's.

    Args:
        directions: `Q` by layer name, `(m, q)`; any columns that span it. Layers that are not named stay as they are.

    Raises:
        ValueError: No layer is named.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights
        >>> base = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"]))
        >>> _ = initialize_semu_weights(model, start=Projection({"0": torch.tensor([[2.0], [0.0], [0.0]])}))
        >>> model(torch.ones(1, 2))[0, 0].abs() < 1e-6
        tensor(True)
    """

    directions: Mapping[str, Tensor] = field(repr=False)
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kind("directions", self.directions, Mapping, "a mapping by layer name", "Write `{'fc1': Q}`.")
        for name, given in self.directions.items():
            check_kind("directions", given, Tensor, f"tensors, as for layer {name!r}", "Give `Q`, `(m, q)`.")
        if not self.directions:
            raise ValueError("`directions` must name at least one layer, got none. Give `Q`, `(m, q)`, by layer name.")

    @property
    def layer_names(self) -> set[str]:
        """The layers that are projected."""
        return set(self.directions)

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        name = layer.layer_name
        if name not in self.directions:
            return LayerStart(directions.left[..., :0], directions.right[..., :0])
        matrix = layer.weight_to_matrix(whole_weight(layer).detach(), adapter_name).double()
        basis, left, values, right = within(matrix, self.directions[name], name)
        bias = getattr(layer.get_base_layer(), "bias", None)
        if isinstance(bias, Tensor) and float((basis.mT @ bias.detach().to(basis)).norm()) > 1e-6 * float(bias.norm()):
            warnings.warn(
                f"The bias of layer {name!r} has a part in `directions`, which stays: the adapter corrects weights. "
                "Take it out of the bias yourself, or choose layers without one.",
                stacklevel=2,
            )
        return LayerStart(left, right, core=as_core(-values, layer, adapter_name))


def contrast_directions(targets: Tensor, siblings: Tensor, *, explained_variance: float = 0.95) -> Tensor:
    """The directions in which what is to be forgotten differs from what is like it: CHIP's `Q` for a projection.

    Each row is the difference of two mean outputs, of length 1; of all of them the fewest singular directions that hold
    the share. Without siblings to take off, what these share with the targets would be taken out as well.

    Source: CHIP in MedForget, arXiv 2512.09867.

    Args:
        targets: Mean outputs of what is to be forgotten, `(k, m)`, see
            [`InputMoment.mean_output`][semu_peft.gradients.moments.InputMoment.mean_output].
        siblings: Those of what is like each of them and is to stay, `(k, m)`.
        explained_variance: The share to keep.

    Returns:
        `(m, q)`, orthonormal columns, in float64.

    Raises:
        ValueError: The shapes differ, a pair does not differ, or the share is out of range.

    Examples:
        >>> contrast_directions(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])).abs().T
        tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    if targets.dim() != 2 or targets.shape != siblings.shape:
        raise ValueError(
            f"`targets` and `siblings` must be means `(k, m)` of one shape, got {tuple(targets.shape)} and "
            f"{tuple(siblings.shape)}. Give each target its sibling."
        )
    contrasts = targets.double() - siblings.double()
    lengths = torch.linalg.vector_norm(contrasts, dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError("`targets` must differ from `siblings`, got a pair that does not. Leave it out.")
    _, values, right = torch.linalg.svd(contrasts / lengths, full_matrices=False)
    return right.mT[:, : rank_for_energy(values, explained_variance)]
