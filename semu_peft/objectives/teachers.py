"""Teachers for distillation that know nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_model

from .adapter_parts import adapter_configs, adapter_parts
from .original import without_adapter


def untrained(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Make a model of the same architecture that has learnt nothing: the incompetent teacher.

    Bad teaching (Chundawat et al., AAAI 2023, arXiv 2205.08096) distils it on forget data and the original on retain
    data: `unlearn(model, forget, KLToOriginal(reference=untrained(model)), retain=Retain(data, KLToOriginal()))`, or
    [`methods.bad_teacher`][semu_peft.methods.baselines.bad_teacher].

    Layers draw their weights anew as torch has them (`reset_parameters`), parameters that belong to none are drawn from
    a normal distribution of their own mean and spread. Adapters are left out.

    Args:
        model: Any model whose values are at hand; it stays as it is. The teacher is a second model in memory.
        seed: Seed of the draws; the global generator stays where it was.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import untrained
        >>> model = torch.nn.Linear(3, 2)
        >>> teacher = untrained(model, seed=1)
        >>> torch.equal(teacher.weight, model.weight), teacher.weight.requires_grad
        (False, False)
    """
    check_model(model)
    check_count("seed", seed, least=0)
    teacher = copy.deepcopy(model)
    has_adapter = bool(adapter_configs(teacher))
    parts = adapter_parts(teacher) if has_adapter else []
    drawn = {id(parameter) for part in parts for parameter in part.parameters()}  # what is left out is not drawn
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in teacher.modules():
            reset = getattr(type(module), "reset_parameters", None)
            own = {id(parameter) for parameter in module.parameters(recurse=False)}
            if callable(reset) and not (own and own <= drawn):
                reset(module)
                drawn |= own
        for parameter in teacher.parameters():
            if id(parameter) not in drawn:
                _draw(parameter)
    teacher = without_adapter(teacher) if has_adapter else teacher
    return teacher.requires_grad_(False).eval()


def _draw(parameter: Tensor) -> None:
    if parameter.is_floating_point() and parameter.numel():
        values = parameter.float()
        parameter.copy_(values.mean() + values.std(correction=0) * torch.randn(values.shape).to(values))
