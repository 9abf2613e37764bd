"""A new adapter as the weighted sum of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_number
from semu_peft.linalg.core import LowRank, diagonal, eckart_young, exact_svd, orthonormal

from .layer import SemuLayer

CombinationType = Literal["cat", "svd", "linear", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


@dataclass(frozen=True)
class AdapterSum:
    """How adapters are added up at one layer; the arguments are those of
    [`add_weighted_adapter`][semu_peft.tuner.model.SemuModel.add_weighted_adapter].

    Raises:
        ValueError: An argument is unknown, out of range or missing, or there is not one weight for each adapter.

    Examples:
        >>> import torch
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner import Linear
        >>> from semu_peft.tuner.weighted import AdapterSum
        >>> layer = Linear(torch.nn.Linear(6, 5), "cats", SemuConfig(r=2, init_weights=False), "fc")
        >>> total = AdapterSum(["cats"], [0.5], "cat").at(layer, "fc")
        >>> dense = total.left @ total.core @ total.right.mT
        >>> torch.allclose(dense.float(), 0.5 * layer.get_delta_weight("cats"), atol=1e-6)
        True
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: CombinationType = "svd"
    svd_rank: int | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        for name in ("adapters", "weights"):
            wanted, mend = f"a list of {'names' if name == 'adapters' else 'numbers'}", "Put one into a list as well."
            check_kind(name, getattr(self, name), (list, tuple), wanted, mend)
        for weight in self.weights:
            check_number("weights", weight)
        check_count("svd_rank", self.svd_rank, optional=True)
        if self.density is not None:
            check_number("density", self.density, low=0, high=1)
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(
                f"`majority_sign_method` must be 'total' or 'frequency', got {self.majority_sign_method!r}. "
                "'total' weighs the entries by their size."
            )
        if not self.adapters or len(self.adapters) != len(self.weights):
            raise ValueError(
                "`adapters` and `weights` must have the same length of at least 1, got "
                f"{len(self.adapters)} and {len(self.weights)}."
            )
        if self.combination_type not in get_args(CombinationType):
            raise ValueError(
                f"Invalid combination_type: {self.combination_type!r}. SEMU knows {get_args(CombinationType)}; those "
                "of LoRA that work on single entries of its two factors have no counterpart here."
            )
        if self._elementwise and (self.density is None or not 0 <= self.density <= 1):
            raise ValueError(
                f"`combination_type={self.combination_type!r}` needs `density`, the share of entries to keep, in "
                f"[0, 1]; got {self.density!r}."
            )

    @property
    def _elementwise(self) -> bool:
        return self.combination_type not in ("cat", "svd", "linear")

    @torch.no_grad()
    def at(self, layer: SemuLayer, name: str) -> LowRank:
        """The sum at one layer, of those adapters that the layer carries, as `U`, `V` and a full core.

        Args:
            layer: The layer.
            name: Its name, for errors.

        Raises:
            ValueError: The adapters have different bases where the combination adds up their cores.
        """
        parts = [(key, weight) for key, weight in zip(self.adapters, self.weights, strict=True) if key in layer.r]
        if self.combination_type == "linear":
            return self._sum_of_cores(layer, name, parts)
        largest = max(layer.r[key] for key, _ in parts)
        if self._elementwise:
            return diagonal(exact_svd(self._dense_sum(layer, parts)).leading(self.svd_rank or largest))
        total = orthonormal(_concatenated(layer, parts))
        if self.combination_type == "svd":
            return diagonal(eckart_young(total).leading(self.svd_rank or largest))
        square = total.core.shape[-1] == total.core.shape[-2]
        return total if square else diagonal(eckart_young(total))

    def _sum_of_cores(self, layer: SemuLayer, name: str, parts: list[tuple[str, float]]) -> LowRank:
        first = parts[0][0]
        left, right = layer.semu_U[first], layer.semu_V[first]
        if any(
            not torch.equal(layer.semu_U[key], left) or not torch.equal(layer.semu_V[key], right) for key, _ in parts
        ):
            raise ValueError(
                f"`combination_type='linear'` adds up cores, and the adapters have different bases at layer {name!r}. "
                "Use 'cat', which is exact, or 'svd', the best sum of lower rank."
            )
        return LowRank(left, right, sum((weight * layer.get_core(key) for key, weight in parts), torch.zeros(())))

    def _dense_sum(self, layer: SemuLayer, parts: list[tuple[str, float]]) -> Tensor:
        rules: dict[str, Callable[..., Tensor]] = {
            "ties_svd": ties,
            "dare_linear_svd": dare_linear,
            "dare_ties_svd": dare_ties,
            "magnitude_prune_svd": magnitude_prune,
        }
        deltas = [layer.weight_to_matrix(layer.get_delta_weight(key), key) for key, _ in parts]
        weights = torch.tensor([weight for _, weight in parts], dtype=deltas[0].dtype, device=deltas[0].device)
        options = [self.majority_sign_method] if "ties" in self.combination_type else []
        return rules[self.combination_type](deltas, weights, self.density, *options)


def check_summable(adapters: Sequence[str], configs: Sequence[Any], layers: Mapping[str, SemuLayer]) -> None:
    """Raise where the adapters train what has no sum, or read the same convolutions differently."""
    if any(config.trainable_token_indices for config in configs):
        raise ValueError("Adapters with `trainable_token_indices` cannot be added up: their rows are not weighted.")
    if any(config.target_experts != configs[0].target_experts for config in configs):
        raise ValueError(
            f"{adapters} correct different `target_experts`, whose bases lie side by side. Merge them instead."
        )
    convolutions = [key for key, layer in layers.items() if layer.base_weight.dim() > 2]
    if convolutions and len({config.conv_mode for config in configs}) > 1:
        raise ValueError(
            f"{adapters} read convolutions ({convolutions[0]!r} …) with different `conv_mode`, so their bases have "
            "nothing in common. Combine adapters of one `conv_mode`."
        )


def config_of_the_sum(configs: Mapping[str, Any], target_modules: list[str] | str, ranks: dict[str, int]) -> Any:
    """The configuration of an adapter that is the sum of others, with these targets and ranks."""
    first, *_ = every = list(configs.values())
    return replace(
        first,
        target_modules=target_modules,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted({name for config in every for name in config.modules_to_save or []}) or None,
        rank_pattern={},
        ranks=ranks,
        offsets=[],
        forgotten={prompt: given for config in every for prompt, given in config.forgotten.items()},
        parents=list(configs),
        r=None,
        core="full",
        init_weights=True,
        bias="none",
    )


def modules_to_save_of(model: nn.Module, adapters: list[str]) -> dict[ModulesToSaveWrapper, str]:
    """The modules that one of the adapters trains in full, and which.

    Raises:
        ValueError: Several of them train the same module, which cannot be added up.
    """
    found: dict[ModulesToSaveWrapper, str] = {}
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            users = [adapter for adapter in adapters if adapter in wrapper.modules_to_save]
            if len(users) > 1:
                raise ValueError(
                    "Cannot add weighted adapters if they target the same module with modules_to_save, but "
                    f"{users} all train {name!r}."
                )
            if users:
                found[wrapper] = users[0]
    return found


def _concatenated(layer: SemuLayer, parts: list[tuple[str, float]]) -> LowRank:
    """`Σ wᵢ Uᵢ Rᵢ Vᵢᵀ` as one `U R Vᵀ` with `U = [U₁ U₂ …]`, `V = [V₁ V₂ …]` and `R = diag(w₁ R₁, w₂ R₂, …)`."""
    left = torch.cat([layer.semu_U[key] for key, _ in parts], -1)
    right = torch.cat([layer.semu_V[key] for key, _ in parts], -1)
    ranks = [layer.r[key] for key, _ in parts]
    blocks = left.new_zeros(*left.shape[:-2], sum(ranks), sum(ranks))
    start = 0
    for (key, weight), rank in zip(parts, ranks, strict=True):
        blocks[..., start : start + rank, start : start + rank] = weight * layer.get_core(key)
        start += rank
    return LowRank(left, right, blocks)
