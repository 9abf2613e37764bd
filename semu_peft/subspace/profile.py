"""What an initialisation found: every layer's spectrum, directions and rank, to look at, keep and use again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from semu_peft.arguments import check_share
from semu_peft.files import load_tensors, save_tensors
from semu_peft.linalg.factorize import SingularFactors, explained_variances
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.loading import impossible_tensor

from .fill import check_plan, fill, layers_to_fill
from .ranks import RankBudget, explained_variance_of, plan_ranks
from .retain import Overlap
from .starts import Start

_METADATA = "semu_subspace_profile"


@dataclass(frozen=True, repr=False)
class LayerSpectrum:
    """One layer's forget gradient, as its leading singular directions tell it.

    Attributes:
        directions: The directions that are known, at least as many as the rank, with all known singular values,
            `(q,)` or `(channels, q)` for a convolution read channel by channel; on the device where they were found.
        rank: The number of directions that the adapter was given.
        shape: The shape of the matrix (or batch of matrices) that was factorised.
        overlap: With retain data: how far the forget basis lay in the retain subspace, before anything was removed.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), SemuConfig(target_modules=["0"]))
        >>> forget = [(torch.randn(8, 6), torch.arange(8) % 4)]
        >>> spectrum = initialize_semu_weights(model, forget, objectives.RandomLabel(), progress=False).layers["0"]
        >>> spectrum.shape, spectrum.explained_variance >= 0.9
        ((4, 6), True)
    """

    directions: SingularFactors
    rank: int
    shape: tuple[int, ...]
    overlap: Overlap | None = None

    @property
    def singular_values(self) -> Tensor:
        """All that are known, descending."""
        return self.directions.singular_values

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the gradient."""
        return float(self.directions.energy.sum())

    @property
    def explained_variance(self) -> float:
        """The share of the energy that the adapter's directions hold (of the worst matrix in a batch)."""
        return self.directions.leading(self.rank).explained_variance

    @property
    def estimated(self) -> bool:
        """Whether the figures come from a sketch."""
        return self.directions.estimated

    def __repr__(self) -> str:
        return (
            f"LayerSpectrum(rank={self.rank} of {min(self.shape[-2:])}, shape={self.shape}, "
            f"explained_variance={self.explained_variance:.3f}, estimated={self.estimated})"
        )


@dataclass(frozen=True, repr=False)
class SubspaceProfile:
    """The spectra of all layers of an adapter, by layer name.

    Attributes:
        layers: One [`LayerSpectrum`][semu_peft.subspace.profile.LayerSpectrum] a layer, in the model's order.
        batches: How many forget batches the gradients were summed over.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, SubspaceProfile, initialize_semu_weights, objectives
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), SemuConfig(target_modules=["0"]))
        >>> forget = [(torch.randn(8, 6), torch.arange(8) % 4)]
        >>> profile = initialize_semu_weights(model, forget, objectives.RandomLabel(), progress=False)
        >>> path = profile.save(f"{tempfile.mkdtemp()}/profile.safetensors")
        >>> SubspaceProfile.load(path).layers["0"].shape
        (4, 6)
    """

    layers: dict[str, LayerSpectrum]
    batches: int

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by layer name, as it stands in `SemuConfig.ranks`."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def __repr__(self) -> str:
        ranks = self.ranks.values()
        return (
            f"SubspaceProfile({len(ranks)} layers, {sum(ranks)} directions, ranks {min(ranks, default=0)} to "
            f"{max(ranks, default=0)}, batches={self.batches})"
        )

    def initialize(
        self,
        model: nn.Module,
        *,
        explained_variance: float | None = None,
        start: Start | None = None,
        rank_budget: RankBudget | None = None,
        overwrite: bool = False,
        adapter_name: str = "default",
    ) -> SubspaceProfile:
        """Initialise an adapter again, at another γ or budget, from these directions: no data is touched.

        Args:
            model: A model with a SEMU adapter on the layers of this profile.
            explained_variance: γ in (0, 1] for all layers; by default what the adapter's configuration says.
            start: What the training starts from, see [`starts`][semu_peft.subspace.starts.base]; by default a core of
                zeros.
            rank_budget: One budget for all layers, see [`RankBudget`][semu_peft.subspace.ranks.RankBudget].
            overwrite: Start an adapter afresh that has been trained.
            adapter_name: The adapter to initialise.

        Returns:
            This profile with the new ranks.

        Raises:
            ValueError: The adapter's layers are not those of the profile, a layer needs more directions than the
                profile keeps, or the adapter has been trained. The adapter is unchanged then.
        """
        check_share("explained_variance", explained_variance, optional=True)
        check_plan(rank_budget, start)
        if getattr(start, "transform", "none") != "none":
            raise ValueError(f"`start`: {start!r} changes the gradient, which a profile no longer has. Give batches.")
        layers = layers_to_fill(model, adapter_name, overwrite)
        self._check_fit(layers, adapter_name)
        found = {name: self.layers[name].directions for name in layers}
        ranks = plan_ranks(
            found, layers, explained_variance=explained_variance, budget=rank_budget, adapter_name=adapter_name
        )
        if rank_budget is None:
            self._check_extent(layers, ranks, explained_variance, adapter_name)
        others = fill(layers, {name: found[name].leading(ranks[name]) for name in layers}, start, adapter_name)
        spectra = {
            name: replace(spectrum, rank=layers[name].r[adapter_name], directions=others.get(name, spectrum.directions))
            for name, spectrum in self.layers.items()
        }
        return replace(self, layers=spectra)

    def _check_fit(self, layers: Mapping[str, SemuLayer], adapter_name: str) -> None:
        shapes = {name: layer.matrix_shape(adapter_name) for name, layer in layers.items()}
        odd = sorted(set(shapes.items()) ^ {(name, layer.shape) for name, layer in self.layers.items()})
        if odd:
            raise ValueError(
                f"The profile does not fit the adapter {adapter_name!r}: they differ at {odd[:2]} ({len(odd)} "
                "differences). Use it with the model and the target layers that it was made with."
            )

    def _check_extent(
        self,
        layers: Mapping[str, SemuLayer],
        ranks: Mapping[str, int],
        explained_variance: float | None,
        adapter_name: str,
    ) -> None:
        """Raise where γ asks for more directions of a layer than the profile keeps."""
        whole = {
            name: spectrum.directions
            for name, spectrum in self.layers.items()
            if ranks[name] == spectrum.directions.rank and ranks[name] not in (0, layers[name].configs[adapter_name].r)
        }
        for (name, known), share in zip(whole.items(), explained_variances(list(whole.values())), strict=True):
            gamma = explained_variance or explained_variance_of(layers[name].configs[adapter_name], name)
            if known.estimated or share >= gamma - 1e-6:
                continue
            raise ValueError(
                f"The profile keeps {known.rank} directions of layer {name!r}, which explain {share:.4f} of its "
                f"energy: too few for `explained_variance={gamma}`. Initialise from the data with "
                "`keep_explained_variance` at least as large, or pass a `rank_budget`."
            )

    def save(self, path: str | Path) -> Path:
        """Write the profile as one safetensors file.

        Returns:
            The path written.
        """
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, layer in self.layers.items():
            directions = layer.directions
            parts = {
                "left": directions.left,
                "right": directions.right,
                "singular_values": directions.singular_values,
                "energy": directions.energy,
            }
            if layer.overlap is not None:
                parts |= {"overlap_inputs": layer.overlap.inputs, "overlap_outputs": layer.overlap.outputs}
            tensors |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in parts.items()}
            described[name] = {"rank": layer.rank, "shape": layer.shape, "estimated": layer.estimated}
        text = json.dumps({"batches": self.batches, "layers": described})
        return save_tensors(path, tensors, {_METADATA: text})

    @classmethod
    def load(cls, path: str | Path) -> SubspaceProfile:
        """Read a profile that [`save`][semu_peft.subspace.profile.SubspaceProfile.save] wrote.

        Raises:
            ValueError: The file is damaged or not a profile.
            FileNotFoundError: There is no such file.
        """
        tensors, metadata = load_tensors(path, "SubspaceProfile.save")
        if _METADATA not in metadata:
            raise ValueError(f"`path` must be a file that `SubspaceProfile.save` wrote, got {path}, which is another.")
        try:
            described = json.loads(metadata[_METADATA])
            layers = {name: _read_layer(tensors, name, layer) for name, layer in described["layers"].items()}
            return cls(layers, int(described["batches"]))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). Save the profile again.") from error


def _read_layer(tensors: Mapping[str, Tensor], name: str, described: Mapping[str, Any]) -> LayerSpectrum:
    left, right, values, energy = (tensors[f"{name}.{part}"] for part in ("left", "right", "singular_values", "energy"))
    rank, shape = described["rank"], tuple(int(size) for size in described["shape"])
    if not isinstance(rank, int) or not 0 <= rank <= left.shape[-1] or left.shape[-1] != right.shape[-1]:
        raise ValueError(f"layer {name!r} has rank {rank!r} and {left.shape[-1]} directions")
    if left.shape[:-1] != (*shape[:-2], shape[-2]) or right.shape[:-1] != (*shape[:-2], shape[-1]):
        raise ValueError(f"layer {name!r} has shape {shape} and directions of other lengths")
    bases = {f"{name}.semu_U": left, f"{name}.semu_V": right}
    if problem := impossible_tensor(bases | {f"{name}.semu_core": values}):
        raise ValueError(problem)
    overlap = None
    if f"{name}.overlap_inputs" in tensors:
        overlap = Overlap(tensors[f"{name}.overlap_inputs"], tensors[f"{name}.overlap_outputs"])
    return LayerSpectrum(
        SingularFactors(left, right, values, energy, bool(described["estimated"])), rank, shape, overlap
    )
