"""What is in a saved adapter, and what two have in common: read from their folders, without the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from semu_peft.arguments import check_path
from semu_peft.files import load_tensors
from semu_peft.linalg.angles import principal_cosines
from semu_peft.linalg.core import LowRank, exact_svd, orthonormal
from semu_peft.tuner.adapter_file import check_adapter_file, matching_weights, read_settings
from semu_peft.tuner.keys import layer_of, without_prefix


@dataclass(frozen=True)
class LayerSummary:
    """One corrected layer of a saved adapter.

    Attributes:
        shape: Rows and columns of the weight as the adapter reads it, and how many such matrices there are.
        rank: How many directions it corrects.
        norm: `‖ΔW‖_F`.
        largest: The largest singular value of `ΔW`.
        energy: Its part of the whole adapter's `‖ΔW‖²_F`.
        parameters: How many numbers were trained.

    Examples:
        >>> LayerSummary(shape=(1, 8, 4), rank=2, norm=5.0, largest=4.0, energy=1.0, parameters=4).rank
        2
    """

    shape: tuple[int, int, int]
    rank: int
    norm: float
    largest: float
    energy: float
    parameters: int


@dataclass(frozen=True)
class AdapterSummary:
    """A saved adapter.

    Attributes:
        layers: Its layers by name.
        base_model: The model that it was made for, as its configuration has it.
        forgotten: The prompts that it was made to forget, and what each gives, where it says so.
        file_bytes: Size of the weights.
        digest: `"ok"`, `"absent"` in folders from before it was written, or what is wrong.
        parents: The adapters that it was made of or beside, by the names that they had.
        settings: Its configuration.

    Examples:
        >>> AdapterSummary({}, "gpt2", {}, 0, "ok")
        AdapterSummary(base_model='gpt2', digest='ok', 0 layers, 0 directions, ‖ΔW‖ = 0)
    """

    layers: Mapping[str, LayerSummary]
    base_model: str | None
    forgotten: Mapping[str, list[str]]
    file_bytes: int
    digest: str
    parents: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def norm(self) -> float:
        """`‖ΔW‖_F` of all layers together."""
        return sum(layer.norm**2 for layer in self.layers.values()) ** 0.5

    def __repr__(self) -> str:
        directions = sum(layer.rank for layer in self.layers.values())
        return (
            f"AdapterSummary(base_model={self.base_model!r}, digest={self.digest!r}, {len(self.layers)} layers, "
            f"{directions} directions, ‖ΔW‖ = {self.norm:.4g})"
        )


@dataclass(frozen=True)
class LayerOverlap:
    """What the corrections of one layer by two adapters have in common.

    Attributes:
        left: `‖U₁ᵀ U₂‖²_F / min(r₁, r₂)`: 1 where one space of output directions holds the other, 0 where they are
            orthogonal.
        right: The same of the input directions `V`.
        cosine: `⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)`: 1 where both do the same, −1 where one undoes the other; None where one of
            them is zero, so that there is nothing to compare.
        angles: Cosines of the principal angles between the output directions, the largest first.
        norms: `‖ΔW₁‖_F` and `‖ΔW₂‖_F`.

    Examples:
        >>> LayerOverlap(left=1.0, right=0.5, cosine=0.0, angles=(1.0,), norms=(2.0, 3.0)).right
        0.5
    """

    left: float
    right: float
    cosine: float | None
    angles: tuple[float, ...] = field(repr=False)
    norms: tuple[float, float] = field(repr=False)


def inspect_adapter(folder: str | Path) -> AdapterSummary:
    """Read ranks, norms, energies and digest of a saved adapter. Nothing in the folder is run or unpickled.

    Args:
        folder: The folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: There is no adapter in it.
        ValueError: It is damaged, or another method's.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.adapter.saved import inspect_adapter
        >>> config, folder = SemuConfig(target_modules=["0"], r=2, init_weights=False), tempfile.mkdtemp()
        >>> get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config).save_pretrained(folder)
        >>> found = inspect_adapter(folder)
        >>> found.layers["0"].shape, found.layers["0"].rank, found.digest
        ((1, 5, 6), 2, 'ok')
    """
    settings, corrections, path = _read(folder)
    _, problem = matching_weights(Path(folder), settings.get("weights_sha256"))
    total = sum(float(each.core.square().sum()) for each in corrections.values())
    layers = {}
    for name, (left, right, core) in corrections.items():
        values = exact_svd(core).singular_values if min(core.shape) else core.new_zeros(1)
        squares = float(core.square().sum())
        layers[name] = LayerSummary(
            (left.shape[0], left.shape[1], right.shape[1]), core.shape[-1], squares**0.5, float(values.max()),
            squares / total if total else 0.0,
            core.shape[0] * core.shape[-1] * (1 if settings.get("core") == "diagonal" else core.shape[-1]),
        )  # fmt: skip
    digest = problem or ("ok" if settings.get("weights_sha256") else "absent")
    base, forgotten = settings.get("base_model_name_or_path"), settings.get("forgotten") or {}
    parents = settings.get("parents") or []
    return AdapterSummary(layers, base, forgotten, path.stat().st_size, digest, parents, settings)


def compare_adapters(first: str | Path, second: str | Path) -> dict[str, LayerOverlap]:
    """Say how far two saved adapters correct the same directions, for each layer that both correct.

    Adapters that share few directions can be added up; where the cosine is negative one undoes the other.

    Args:
        first: A folder that `save_pretrained` wrote.
        second: Another one, made for the same base model.

    Raises:
        FileNotFoundError: There is no adapter in one of them.
        ValueError: One is damaged or another method's, or a layer has another shape in the other adapter.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.adapter.saved import compare_adapters
        >>> config, folder = SemuConfig(target_modules=["0"], r=2, init_weights=False), tempfile.mkdtemp()
        >>> get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config).save_pretrained(folder)
        >>> compare_adapters(folder, folder)
        {'0': LayerOverlap(left=1.0, right=1.0, cosine=1.0)}
    """
    ours, theirs = _read(first)[1], _read(second)[1]
    return {name: _overlap(name, ours[name], theirs[name]) for name in ours if name in theirs}


def _overlap(name: str, first: LowRank, second: LowRank) -> LayerOverlap:
    if first.left.shape[:2] != second.left.shape[:2] or first.right.shape[:2] != second.right.shape[:2]:
        raise ValueError(
            f"`second` must correct layer {name!r} in the shape that `first` has, got other rows or columns. Compare "
            "adapters of the same base model."
        )
    norms = float(first.core.norm()), float(second.core.norm())
    if not (first.core.shape[-1] and second.core.shape[-1]):
        return LayerOverlap(0.0, 0.0, None, (), norms)
    cosines = [principal_cosines(ours, theirs) for ours, theirs in zip(first[:2], second[:2], strict=True)]
    across = (first.left.mT @ second.left) @ second.core @ (second.right.mT @ first.right)
    inner = float((first.core * across).sum()) / (norms[0] * norms[1]) if all(norms) else None
    left, right = (round(float(each.square().mean()), 6) for each in cosines)
    cosine = None if inner is None else round(inner, 6)
    return LayerOverlap(left, right, cosine, tuple(cosines[0].mean(0).tolist()), norms)


def _read(folder: str | Path) -> tuple[dict[str, Any], dict[str, LowRank], Path]:
    """The configuration, each layer's correction with orthonormal bases and a batch dimension, and the file."""
    check_path("folder", folder)
    place = Path(folder)
    path = place / SAFETENSORS_WEIGHTS_NAME
    for file in (place / CONFIG_NAME, path):
        if not file.is_file():
            raise FileNotFoundError(
                f"`folder`: there is no {file}. Give the folder that `save_pretrained` wrote: {CONFIG_NAME} and "
                f"{SAFETENSORS_WEIGHTS_NAME} are in it."
            )
    settings = read_settings(place / CONFIG_NAME)
    check_adapter_file(path, {})
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path, "save_pretrained")[0].items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path} is damaged: {key!r} must have finite numbers. Save, copy or download the adapter again."
            )
        if layer := layer_of(key):
            tensors.setdefault(without_prefix(layer), {})[key.rpartition(".")[2]] = tensor
    return settings, {name: _correction(name, parts, path) for name, parts in tensors.items()}, path


def _correction(name: str, parts: Mapping[str, Tensor], path: Path) -> LowRank:
    if missing := {"semu_U", "semu_V", "semu_core"} - set(parts):
        raise ValueError(f"{path} has no {min(missing)} of layer {name!r}. Save, copy or download the adapter again.")
    left, right, core = (parts[kind].double() for kind in ("semu_U", "semu_V", "semu_core"))
    core = core - parts["semu_offset"].double() if "semu_offset" in parts else core
    core = torch.diag_embed(core) if core.dim() < left.dim() else core
    shapes = left.shape[:-2], left.shape[-1:], core.shape[:-2]
    if left.dim() not in (2, 3) or core.shape[-2:] != (left.shape[-1], right.shape[-1]) or shapes[0] != shapes[2]:
        raise ValueError(
            f"{path} has tensors at layer {name!r} that do not fit each other: {tuple(left.shape)}, "
            f"{tuple(right.shape)} and {tuple(core.shape)}. Save, copy or download the adapter again."
        )
    product = LowRank(left, right, core)
    return LowRank(*(part if part.dim() == 3 else part[None] for part in orthonormal(product)))
