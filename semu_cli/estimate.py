"""What a run will take, before it is made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import typer

from .verbs import Told


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run that was not made.

    Attributes:
        parameters: Numbers in the model.
        target_layers: Layers that would be corrected.
        examples: Examples to forget.
        batches: Batches of them.
        steps: Training steps, None where training ends by itself.
        weight_bytes: The model's weights.
        gradient_bytes: Sums of gradients while the subspace is sought: 4 bytes for each weight of the target layers.
        step_seconds: One pass forward and backward, tried on this machine or given.
        sampling_seconds: What drawing latents takes before that, None where none are drawn or it was not tried.
        seconds: All of it: sampling, the pass that finds the subspace and the steps, or of these one where their number
            is not known.

    Examples:
        >>> Estimate(1000, 2, 64, 2, 10, 4000, 2000, 0.5, None, 6.0).seconds
        6.0
    """

    parameters: int
    target_layers: int
    examples: int
    batches: int
    steps: int | None
    weight_bytes: int
    gradient_bytes: int
    step_seconds: float | None
    sampling_seconds: float | None
    seconds: float | None

    def told(self) -> Told:
        """The estimate in words, with what it leaves out."""
        memory = f"{_size(self.weight_bytes)} weights + {_size(self.gradient_bytes)} sums of gradients"
        lines = [
            f"Would correct {self.target_layers} layers of a model of {self.parameters:,} parameters.",
            f"Data: {_counted(self.examples, 'example')} in {_batches(self.batches)}.",
            f"Memory: {memory}; activations come on top and were not estimated.",
        ]
        if self.seconds is None:
            lines.append("Time: unknown. Give --step-seconds.")
        else:
            steps = "at least 1 step (it stops by itself)" if self.steps is None else _counted(self.steps, "step")
            sampled = "" if self.sampling_seconds is None else f"{self.sampling_seconds:.2g} s of sampling, "
            lines.append(
                f"Time: {_time(self.seconds)}, for {sampled}{_batches(self.batches)} and {steps}, at "
                f"{self.step_seconds:.2g} s a pass; loading, natural gradients and data to keep come on top."
            )
        return Told({"dry_run": True, "estimate": asdict(self)}, [*lines, "Nothing was written."])


@dataclass(frozen=True)
class Plan:
    """What a verb that judges would load, measure and try; it was not done.

    Attributes:
        models: Where each model that would be loaded lies, by its name.
        examples: How many there are, by what they are for.
        measures: What would be measured of each model.
        attacks: What would be tried.
        not_run: What would not be tried, each with `attack` and `reason`.
        pictures: How many would be drawn, None where none are.
        parameters: Numbers in the model.
        weight_bytes: The model's weights.

    Examples:
        >>> Plan({"model": "my-llm"}, {"forget": 3}, ["probability"]).told().words[-1]
        'Nothing was measured, tried or written.'
    """

    models: Mapping[str, str]
    examples: Mapping[str, int]
    measures: Sequence[str] = ()
    attacks: Sequence[str] = ()
    not_run: Sequence[Any] = ()
    pictures: int | None = None
    parameters: int = 0
    weight_bytes: int = 0

    def with_attacks(self, report: Any) -> Plan:
        """The same with what a dry run of attacks says."""
        return replace(self, attacks=report.planned, not_run=report.not_run)

    def told(self) -> Told:
        """The plan in words, with what it leaves out."""
        lines = [
            f"Would load {_counted(len(self.models), 'model')}:",
            *(f"- {name}: {place}" for name, place in self.models.items()),
            f"Memory: {_size(self.weight_bytes)} weights of the judged model, with {self.parameters:,} parameters; "
            "those of the others and activations come on top and were not estimated.",
            f"Data: {', '.join(_of(count, name) for name, count in self.examples.items())}.",
        ]
        if self.pictures is not None:
            lines.append(f"Would draw {_counted(self.pictures, 'picture')}.")
        if self.measures:
            lines.append(f"Would measure of each: {', '.join(self.measures)}.")
        if self.attacks:
            number = _counted(len(self.attacks), "attack")
            lines.append(f"Would try {number}, with fewer examples where there are fewer:")
            lines += [f"- {name}" for name in self.attacks]
        if self.not_run:
            lines += ["Would not try:", *(f"- {each.attack}: {each.reason}" for each in self.not_run)]
        lines += ["Time: unknown; nothing was tried.", "Nothing was measured, tried or written."]
        return Told({"dry_run": True, "plan": asdict(self)}, lines)


def weights_of(*models: Any) -> dict[str, Any]:
    """The numbers in a model or a pipeline's parts, and their bytes, as a [`Plan`][semu_cli.estimate.Plan] has them.

    Examples:
        >>> from torch import nn
        >>> from semu_cli.estimate import weights_of
        >>> weights_of(nn.Linear(2, 3))
        {'parameters': 9, 'weight_bytes': 36}
    """
    parameters = [each for model in models for each in model.parameters()]
    sizes = {"weight_bytes": sum(each.numel() * each.element_size() for each in parameters)}
    return {"parameters": sum(each.numel() for each in parameters), **sizes}


def estimate(
    model: Any,
    target_modules: str | list[str],
    *,
    examples: int,
    batches: int,
    steps: int | None,
    step_seconds: float | None,
    trial: Callable[[], Any] | None = None,
    sampling_seconds: float | None = None,
) -> Estimate:
    """Estimate a run.

    Args:
        model: The bare model.
        target_modules: As `SemuConfig` takes them.
        examples: How many to forget.
        batches: Of them.
        steps: Training steps, if known.
        step_seconds: What a step takes; by default `trial` is tried, twice, and the second time counts.
        trial: A pass forward and backward.
        sampling_seconds: What comes before the first pass.
    """
    names = target_names(model, target_modules)
    sizes = [model.get_submodule(name).weight.numel() for name in names]
    if step_seconds is None and trial is not None:
        for _ in range(2):
            started = time.perf_counter()
            trial()
            step_seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
    passes = batches + (1 if steps is None else steps)
    seconds = None if step_seconds is None else (sampling_seconds or 0.0) + step_seconds * passes
    return Estimate(
        target_layers=len(names), examples=examples, batches=batches, steps=steps, gradient_bytes=4 * sum(sizes),
        step_seconds=step_seconds, sampling_seconds=sampling_seconds, seconds=seconds, **weights_of(model),
    )  # fmt: skip


def estimate_on(
    model: Any,
    target_modules: str | list[str],
    loader: Any,
    examples: int,
    steps: int | None,
    step_seconds: float | None,
) -> Estimate:
    """Estimate a run on batches of transformers' form, a pass forward and backward on the first of which is tried."""
    from semu_peft.objectives import CrossEntropy

    batch = {key: value.to(model.device) for key, value in next(iter(loader)).items()}
    return estimate(
        model, target_modules, examples=examples, batches=len(loader), steps=steps, step_seconds=step_seconds,
        trial=lambda: CrossEntropy()(model, batch).backward(),
    )  # fmt: skip


def target_names(model: Any, target_modules: str | Iterable[str]) -> list[str]:
    """The layers that an adapter would correct: it is put in for a moment, without values, and taken out.

    Raises:
        typer.BadParameter: There are none.
    """
    from torch import nn

    from semu_peft import SemuConfig
    from semu_peft.adapter.whole_model import add_adapter, remove_adapter
    from semu_peft.tuner.adapted import semu_layers

    name, flags = "estimate", [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        add_adapter(model, SemuConfig(target_modules=target_modules), adapter_name=name)  # type: ignore[arg-type]
    except ValueError as error:
        kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
        names = [each for each, module in model.named_modules() if isinstance(module, kinds)]
        raise typer.BadParameter(
            f"`--target-modules`: {target_modules!r} names no layer of the model that can be corrected "
            f"({str(error).splitlines()[0]}) There are {', '.join(names[-3:])} and others; a regular expression must "
            "fit the whole name."
        ) from None
    try:
        return list(semu_layers(model, name))
    finally:
        remove_adapter(model, adapter_name=name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def last_third(model: Any) -> list[str]:
    """The last third of the linear and convolutional layers; what earlier ones compute, all classes need."""
    from torch import nn

    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return names[-math.ceil(len(names) / 3) :]


def _time(seconds: float) -> str:
    """A bound from below, whatever its size: what comes on top was not tried."""
    return f"at least {seconds:.2g} s" if seconds < 1 else f"at least {seconds:,.1f} s"


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _of(number: int, names: str) -> str:
    return f"{number:,} {names.removesuffix('s') if number == 1 else names}"


def _batches(number: int) -> str:
    return "1 batch" if number == 1 else f"{number:,} batches"


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
