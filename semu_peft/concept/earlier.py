"""What earlier erasures in a denoiser were made to forget, which a further one is to leave forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from semu_peft.tuner import SemuConfig
from semu_peft.tuner.layer import SemuLayer


def earlier_erasures(denoiser: nn.Module) -> dict[str, dict[str, list[str]]]:
    """By the name of each active SEMU adapter, the prompts that it was made to forget and what each gives instead.

    The record is empty where an adapter does not say, as one that was made without `unlearn_concept`.

    Examples:
        >>> from peft import inject_adapter_in_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.concept.earlier import earlier_erasures
        >>> config = SemuConfig(target_modules=["0"], r=1, init_weights=False, forgotten={"a cat": ["a dog"]})
        >>> earlier_erasures(inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)), "cats"))
        {'cats': {'a cat': ['a dog']}}
    """
    active = {
        name
        for layer in denoiser.modules()
        if isinstance(layer, SemuLayer) and not layer.disable_adapters
        for name in layer.active_adapters
    }
    configs = getattr(denoiser, "peft_config", {}).items()
    return {name: config.forgotten for name, config in configs if name in active and isinstance(config, SemuConfig)}


def prompts_to_hold(
    erasures: Mapping[str, Mapping[str, Sequence[str]]], forget: Sequence[str], retain: Sequence[str] = ()
) -> list[str]:
    """The prompts whose answers a further erasure must leave as they are: those forgotten earlier, and their anchors.

    What is forgotten now cannot be held, and what is retained anyway need not be. Where an earlier prompt gives what is
    to be forgotten now, it would go on doing so, which is said.

    Args:
        erasures: What [`earlier_erasures`][semu_peft.concept.earlier.earlier_erasures] gave.
        forget: The prompts to forget now.
        retain: The prompts that are held otherwise.

    Examples:
        >>> from semu_peft.concept.earlier import prompts_to_hold
        >>> prompts_to_hold({"cats": {"a cat": ["a dog"], "a kitten": ["a dog"]}}, forget=["a car"])
        ['a cat', 'a dog', 'a kitten']
    """
    held: dict[str, None] = {}
    for name, record in erasures.items():
        for prompt, given in record.items():
            if prompt not in forget and (gone := set(given) & set(forget)):
                warnings.warn(
                    f"The erasure {name!r} gives {sorted(gone)[0]!r} for {prompt!r}, and goes on to while that is "
                    f"forgotten. Forget {prompt!r} as well: `forget=[{sorted(gone)[0]!r}, {prompt!r}]`.",
                    stacklevel=3,
                )
            held.update(dict.fromkeys([prompt, *given]))
    return [prompt for prompt in held if prompt not in {*forget, *retain}]


def warn_of_the_unheld(
    erasures: Mapping[str, Mapping[str, Sequence[str]]], held: Sequence[str], *, names_prompts: bool
) -> None:
    """Say which earlier erasures nothing holds while another one trains.

    Args:
        erasures: What [`earlier_erasures`][semu_peft.concept.earlier.earlier_erasures] gave.
        held: All prompts that the training examples have.
        names_prompts: Whether the caller has named prompts to hold, among which may be those of adapters that do not
            say what they forgot.
    """
    silent = [name for name, record in erasures.items() if not record]
    left = [name for name, record in erasures.items() if set(record) - set(held)]
    if silent and not names_prompts:
        warnings.warn(
            f"The erasures {silent} stay active, but do not say what they forgot, so nothing holds it while another "
            "one trains. Name their prompts in `retain`, with a larger `preserve` such as 10.",
            stacklevel=3,
        )
    if left:
        warnings.warn(
            f"The erasures {left} stay active, but the examples hold nothing of what they forgot. Make them by "
            "`concept_examples` with the pipeline that the erasures are in.",
            stacklevel=3,
        )
