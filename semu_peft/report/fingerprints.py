"""What a report says of models and data instead of showing them: digests, by which somebody who has them knows them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.files import digest_of
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.examples import count_examples
from semu_peft.training.fingerprint import bytes_of, describe
from semu_peft.tuner.adapted import own_parameters, semu_layers


def data_fingerprint(data: Any, name: str = "data") -> dict[str, Any]:
    """Count a data set's examples and digest them; nothing of their content can be read from it.

    The digest is of the examples in any order and in batches of any size, as long as a loader pads and augments none of
    them by its neighbours or by chance. Somebody who guesses an example can confirm the guess.

    Args:
        data: Batches, a loader, a list of rows, or the path of a file or of a folder.
        name: What the argument is called in errors.

    Returns:
        `examples` or `files`, how many there are, and `sha256`.

    Raises:
        TypeError: It is neither.
        FileNotFoundError: There is no such path.

    Examples:
        >>> import torch
        >>> from semu_peft.report.fingerprints import data_fingerprint
        >>> images, labels = torch.randn(6, 4), torch.arange(6)
        >>> whole = data_fingerprint([(images, labels)])
        >>> whole["examples"], whole == data_fingerprint([(images[3:], labels[3:]), (images[:3], labels[:3])])
        (6, True)
    """
    if isinstance(data, (str, os.PathLike)):
        return _path_fingerprint(Path(data), name)
    check_batches(data, name)
    digests = sorted(digest for batch in data for digest in _rows(batch))
    return {"examples": len(digests), "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}


def model_fingerprint(model: nn.Module) -> str | None:
    """Digest a model's own weights, by name; those of adapters are left out, and `None` where some are offloaded.

    Examples:
        >>> import torch
        >>> from semu_peft.report.fingerprints import model_fingerprint
        >>> one, other = (torch.nn.Linear(2, 2) for _ in range(2))
        >>> _ = other.load_state_dict(one.state_dict())
        >>> model_fingerprint(one) == model_fingerprint(other)
        True
    """
    parameters = own_parameters(model)
    return None if any(parameter.is_meta for parameter in parameters.values()) else _digest(parameters)


def adapter_fingerprint(model: nn.Module, adapter_name: str = "default") -> str:
    """Digest an adapter's bases and cores as they are in memory.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.report.fingerprints import adapter_fingerprint
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> len(adapter_fingerprint(get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)))
        64
    """
    parts = ("semu_U", "semu_V", "semu_core", "semu_offset")
    return _digest(
        {
            f"{name}.{part}": getattr(layer, part)[adapter_name]
            for name, layer in semu_layers(model, adapter_name).items()
            for part in parts
            if adapter_name in getattr(layer, part)
        }
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def _path_fingerprint(path: Path, name: str) -> dict[str, Any]:
    if path.is_file():
        return {"files": 1, "sha256": digest_of(path)}
    if not path.is_dir():
        raise FileNotFoundError(f"`{name}`: there is no file or folder {path}. Give batches, or another path.")
    digest, files = hashlib.sha256(), sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {digest_of(file)}\n".encode())
    return {"files": len(files), "sha256": digest.hexdigest()}


def _rows(batch: Any) -> Iterator[bytes]:
    """The digest of each example of a batch; of a single example, or something without tensors, of the whole."""
    count = count_examples(batch)
    if count is None or _is_single(batch):
        yield hashlib.sha256(json.dumps(describe(batch), sort_keys=True).encode()).digest()
        return
    leaves = list(_leaves(batch))
    split = {name: _split(value) for name, value in leaves if isinstance(value, Tensor) and value.dim()}
    for row in range(count):
        digest = hashlib.sha256()
        for name, value in leaves:
            parts = split.get(name)
            part = describe(value) if parts is None else parts[row] if len(parts) == count else b"".join(parts)
            digest.update(f"{name} ".encode() + (part if isinstance(part, bytes) else json.dumps(part).encode()))
        yield digest.digest()


def _is_single(batch: Any) -> bool:
    """Whether it has one label, as the rows of a data set: the first dimension of its tensors is none of examples."""
    named = batch if isinstance(batch, Mapping) else {"label": batch[-1]} if isinstance(batch, (tuple, list)) else {}
    label = named.get("labels", named.get("label"))
    return isinstance(label, (int, float)) or (isinstance(label, Tensor) and not label.dim())


def _split(value: Tensor) -> list[bytes]:
    head = f"{value.dtype} {tuple(value.shape[1:])} ".encode()
    return [head + bytes_of(row) for row in value.detach().to(torch.device("cpu"))]


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, each in items:
        yield from _leaves(each, f"{name}.{key}")
