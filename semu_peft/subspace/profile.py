"""What an initialisation found: the spectrum of every layer's forget gradient and the rank it was given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's forget gradient, as its singular values tell it.

    Attributes:
        singular_values: `(k,)`, descending; `(channels, k)` for a convolution read channel by channel.
        rank: The number of directions kept.
        explained_variance: The share of the energy that they hold.
        shape: The shape of the matrix (or batch of matrices) that was factorised.
    """

    singular_values: Tensor
    rank: int
    explained_variance: float
    shape: tuple[int, ...]

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the gradient."""
        return float(self.singular_values.double().square().sum())


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
        """Rank by layer name, as it stands in `SemuConfig.rank_pattern`."""
        return {name: layer.rank for name, layer in self.layers.items()}
