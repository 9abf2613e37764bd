"""The two files of an adapter belong together: what says so, and is checked before a model is changed for its sake."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from semu_peft.files import digest_of, follow_umask, save_tensors

from .keys import layer_of, without_prefix, without_wrappers
from .peft_type import NAME


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


def read_settings(path: Path) -> dict[str, Any]:
    """Read an `adapter_config.json`.

    Raises:
        ValueError: It is damaged, or the configuration of another PEFT method.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): save, copy or download the adapter again.") from error
    found = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
    if found != NAME:
        raise ValueError(
            f"{path} must be the configuration of a SEMU adapter, with `peft_type` {NAME!r}, got {found!r}. Load it "
            "with the class of its own method, or save, copy or download the adapter again."
        )
    ranks = settings.get("ranks") or {}
    if not are_ranks(ranks):
        raise ValueError(
            f"{path} is damaged: `ranks` must map layer names to ranks of 0 or more, got {ranks!r}. Save, copy or "
            "download the adapter again."
        )
    settings.pop("runtime_config", None)
    return settings


def are_ranks(value: object) -> bool:
    """Whether a value maps names to ranks of 0 or more, as a configuration has them.

    Examples:
        >>> are_ranks({"0": 4}), are_ranks({"0": True}), are_ranks([4])
        (True, False, False)
    """
    ranks = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in ranks)


def weights_file(folder: Path) -> Path | None:
    """The file of an adapter folder that PEFT loads, if there is one."""
    return next((path for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (path := folder / name).is_file()), None)


def keep_weights(folder: Path) -> str | None:
    """Give the digest of the weights that were just written, and keep them under a second name.

    PEFT replaces the weights first and the configuration, with its digest, a moment later. Who reads in that moment, or
    after a kill in it, takes the old ones by their second name; it is a hard link and takes no room.
    """
    path = weights_file(folder)
    if path is None:
        return None
    digest = digest_of(path)
    if path.name == SAFETENSORS_WEIGHTS_NAME:
        try:
            _kept(folder, digest).unlink(missing_ok=True)
            os.link(path, _kept(folder, digest), follow_symlinks=False)
        except (OSError, NotImplementedError):
            pass  # a file system without hard links: such a moment is then refused
    return digest


def forget_older_weights(folder: Path, digest: str | None) -> None:
    """Remove what `keep_weights` kept of other weights than the configuration's, once that is written."""
    for path in folder.glob(_kept(Path(), "*").name):
        if digest is None or path.name != _kept(folder, digest).name:
            path.unlink(missing_ok=True)


def share_weights(folder: Path) -> None:
    """Let who may read a configuration read its weights."""
    path = weights_file(folder)
    if path is not None and not path.is_symlink():
        follow_umask(path)


def _kept(folder: Path, digest: str) -> Path:
    return folder / f".adapter_model.{digest[:16]}.safetensors"


def matching_weights(folder: Path, digest: str | None) -> tuple[Path | None, str | None]:
    """The weights that a configuration was written with, where they are no longer the file that PEFT loads.

    Args:
        folder: The adapter folder.
        digest: What the configuration says of them; None in folders from before that was written, which pass unchecked.

    Returns:
        The file, None where it is the one that PEFT loads; and what is wrong where it is nowhere, or where PEFT, which
        opens its own file first, would fail at that.
    """
    path = weights_file(folder)
    if path is None or digest is None or (found := digest_of(path)) == digest:
        return None, None
    kept = _kept(folder, digest)
    if kept.is_file() and digest_of(kept) == digest:
        return kept, _unreadable(path, kept)
    return None, (
        f"{path} must have the SHA-256 {digest[:16]}…, which {CONFIG_NAME} beside it says, got {found[:16]}…. It is "
        "damaged, or the two files are not from one adapter. Take both from one `save_pretrained`, or copy or download "
        "them again; if you changed the weights on purpose, take `weights_sha256` out of the configuration."
    )


def _unreadable(path: Path, kept: Path) -> str | None:
    """What to do about a damaged file that older weights lie beside."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return (
            f"{path} is damaged ({error}). The weights that {CONFIG_NAME} beside it was written with are there too: "
            f"copy {kept.name} over it, or save, copy or download the adapter again."
        )


def check_adapter_file(path: Path, expected_ranks: Mapping[str, int], others: Collection[str] = ()) -> None:
    """Check that a safetensors file is whole, is a SEMU adapter and has the ranks of its configuration.

    Only the header is read. A path without a file passes: PEFT itself says that there are no weights.

    Args:
        path: The file, as written by `save_pretrained`.
        expected_ranks: Rank by full layer name, `ranks` of the configuration in the same folder.
        others: What the names of further tensors must have in them: modules that are trained in full.

    Raises:
        ValueError: The file is truncated or no safetensors file, holds no SEMU weights, or its ranks differ.
    """
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
    for name in others:
        if not any(f".{name}." in f".{key}." and ".semu_" not in key for key in shapes):
            raise ValueError(
                f"{path} has no weights for {name!r}, which the adapter_config.json beside it says is trained in full. "
                "Take both files from one `save_pretrained`."
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
