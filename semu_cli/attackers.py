"""Who relearns, for `semu attack` and `audit`: the library's attackers, with as many examples as they are given."""

from __future__ import annotations

import dataclasses
from typing import Any


def classifier_attackers(model: Any, forget_examples: int | None) -> list[Any] | None:
    """Those of image classifiers; None where the library is to choose.

    Args:
        model: The classifier without an adapter, whose last linear layer one of them trains alone.
        forget_examples: How many of the forgotten examples each has.

    Examples:
        >>> import torch
        >>> from semu_cli.attackers import classifier_attackers
        >>> [each.label for each in classifier_attackers(torch.nn.Sequential(torch.nn.Linear(2, 2)), 5)][3]
        'Adam 0.001 on 0, 5 examples'
    """
    if forget_examples is None:
        return None
    from torch import nn

    from semu_peft.evaluation import usual_attackers

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    usual = usual_attackers(layers[-1] if layers else None)
    return [dataclasses.replace(each, forget_examples=forget_examples) for each in usual]


def gentle_attackers(forget_examples: int | None) -> list[Any] | None:
    """Those of language models and pipelines, at smaller rates; None where the library is to choose.

    Args:
        forget_examples: How many of the forgotten examples each has.

    Examples:
        >>> from semu_cli.attackers import gentle_attackers
        >>> gentle_attackers(5)
        [Attacker(Adam 0.0001, 5 examples, 50 steps), Attacker(Adam 0.001, 5 examples, 50 steps)]
    """
    if forget_examples is None:
        return None
    from semu_peft.objectives.attackers import Attacker

    given: dict[str, Any] = {"steps": 50, "batch_size": 8, "forget_examples": forget_examples}
    return [Attacker("adam", rate, **given) for rate in (1e-4, 1e-3)]
