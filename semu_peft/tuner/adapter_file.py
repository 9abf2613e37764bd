"""Check an adapter file by its header alone, before a model is changed for its sake."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from semu_peft.files import save_tensors

from .keys import layer_of, without_prefix, without_wrappers


def replace_pickle(folder: Path) -> None:
    """Write as safetensors what PEFT has just pickled (`save_pretrained(..., safe_serialization=False)`), and warn.

    Files that are older than the safetensors beside them, or another method's, are left alone.

    Args:
        folder: The folder that an adapter is being saved to; its configuration is written after its weights.
    """
    pickled, path = folder / WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    if not pickled.is_file() or (path.is_file() and path.stat().st_mtime_ns >= pickled.stat().st_mtime_ns):
        return
    try:
        tensors: Any = torch.load(pickled, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError):  # not what was written just now
        return
    if not isinstance(tensors, dict) or not any(".semu_" in str(key) for key in tensors):
        return
    save_tensors(path, {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, {"format": "pt"})
    pickled.unlink()
    warnings.warn(
        f"`safe_serialization` must be True for a SEMU adapter, got False. Its file is {path.name} all the same: "
        "nothing is pickled.",
        stacklevel=4,
    )


def check_adapter_file(folder: Path, expected_ranks: Mapping[str, int]) -> None:
    """Check that the safetensors file in `folder` is whole, is a SEMU adapter and has the ranks of its configuration.

    Only the header is read. A folder without the file passes: PEFT itself says that there are no weights.

    Args:
        folder: The adapter folder, as written by `save_pretrained`.
        expected_ranks: Rank by full layer name, `ranks` of the configuration in the same folder.

    Raises:
        ValueError: The file is truncated or no safetensors file, holds no SEMU weights, or its ranks differ.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}). Expected the file that `save_pretrained` of a SEMU "
            "adapter writes: save, copy or download it again."
        ) from error
    cores = {key: shape for key, shape in shapes.items() if key.endswith(".semu_core")}
    if not cores:
        example = next(iter(shapes), "nothing")
        raise ValueError(
            f"{path} holds no SEMU weights (found {example!r}). Expected entries that end in `.semu_U`, `.semu_V` and "
            "`.semu_core`: this file belongs to another PEFT method, load it with that method's adapter_config.json."
        )
    ranks = {without_prefix(layer_of(key) or ""): shape[-1] for key, shape in cores.items()}
    # Where parameters are corrected instead of a layer, the file has the module that holds them, once for each.
    owners = {without_wrappers(name) for name in ranks if name not in expected_ranks}
    lacking = sorted(name for name in set(expected_ranks) - set(ranks) if not _inside(name, owners))
    if lacking:
        raise ValueError(
            f"{path} has no weights for layer {lacking[0]!r} ({len(lacking)} such), which `ranks` of the "
            "adapter_config.json beside it names. Take both files from one `save_pretrained`."
        )
    for name, rank in ranks.items():
        owned = [known for key, known in expected_ranks.items() if _inside(key, {without_wrappers(name)})]
        expected = [expected_ranks[name]] if name in expected_ranks else owned or [0]
        if expected_ranks and rank not in expected:
            raise ValueError(
                f"{path} has rank {rank} at layer {name!r} where `ranks` of the adapter_config.json beside "
                f"it says {expected[0]}. The two files are not from one adapter: take both from one `save_pretrained`."
            )


def _inside(parameter: str, owners: set[str]) -> bool:
    parts = parameter.split(".")
    return any(".".join(parts[:count]) in owners for count in range(1, len(parts)))
