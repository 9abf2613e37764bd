"""What a report holds, gathered from a model and from what was made with it, as plain values."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

import semu_peft
from semu_peft.files import digest_of
from semu_peft.model_state import device_of
from semu_peft.subspace.base_weight import whole_weight
from semu_peft.subspace.profile import SubspaceProfile
from semu_peft.training.fingerprint import describe
from semu_peft.training.unlearn import UnlearnResult
from semu_peft.tuner.adapted import base_model, own_parameters, semu_layers
from semu_peft.tuner.layer import SemuLayer

from .fingerprints import adapter_fingerprint, model_fingerprint
from .measured import plain

LIMITS = (
    "This is approximate unlearning. The numbers say what these tests found; there is no proof that no trace is left, "
    "and an attacker who was not tried may find one.",
    "An adapter that can be switched off is not removal: whoever has the original weights has the model as it was. "
    "Merge the adapter and hand on the merged weights alone.",
    "Copies are not reached: the original weights in backups, caches and earlier releases, other models that were "
    "trained or distilled from them, and the data themselves.",
    "Every number holds for the data that it was measured on, and has a meaning only beside a model that was never "
    "trained on what was forgotten.",
    "A digest shows that two files are the same, not who wrote this report: it is not signed. A record that somebody "
    "guesses can be confirmed by the digest of a data set that holds nothing else.",
)
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "diffusers", "huggingface_hub", "safetensors")
_TASKS = {
    ("ForImageClassification",): "classification",
    ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"): "language",
    ("UNet2DConditionModel", "Transformer2DModel"): "diffusion",
}  # by the ends of names
_ELSEWHERE = ("ranks", "offsets", "base_model_name_or_path", "peft_type", "inference_mode", "revision", "auto_mapping")


def model_contents(model: nn.Module | None, adapter_name: str, digest: bool) -> dict[str, Any]:
    """The model's class, size, adapter and layers."""
    if model is None:
        return {}
    base = base_model(model)
    parameters = {id(parameter): parameter.numel() for parameter in own_parameters(model).values()}
    layers = _layers(model, adapter_name)
    settings = next(iter(layers.values())).configs[adapter_name].to_dict() if layers else {}
    # An adapter knows the pipeline that it is of, and a denoiser only the folder inside it.
    name = settings.get("base_model_name_or_path") or getattr(getattr(base, "config", None), "_name_or_path", None)
    told: dict[str, Any] = {
        "class": type(base).__qualname__,
        "name": _short_name(name or ""),
        "parameters": sum(parameters.values()),
        "sha256": model_fingerprint(model) if digest else None,
        "adapter": None,
        "layers": [],
    }
    if layers:
        merged = [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]
        told["adapter"] = {
            "name": adapter_name,
            "merged": bool(merged),
            "sha256": adapter_fingerprint(model, adapter_name),
            "trained_parameters": sum(layer.semu_core[adapter_name].numel() for layer in layers.values()),
            "settings": {
                key: plain(value)
                for key, value in settings.items()
                if key not in _ELSEWHERE and value not in (None, {}, [], "")
            },
        }
        told["layers"] = [_layer(name, layer, adapter_name) for name, layer in layers.items()]
    return told


def task_of(model_class: str) -> str | None:
    """What models of a class are for, as transformers and diffusers call them; `None` where the name does not say.

    Examples:
        >>> from semu_peft.report.contents import task_of
        >>> task_of("ViTForImageClassification"), task_of("Sequential")
        ('classification', None)
    """
    return next((task for ends, task in _TASKS.items() if model_class.endswith(ends)), None)


def file_contents(folder: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The digest and size of a saved adapter's weights."""
    if folder is None:
        return None
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME) if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"`adapter_file`: there is no {path}. Give the folder that `save_pretrained` wrote, or the file in it."
        )
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest_of(path)}


def training_contents(training: Mapping[str, UnlearnResult]) -> list[dict[str, Any]]:
    """What each run did, with its last losses and the curve of its forgetting against damage."""
    return [
        {
            "run": name,
            "stop_reason": result.stop_reason,
            **({} if result.damage_on is None else {"damage_on": result.damage_on}),
            "steps": result.steps,
            "seconds": result.seconds,
            "examples_seen": result.examples_seen,
            "trainable_parameters": result.trainable_parameters,
            "history": plain(result.history),
        }
        for name, result in training.items()
    ]


def settings_contents(settings: Any) -> dict[str, Any]:
    """Settings as given: an objective, an optimiser's name, seeds; tensors by their digests, paths by their last part.

    Examples:
        >>> from semu_peft.report.contents import settings_contents
        >>> settings_contents({"model": "/home/jane/digits", "data": Path("/home/jane/cats"), "seed": 0})
        {'model': 'digits', 'data': 'cats', 'seed': 0}
    """
    if settings is None:
        return {}
    given = settings if isinstance(settings, Mapping) else {"settings": settings}
    named = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in given.items()}
    return {str(key): _without_folders(plain(describe(value))) for key, value in named.items()}


def spectrum_contents(profile: SubspaceProfile | None) -> dict[str, Any]:
    """Of each layer its rank, the possible rank, the energy that is kept, and the singular values."""
    if profile is None:
        return {}
    return {
        name: {
            "rank": layer.rank,
            "possible_rank": min(layer.shape[-2:]),
            "explained_variance": plain(layer.explained_variance) if layer.energy > 0 else None,
            "estimated": layer.estimated,
            "singular_values": plain(
                [float(f"{value:.4g}") for value in layer.singular_values.flatten()[:64].tolist()]
            ),
        }
        for name, layer in profile.layers.items()
    }


def text_contents(
    before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]], forgotten: Iterable[int | str]
) -> list[dict[str, Any]]:
    """Of each prompt what was written before and after, and whether it was to be forgotten.

    Examples:
        >>> from semu_peft.report.contents import text_contents
        >>> text_contents({"Who?": ["Jane"]}, {"Who?": [""]}, ["Who?"])
        [{'prompt': 'Who?', 'forgotten': True, 'before': ['Jane'], 'after': ['']}]
    """
    marked = set(forgotten)
    return [
        {"prompt": prompt, "forgotten": prompt in marked, "before": list(texts), "after": list(after[prompt])}
        for prompt, texts in before.items()
    ]


def environment_contents(model: nn.Module | None) -> dict[str, str]:
    """Versions and the device; neither paths nor names of a machine."""
    versions = {"semu_peft": semu_peft.__version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.device("cpu") if model is None else device_of(model)
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {**versions, "system": f"{platform.system()} {platform.machine()}", "device": shown}


def not_tested(untested: Iterable[str], not_run: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """What nobody tried, with the reason where an attack gave one."""
    return [{"test": title, "reason": "no result was given"} for title in untested] + as_reasons(not_run)


def as_reasons(not_run: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Attacks that were not run, each with the reason that it gave."""
    return [{"test": each["attack"], "reason": each["reason"]} for each in not_run]


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SemuLayer]:
    if not any(isinstance(module, SemuLayer) for module in model.modules()):
        return {}
    found = semu_layers(model, adapter_name)
    return {name: layer for name, layer in found.items() if layer.is_initialized(adapter_name)}


def _layer(name: str, layer: SemuLayer, adapter_name: str) -> dict[str, Any]:
    """A correction's size, `‖ΔW‖ = ‖R − R₀‖` (`U`, `V` are orthonormal), and over its weight's where that is there."""
    norm = float(layer.get_core(adapter_name).detach().float().norm())
    away = any(parameter.is_meta for parameter in layer.get_base_layer().parameters())
    unknown = away or adapter_name in layer.merged_adapters
    size = None if unknown else float(whole_weight(layer).detach().float().norm())
    return {
        "layer": name,
        "shape": list(layer.matrix_shape(adapter_name)),
        "rank": layer.r[adapter_name],
        "trained_parameters": layer.semu_core[adapter_name].numel(),
        "norm": plain(norm),
        "relative_norm": plain(norm / size) if size else None,
    }


def _without_folders(value: Any) -> Any:
    """A plain value in which absolute paths are their last part: a report is handed on without its machine."""
    if isinstance(value, str):
        return Path(value).name if os.path.isabs(value) else value
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    return [_without_folders(each) for each in value] if isinstance(value, list) else value


def _short_name(name: str) -> str:
    """A repository's name as it is; of a folder somewhere on a machine the last part."""
    return Path(name).name if os.path.isabs(name) or Path(name).exists() else name
