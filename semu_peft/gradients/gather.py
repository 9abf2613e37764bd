"""Gathering statistics of gradients over data: each gradient is folded away as soon as the backward pass has it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.arguments import check_adapter_name, check_kind, check_model
from semu_peft.linalg.energy import largest_magnitudes
from semu_peft.model_state import device_of, eval_mode, out_of_wrappers
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.examples import check_not_empty, count_examples
from semu_peft.objectives.replica import eagerly

from .loss_scale import LossScale
from .padding import SeenMask, watch_mask
from .processes import sum_over_processes
from .sources import GradientSource, LayerSource
from .statistics import GradientSum, Statistic, StatisticFactory
from .targets import find_sources

# An accelerator stands still when it is asked whether a loss is finite: after the first batch, of so many at a time.
_LOSSES_AT_ONCE, _LOSSES_ON_CPU = 8, 1

_T = TypeVar("_T")


@dataclass(frozen=True, repr=False, eq=False)
class Gathered(Mapping[str, Statistic]):
    """Statistics by the full name of their layer in the base model, in the model's order.

    Layers that share one weight have one statistic, under each of their names.

    Attributes:
        statistics: The statistics by layer name; `gathered[name]` is `gathered.statistics[name]`.
        batches: How many batches they were taken over, of all processes.
        examples: How many examples those had, `None` where a batch does not say.
        unused: The layers that no loss of the pass depended on; their statistics are empty.

    Examples:
        >>> import torch
        >>> from semu_peft import gather, objectives
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(2)]
        >>> gathered = gather(model, batches, objectives.CrossEntropy(), progress=False)
        >>> list(gathered), gathered.batches, gathered.examples
        (['0', '2'], 2, 16)
    """

    statistics: dict[str, Statistic]
    batches: int
    examples: int | None
    unused: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Statistic:
        return self.statistics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def __repr__(self) -> str:
        kinds = "/".join(sorted({type(statistic).__name__ for statistic in self.statistics.values()}))
        return f"Gathered({kinds} of {len(self)} layers, batches={self.batches}, examples={self.examples})"


def of_each_weight(found: Mapping[str, _T]) -> dict[str, _T]:
    """Statistics or weights by layer name, what several layers share under the first of their names alone.

    Examples:
        >>> import torch
        >>> from semu_peft import gather, objectives
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        >>> model[2].weight = model[0].weight
        >>> batches = [(torch.randn(8, 3), torch.randint(3, (8,)))]
        >>> gathered = gather(model, batches, objectives.CrossEntropy(), progress=False)
        >>> list(gathered), list(of_each_weight(gathered))
        (['0', '2'], ['0'])
    """
    first: dict[int, str] = {}
    return {name: each for name, each in found.items() if first.setdefault(id(each), name) == name}


def gather(
    model: nn.Module,
    batches: Iterable[Any],
    objective: LossFunction,
    *,
    targets: Sequence[str] | str | None = None,
    statistic: StatisticFactory | Mapping[str, StatisticFactory] = GradientSum,
    description: str = "Gathering gradients",
    progress: bool = True,
    adapter_name: str | None = None,
) -> Gathered:
    """Gather a statistic of the objective's gradient at each layer's weight, over one pass of the batches.

    The model runs as it stands, with the adapters that are switched on, but in eval mode. No more than one layer's
    dense gradient is there at a time, and the model comes back as it was: `requires_grad` flags, gradients, modes and
    hooks. In a distributed run every process brings its own batches and gets the statistics of all.

    Args:
        model: Any model, with or without adapters; also inside a distributed wrapper.
        batches: A DataLoader or any iterable. Tensors are moved to the model's device; the first dimension of a
            batch's first tensor is taken for its examples.
        objective: `(model, batch) -> scalar loss`.
        targets: Which layers: a list of names or name endings, or a regular expression for the whole name, as PEFT's
            `target_modules`. By default every layer of a known type (see
            [`register_source`][semu_peft.gradients.sources.register_source]), or the adapter's.
        statistic: What to keep of each layer: a [`Statistic`][semu_peft.gradients.statistics.Statistic] class or a
            function `(shape, dtype, device) -> Statistic`; or one for each layer by name, which then are the targets.
        description: Title of the progress bar.
        progress: Show a progress bar.
        adapter_name: A SEMU adapter whose layers to take, and to read as it reads them: convolutions channel by
            channel, parameters without a layer.

    Raises:
        ValueError: No layer matches, the data cannot give a gradient, or a batch cannot give the statistic; see
            [`stream_gradients`][semu_peft.gradients.gather.stream_gradients].
        TypeError: `batches` is one batch, or nothing to take batches from.

    Examples:
        >>> from semu_peft.objectives import CrossEntropy
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(2)]
        >>> gathered = gather(model, batches, CrossEntropy(), progress=False)
        >>> gathered, gathered["0"].total.shape
        (Gathered(GradientSum of 2 layers, batches=2, examples=16), torch.Size([4, 3]))
    """
    check_model(model)
    check_batches(batches)
    check_adapter_name(adapter_name, optional=True)
    as_objective(objective)
    if isinstance(batches, (list, tuple)) and any(batch is None for batch in batches):
        raise TypeError("`batches` must hold no None, got one. Leave out what a `collate_fn` dropped.")
    if targets is not None:
        check_kind(
            "targets", targets, (str, list, tuple, set), "a list of names, a pattern or None", "Put one in a list."
        )
    for each in statistic.values() if isinstance(statistic, Mapping) else [statistic]:
        if not callable(each):
            raise TypeError(
                f"`statistic` must be a class such as `GradientSum`, or one for each layer, got {each!r}. See "
                "`semu_peft.gradients.statistics`."
            )
    if isinstance(statistic, Mapping) and targets is None:
        targets = list(statistic)
    sources, aliases = find_sources(model, targets, adapter_name)
    factories = statistic if isinstance(statistic, Mapping) else dict.fromkeys(sources, statistic)
    missing = [name for name in sources if name not in factories]
    if missing:
        raise ValueError(
            f"`statistic` has none for the layers {missing[:3]} ({len(missing)} in all). Name each layer in full, or "
            "leave `targets` out to take the layers that it names."
        )
    statistics = {name: factories[name](source.shape, source.dtype, source.device) for name, source in sources.items()}
    sources = {
        name: source.summed if source.summed and statistics[name].takes_sums else source
        for name, source in sources.items()
    }
    # A distributed wrapper would wait for gradients of its own parameters, which this pass does not make.
    runner = out_of_wrappers(model)
    counts = stream_gradients(
        runner, sources, statistics, batches, objective, description=description, progress=progress
    )
    by_name = {name: statistics[aliases.get(name, name)] for name in [*sources, *aliases]}
    unused = tuple(name for name in by_name if aliases.get(name, name) in counts.unused)
    return Gathered(by_name, counts.batches, counts.examples, unused)


@dataclass(frozen=True)
class Counts:
    """How much data a pass has seen, in all processes.

    Attributes:
        batches: The number of batches.
        examples: The number of examples, `None` where a batch does not say.
        unused: The sources that no loss depended on.
    """

    batches: int
    examples: int | None
    unused: tuple[str, ...] = field(default=(), repr=False)


def stream_gradients(
    model: nn.Module,
    sources: Mapping[str, GradientSource],
    statistics: Mapping[str, Statistic],
    batches: Iterable[Any],
    objective: LossFunction,
    *,
    description: str = "Gathering gradients",
    progress: bool = True,
) -> Counts:
    """Add the gradient of the objective at each source to its statistic: what `gather` does, for sources of your own.

    A gradient is folded into its statistic, and dropped, by a hook in the backward pass. In a distributed run the
    statistics of all processes are added up, one after the other, and left on each. A target that the loss does not
    depend on (an unused pooler, a vision tower when there is only text) keeps an empty statistic, with a warning.

    Args:
        model: The model, called by `objective`.
        sources: Where each gradient comes from, with the name to use in errors.
        statistics: Where it goes, by the same names.
        batches: Tensors in them are moved to the model's device.
        objective: `(model, batch) -> scalar loss`.
        description: Title of the progress bar.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no batch; a loss or a statistic is not finite; a loss depends on no target; no target has
            received a gradient; a statistic cannot be taken from a batch.

    Examples:
        >>> from semu_peft.gradients import WeightSource
        >>> from semu_peft.objectives import CrossEntropy
        >>> model, batch = nn.Sequential(nn.Linear(3, 2)), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> sources = {name: WeightSource(parameter) for name, parameter in model.named_parameters()}
        >>> sums = {name: GradientSum(source.shape, source.dtype, source.device) for name, source in sources.items()}
        >>> stream_gradients(model, sources, sums, [batch], CrossEntropy(), progress=False)
        Counts(batches=1, examples=8)
        >>> sums["0.bias"].total.shape
        torch.Size([2])
    """
    check_batches(batches)
    received = dict.fromkeys(sources, 0)
    weights = [source.weight for source in sources.values() if source.weight is not None]
    with (
        _only_differentiable(model, weights), torch.enable_grad(), watch_mask(model) as mask,
        _caught(sources, statistics, received, mask) as scale,
    ):  # fmt: skip
        shown = tqdm(batches, desc=description, disable=not progress, leave=False)
        seen = _run(model, statistics, shown, objective, scale)
    all_seen = sum_over_processes(torch.tensor([*seen, *received.values()], device=device_of(model)))
    number, examples, uncounted, *parts = all_seen.tolist()
    unused = _check_received(number, dict(zip(sources, parts, strict=True)))
    for statistic in statistics.values():
        for tensor in statistic.tensors():
            tensor.copy_(sum_over_processes(tensor))
    largest = largest_magnitudes(tensor for statistic in statistics.values() for tensor in statistic.tensors())
    if not all(map(math.isfinite, largest)):  # asked of all at once, as the host waits for a device each time
        name = next(name for name, statistic in statistics.items() if not statistic.is_finite())
        raise ValueError(
            f"The gradient of layer {name!r} is not finite. Check the data for extreme values, or compute in float32 "
            "or bfloat16 instead of float16."
        )
    return Counts(number, None if uncounted else examples, unused)


@contextmanager
def _caught(
    sources: Mapping[str, GradientSource],
    statistics: Mapping[str, Statistic],
    received: dict[str, int],
    mask: SeenMask,
) -> Iterator[LossScale]:
    """Fold gradients into statistics while the context lasts, counting them, in passes that are scaled as it gives."""
    scale = LossScale()

    def fold_into(name: str) -> Any:
        named, add, kind = _Named(name), statistics[name].add, sources[name].device.type

        def fold(caught: Any) -> None:
            gradient = scale.take(name, caught)
            if gradient is None:
                return
            received[name] += 1
            with named:
                if torch.is_autocast_enabled(kind):
                    with torch.autocast(kind, enabled=False):
                        add(gradient)
                else:
                    add(gradient)

        return fold

    with ExitStack() as handles:
        for name, source in sources.items():
            if isinstance(source, LayerSource):
                source.mask = mask
            handles.callback(source.attach(fold_into(name)).remove)
        yield scale


def _run(
    model: nn.Module,
    statistics: Mapping[str, Statistic],
    batches: Iterable[Any],
    objective: LossFunction,
    scale: LossScale,
) -> tuple[int, int, int]:
    """Forward and backward over all batches; their number, that of their examples, and of those that do not say."""
    device = device_of(model)
    number = examples = uncounted = 0
    losses: list[Tensor] = []
    for batch in batches:
        check_not_empty(batch, f"batch {number}")
        loss = objective(model, send_to_device(batch, device))
        check_loss(loss, f"batch {number}")
        losses.append(loss.detach())
        if number == 0 or len(losses) >= (_LOSSES_ON_CPU if device.type == "cpu" else _LOSSES_AT_ONCE):
            _check_finite(losses, number + 1)
            losses.clear()
        scale.backward(loss)
        del loss  # with the graph, which may have been kept
        size = count_examples(batch)
        number, examples, uncounted = number + 1, examples + (size or 0), uncounted + (size is None)
        for name, statistic in statistics.items():
            with _Named(name):
                statistic.end_batch(size)
    _check_finite(losses, number)
    return number, examples, uncounted


def _check_finite(losses: Sequence[Tensor], seen: int) -> None:
    """Raise where one of the last losses of so many batches is not finite."""
    for index, value in enumerate(torch.stack([loss.reshape(()) for loss in losses]).tolist() if losses else []):
        if not math.isfinite(value):
            raise ValueError(
                f"`objective` must be finite, got {value} for batch {seen - len(losses) + index} of `batches`. Check "
                "that batch's inputs and labels for NaN, infinite or out-of-range values."
            )


def _check_received(batches: int, received: Mapping[str, int]) -> tuple[str, ...]:
    """The sources that no gradient came from, with a warning; raise where that is all."""
    if batches == 0:
        raise ValueError(
            "`batches` must give at least one batch, got none. A generator or an iterator may have been used up by an "
            "earlier pass: pass a DataLoader or a list."
        )
    missing = [name for name, parts in received.items() if parts == 0]
    if missing and len(missing) == len(received):
        raise ValueError(
            f"The loss has no gradient for any of the target layers {missing[:3]} ({len(missing)} in all): the forward "
            "pass does not call them, or not with a gradient. Choose layers that the objective's forward pass calls, "
            "or an objective that reaches these; name weights that a parent reads past their layer in "
            "`target_parameters`; checkpoint with `use_reentrant=False` where you recompute yourself."
        )
    if missing:
        warnings.warn(
            f"The loss has no gradient for {len(missing)} of {len(received)} target layers ({', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}): the forward pass does not call them, or not with a gradient. "
            "Their statistics stay empty, and an adapter gets rank 0 there; a weight that a parent reads past its "
            "layer is corrected by name in `target_parameters`.",
            stacklevel=4,
        )
    return tuple(missing)


class _Named:
    """Says in a statistic's error which layer it is about; entered for every gradient, so it does no more than that."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"Layer {self.name!r}: {error}") from error


def check_loss(loss: Any, where: str) -> None:
    """Check that an objective returned a scalar tensor with a gradient.

    Args:
        loss: What the objective returned.
        where: The batch, to name in the error.

    Raises:
        ValueError: It did not.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"`objective` must return a scalar tensor, got {type(loss).__name__} "
            f"{tuple(loss.shape) if isinstance(loss, Tensor) else repr(loss)} for {where}."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"`objective` must return a loss that depends on what is trained, got one without a gradient for {where}. "
            "Do not detach the model's output or call the model under `torch.no_grad`."
        )


@contextmanager
def _only_differentiable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach `weights` alone, in eval mode, and put everything back afterwards."""
    parameters = list({id(p): p for p in (*model.parameters(), *weights)}.values())
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [weight.grad for weight in weights]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        with eagerly(model), eval_mode(model):
            yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
