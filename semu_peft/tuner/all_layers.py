"""`"all-linear"` and `"all-layers"`: the words in `target_modules` that mean every layer of a kind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapted import targets_for, uncompiled
from .config import SemuConfig
from .keys import without_compilation
from .linear import NEVER_CALLED

ALL_LINEAR = "all-linear"
ALL_LAYERS = "all-layers"
_OTHERS = (nn.modules.conv._ConvNd, nn.MultiheadAttention)  # transposed convolutions too: they are passed over aloud
# What PEFT trains in full for a task, which its own "all-linear" knows for SEQ_CLS alone.
_TRAINED_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def word_in(config: SemuConfig) -> str | None:
    """The word that a configuration has for its targets, if it is one."""
    targets = config.target_modules
    return targets.lower() if isinstance(targets, str) and targets.lower() in (ALL_LINEAR, ALL_LAYERS) else None


def name_every_layer(config: SemuConfig, model: nn.Module, check: Callable[[nn.Module, str], None]) -> None:
    """Write the names of the layers into `target_modules` that the word there means, and warn of those passed over.

    `"all-linear"` means what it means to PEFT: every linear layer but the output layer of a language model, and the
    head that PEFT trains in full where `task_type` says that there is one. `"all-layers"` means convolutions and
    PyTorch's attention as well. Embeddings and normalisation are in neither.

    Args:
        config: The configuration, with one of the words.
        model: The model that it is for, with or without adapters.
        check: Raises a `TypeError` where a layer of that name cannot be corrected.

    Raises:
        ValueError: No layer is left, and no parameter is corrected either.
    """
    word = word_in(config)
    modules = _outermost(model)
    linear = _linear_layers(config, model) & {
        name for name, module in modules.items() if not isinstance(module, NEVER_CALLED)
    }
    others = {name for name, module in modules.items() if isinstance(_bare(module), _OTHERS)}
    meant = linear if word == ALL_LINEAR else linear | others
    found, passed = _sorted_out({name: modules[name] for name in modules if name in meant}, config, check)
    if word == ALL_LINEAR and not found:
        found, passed = _sorted_out({name: modules[name] for name in modules if name in others}, config, check)
        if found:
            warnings.warn(
                f"`target_modules='all-linear'`: {type(model).__name__} has no linear layer, so its {len(found)} other "
                "layers are corrected. `target_modules='all-layers'` says so.",
                stacklevel=2,
            )
    if not found and not config.target_parameters:
        raise ValueError(
            f"`target_modules={word!r}` finds no layer in {type(model).__name__} that SEMU can correct; it passed over "
            f"{passed[:3]} ({len(passed)} in all). Name layers yourself, parameters in `target_parameters`, or fewer "
            "in `exclude_modules`."
        )
    named: Any = targets_for(model, found)
    config.target_modules = named if isinstance(named, str) else set(named)  # type: ignore[assignment]
    _warn_of_the_rest(word, model, found, passed, _left_out(modules, others, found, config))


def layers_that_pass(model: nn.Module, check: Callable[[nn.Module, str], None]) -> list[str]:
    """The full names of all modules, outside those of adapters, that pass a check, which raises a `TypeError`."""
    found = []
    for name, module in _outermost(model).items():
        with suppress(TypeError):
            check(module, name)
            found.append(name)
    return found


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules, by their names in the uncompiled model, without what is inside adapters' layers.

    Nor what is inside those that an adapter trains in full (`modules_to_save`), where PEFT cannot save another adapter.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not (inside and name.startswith(inside)):
            found.setdefault(without_compilation(name), uncompiled(module))
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                inside = (*inside, f"{name}.")
    return found


def _linear_layers(config: SemuConfig, model: nn.Module) -> set[str]:
    heads = _TRAINED_HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    asked: Any = copy.copy(config)
    asked.target_modules = ALL_LINEAR
    _maybe_include_all_linear_layers(asked, model)
    return {without_compilation(name) for name in asked.target_modules if name.partition(".")[0] not in heads}


def _bare(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _sorted_out(
    modules: dict[str, nn.Module], config: SemuConfig, check: Callable[[nn.Module, str], None]
) -> tuple[list[str], list[str]]:
    """The names of what can be corrected, and of what cannot; what the user has excluded is in neither."""
    found, passed = [], []
    anything = copy.copy(config)
    anything.target_modules = ".*"
    for name, module in modules.items():
        if not check_target_module_exists(anything, name):
            continue
        try:
            check(module, name)
        except TypeError:
            passed.append(f"{name} ({type(_bare(module)).__name__})")
        else:
            found.append(name)
    return found, passed


def _left_out(modules: dict[str, nn.Module], others: set[str], found: list[str], config: SemuConfig) -> list[str]:
    """The other layers that `"all-layers"` would have corrected, where they are most of the model."""
    attentions = [name for name in others if isinstance(_bare(modules[name]), nn.MultiheadAttention)]
    left = others - set(found)
    return sorted(left) if attentions or len(left) > len(found) else []


def _warn_of_the_rest(word: str | None, model: nn.Module, found: list[str], passed: list[str], left: list[str]) -> None:
    if passed:
        warnings.warn(
            f"`target_modules={word!r}` passes over {len(passed)} layers of {type(model).__name__} that SEMU cannot "
            f"correct: {', '.join(passed[:3])}{' …' if len(passed) > 3 else ''}.",
            stacklevel=2,
        )
    if word == ALL_LINEAR and left:
        warnings.warn(
            f"`target_modules='all-linear'` leaves {len(left)} convolutions and attentions of {type(model).__name__} "
            f"as they are ({', '.join(left[:3])}{' …' if len(left) > 3 else ''}) and corrects {len(found)} layers; "
            "`target_modules='all-layers'` takes those too.",
            stacklevel=2,
        )
