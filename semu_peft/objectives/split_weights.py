"""PEFT methods whose start splits the weight, so that the original is the adapter at its start and not without it."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .adapter_parts import Part, adapter_configs, modules_of

_STARTS: Any = WeakIdKeyDictionary()  # parameter -> its value at the start; an entry goes when the parameter goes


def splits_weight(config: Any) -> bool:
    """Whether adding an adapter of this configuration took the adapter's start out of the base weight.

    So do LoRA's starts PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA. (KaSA changes the base weight for good; what it was is
    in no adapter.)

    Examples:
        >>> from peft import LoraConfig
        >>> from semu_peft.objectives.split_weights import splits_weight
        >>> splits_weight(LoraConfig(init_lora_weights="pissa_niter_4")), splits_weight(LoraConfig())
        (True, False)
    """
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def starts_elsewhere(config: Any) -> str | None:
    """How to have an adapter of this configuration start at the original model, where it would not; else None.

    So do PEFT's FourierFT and C3A by default, and Uni-LoRA always.

    Examples:
        >>> from peft import FourierFTConfig, LoraConfig
        >>> from semu_peft.objectives.split_weights import starts_elsewhere
        >>> starts_elsewhere(FourierFTConfig()), starts_elsewhere(LoraConfig())
        ('Give its configuration `init_weights=True`.', None)
    """
    method, start = str(getattr(config.peft_type, "value", config.peft_type)), getattr(config, "init_weights", True)
    if method in ("FOURIERFT", "C3A") and start is not True:
        return "Give its configuration `init_weights=True`."
    if method == "UNILORA":
        return "It has no other start: make `init_theta_d_bound` small, or take `VeraConfig`."
    return None


class AtStart(NamedTuple):
    """What of an adapter stays on in the original, as `at_start` finds it."""

    parts: list[Part]
    """The layers in which it stays on, at its start."""
    values: dict[int, Tensor]
    """What stands in place of parameters, by the `id` of the parameter."""


def at_start(model: nn.Module, parts: list[Part]) -> AtStart:
    """Find the adapters in `parts` whose start splits the weight, and biases that are trained with an adapter.

    Returns:
        What stays on, with the values that the parameters had when this or `keep_start` was first called.

    Raises:
        ValueError: The values are not at hand, as they are offloaded or sharded by DeepSpeed.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from semu_peft.objectives.adapter_parts import adapter_parts
        >>> from semu_peft.objectives.split_weights import at_start
        >>> config = LoraConfig(target_modules=["0"], r=2, init_lora_weights="olora")
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> [tuple(value.shape) for value in at_start(model, adapter_parts(model)).values.values()]
        [(2, 4), (3, 2)]
    """
    staying, changed = _changed(model, parts)
    if not all(_is_at_hand(parameter) for parameter in changed):
        raise ValueError(
            "The adapter's start splits the weight, and its values are offloaded or sharded, so the original is not to "
            "be had from it. Give the objective a frozen copy as `reference`."
        )
    _keep(changed)
    return AtStart(staying, {id(p): _STARTS[p].to(p.device, p.dtype) for p in changed})


def keep_start(model: nn.Module, parts: list[Part]) -> None:
    """Keep the values that `at_start` will give, of those parameters whose values are at hand."""
    _keep(_changed(model, parts)[1])


def _changed(model: nn.Module, parts: list[Part]) -> tuple[list[Part], list[nn.Parameter]]:
    """The parts that stay on in the original, and the parameters that are not at their start in the model."""
    configs = adapter_configs(model)
    split = {part.adapter_name for part in parts if splits_weight(configs.get(part.adapter_name))}
    staying = [part for part in parts if part.adapter_name in split and isinstance(part.layer, LoraLayer)]
    changed = [parameter for part in staying for parameter in part.parameters()]
    names = {part.adapter_name for part in parts}
    if any(getattr(configs.get(name), "bias", "none") not in ("none", False) for name in names):
        adapters = {id(parameter) for part in parts for parameter in part.parameters()}
        biases = [vars(module).get("_parameters", {}).get("bias") for module in modules_of(model)]
        changed += [bias for bias in biases if bias is not None and bias.requires_grad and id(bias) not in adapters]
    return staying, changed


def _keep(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter not in _STARTS and _is_at_hand(parameter):
            _STARTS[parameter] = parameter.detach().clone()


def _is_at_hand(parameter: nn.Parameter) -> bool:
    return not parameter.is_meta and not hasattr(parameter, "ds_id")
