"""What an initialisation found: every layer's spectrum, directions and rank, to look at, keep and use again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from semu_peft.files import written_whole
from semu_peft.linalg.energy import rank_for_energy
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.layer import SemuLayer

from .ranks import Candidate, RankBudget, spread_budget
from .retain import Overlap

_METADATA = "semu_subspace_profile"


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's forget gradient, as its leading singular directions tell it.

    Attributes:
        directions: The directions that are known, at least as many as the rank, with all known singular values,
            `(q,)` or `(channels, q)` for a convolution read channel by channel.
        rank: The number of directions that the adapter was given.
        shape: The shape of the matrix (or batch of matrices) that was factorised.
        overlap: With retain data: how far the forget basis lay in the retain subspace, before anything was removed.
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


@dataclass(frozen=True)
class SubspaceProfile:
    """The spectra of all layers of an adapter, by layer name.

    Attributes:
        layers: One [`LayerSpectrum`][semu_peft.subspace.profile.LayerSpectrum] a layer, in the model's order.
        batches: How many forget batches the gradients were summed over.
    """

    layers: dict[str, LayerSpectrum]
    batches: int

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by layer name, as it stands in `SemuConfig.ranks`."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def initialize(
        self,
        model: nn.Module,
        *,
        explained_variance: float | None = None,
        rank_budget: RankBudget | None = None,
        adapter_name: str = "default",
    ) -> SubspaceProfile:
        """Initialise an adapter again, at another γ or budget, from these directions: no data is touched.

        Args:
            model: A model with a SEMU adapter on the layers of this profile.
            explained_variance: γ in (0, 1] for all layers; by default the ranks of this profile.
            rank_budget: One budget for all layers, see [`RankBudget`][semu_peft.subspace.ranks.RankBudget].
            adapter_name: The adapter to initialise; its core starts at zero again.

        Returns:
            This profile with the new ranks.

        Raises:
            ValueError: The adapter's layers are not those of the profile, or a layer needs more directions than the
                profile keeps. The adapter is unchanged then.
        """
        layers = semu_layers(model, adapter_name)
        shapes = {name: layer.matrix_shape(adapter_name) for name, layer in layers.items()}
        if shapes != {name: layer.shape for name, layer in self.layers.items()}:
            odd = sorted(set(shapes.items()) ^ {(name, layer.shape) for name, layer in self.layers.items()})
            raise ValueError(
                f"The profile does not fit the adapter {adapter_name!r}: they differ at {odd[:2]} ({len(odd)} "
                "differences). Use it with the model and the target layers that it was made with."
            )
        ranks = self.ranks
        if explained_variance is not None:
            ranks = {name: _rank_within(name, layer, explained_variance) for name, layer in self.layers.items()}
        if rank_budget is not None:
            ranks = budget_ranks({name: layer.directions for name, layer in self.layers.items()}, layers, adapter_name,
                                 rank_budget, ranks if explained_variance is not None else None)  # fmt: skip
        for name, layer in layers.items():
            give_basis(layer, adapter_name, self.layers[name].directions.leading(ranks[name]))
        return SubspaceProfile(
            {
                name: LayerSpectrum(layer.directions, ranks[name], layer.shape, layer.overlap)
                for name, layer in self.layers.items()
            },
            self.batches,
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
        with written_whole(path) as file:
            save_file(tensors, file, metadata={"format": "pt", _METADATA: text})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> SubspaceProfile:
        """Read a profile that [`save`][semu_peft.subspace.profile.SubspaceProfile.save] wrote.

        Raises:
            ValueError: The file is damaged or not a profile.
            FileNotFoundError: There is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"`path`: there is no file {path}; expected one that `SubspaceProfile.save` wrote.")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); save the profile again.") from error
        if text is None:
            raise ValueError(f"{path} is no subspace profile; expected a file that `SubspaceProfile.save` wrote.")
        described = json.loads(text)
        layers = {}
        for name, layer in described["layers"].items():
            directions = SingularFactors(
                tensors[f"{name}.left"],
                tensors[f"{name}.right"],
                tensors[f"{name}.singular_values"],
                tensors[f"{name}.energy"],
                layer["estimated"],
            )
            overlap = None
            if f"{name}.overlap_inputs" in tensors:
                overlap = Overlap(tensors[f"{name}.overlap_inputs"], tensors[f"{name}.overlap_outputs"])
            layers[name] = LayerSpectrum(directions, layer["rank"], tuple(layer["shape"]), overlap)
        return cls(layers, described["batches"])


def give_basis(layer: SemuLayer, adapter_name: str, directions: SingularFactors) -> None:
    """Put directions into a layer as its frozen bases."""
    layer.set_basis(adapter_name, directions.left, directions.right)


def budget_ranks(
    directions: Mapping[str, SingularFactors],
    layers: Mapping[str, SemuLayer],
    adapter_name: str,
    budget: RankBudget,
    caps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Spread a budget over layers, each bidding with the directions that are known of it (`caps` at the most)."""
    candidates = {}
    for name, factors in directions.items():
        kept = factors if caps is None else factors.leading(caps[name])
        energies = kept.singular_values[..., : kept.rank].double().square()
        batched = energies.dim() == 2
        candidates[name] = Candidate(
            energies.sum(0) if batched else energies,
            float(factors.energy.sum()),
            layers[name].configs[adapter_name].core == "diagonal",
            energies.shape[0] if batched else 1,
        )
    return spread_budget(candidates, budget)


def _rank_within(name: str, layer: LayerSpectrum, explained_variance: float) -> int:
    known = layer.directions
    rank = rank_for_energy(known.singular_values, explained_variance, known.energy)
    if rank > known.rank or (known.rank and known.leading(rank).explained_variance < explained_variance - 1e-6):
        raise ValueError(
            f"The profile keeps {known.rank} directions of layer {name!r}, which explain "
            f"{known.explained_variance:.4f} of its energy: too few for `explained_variance={explained_variance}`. "
            "Initialise from the data with `keep_explained_variance` at least as large."
        )
    return rank
