"""Measurements kept in a folder, one JSON file each, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import align_module_device
from torch import nn

from semu_peft.arguments import check_path
from semu_peft.files import written_whole
from semu_peft.gates import Intervention
from semu_peft.training.fingerprint import describe, differences

_FORMAT = "semu_peft.measurement"
_GATES = "semu_peft.gates."


class Measurements:
    """A model's measurements: read from a folder where they are there, else made and written to it.

    A file holds what it was measured with: the model's digest, and digests of the data and settings. Other data or
    settings are measured anew; another model is refused, so that its results are not taken for this one's.

    Args:
        folder: Where the files are; None keeps none.
        model: The model that is measured.

    Raises:
        ValueError: The folder holds measurements of another model.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> from semu_peft.evaluation.cached import Measurements
        >>> measurements = Measurements(tempfile.mkdtemp(), nn.Linear(2, 2))
        >>> [measurements.get("size", {"of": "all"}, lambda: print("measured") or 6) for _ in range(2)]
        measured
        [6, 6]
    """

    def __init__(self, folder: str | os.PathLike[str] | None, model: nn.Module) -> None:
        if folder is not None:
            check_path("output_dir", folder)
        self.folder = None if folder is None else Path(folder)
        self.model = None if folder is None else model_digest(model)
        for path in [] if self.folder is None else sorted(self.folder.glob("*.json")):
            self._check_model(path)

    def get(self, name: str, inputs: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """Give the measurement of this name, data and settings.

        Args:
            name: Of the measurement and of its file.
            inputs: Data and settings, by name.
            measure: Makes it, as plain values that JSON has.
        """
        if self.folder is None:
            return measure()
        key = {part: _digest(value) for part, value in inputs.items()}
        path = self.folder / f"{name}.json"
        self._check_model(path)  # a name may have a folder in it, as data sets of the Hub have
        saved = _read(path)
        if saved is not None and not differences(saved["inputs"], key):
            return saved["value"]
        value = measure()
        content = {"format": _FORMAT, "model": self.model, "inputs": key, "value": value}
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        return value

    def _check_model(self, path: Path) -> None:
        saved = _read(path)
        if saved is not None and saved["model"] != self.model:
            raise ValueError(
                f"`output_dir` must be a folder of this model alone, got {path.parent}, where {path.name} was measured "
                f"on a model with other weights, or other adapters, scales or gates ({saved['model']} there, "
                f"{self.model} here). Give each model a folder of its own, or remove that one."
            )


def model_digest(model: nn.Module) -> str:
    """A digest of a model's weights, its active adapters and their scales, and its gates; the same in another process.

    Functions, as a gate may be one, count by their names alone.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from semu_peft.evaluation.cached import model_digest
        >>> model = nn.Linear(2, 2)
        >>> before = model_digest(model)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1)
        >>> model_digest(model) == before, len(before)
        (False, 16)
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {_described(model, name, tensor)}\n".encode())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            active = sorted(module.active_adapters), module._disable_adapters, sorted(module.merged_adapters)
            digest.update(f"{name} {active} {_scales(module)}\n".encode())
        elif isinstance(module, Intervention):
            digest.update(f"{name} {_settings(module)}\n".encode())
    return digest.hexdigest()[:16]


def _described(model: nn.Module, name: str, tensor: Any) -> Any:
    if not getattr(tensor, "is_meta", False):
        return describe(tensor)
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):  # brings an offloaded weight in for the moment
        return describe(getattr(module, own))


def _scales(layer: Any) -> list[Any]:
    """What a layer multiplies the corrections of its active adapters by, which is in no state dict."""
    names = sorted({"scaling", *(name for name in layer.other_param_names if name.endswith("_scaling"))})
    scales = {name: getattr(layer, name, None) for name in names}
    return [
        (name, adapter, describe(scale[adapter]))
        for name, scale in scales.items()
        for adapter in sorted(layer.active_adapters)
        if isinstance(scale, dict) and adapter in scale and adapter not in layer.merged_adapters
    ]


def _settings(value: Any) -> Any:
    """What a gate, or a model that has one, was made with: it opens otherwise with others, at the same weights."""
    if isinstance(value, nn.Module) and not isinstance(value, Intervention):
        return describe(value.state_dict())
    if not type(value).__module__.startswith(_GATES):
        return describe(value)
    own = {name: _settings(part) for name, part in vars(value).items() if name != "training" and name[0] != "_"}
    return {"type": type(value).__qualname__, **own}


def _digest(value: Any) -> Any:
    described = describe(value)
    text = json.dumps(described, sort_keys=True)
    return described if len(text) <= 80 else hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> Any:
    """What a file holds, or None where there is none, or it is not ours or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else None
