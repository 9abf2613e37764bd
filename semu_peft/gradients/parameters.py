"""Statistics of every parameter: weights of layers, biases, norms, position embeddings, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from semu_peft.arguments import check_kind, check_model
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.examples import single_examples
from semu_peft.tuner.adapted import own_parameters

from .batch_gradient import BatchGradient
from .gather import Gathered, stream_gradients
from .sources import GradientSource, WeightSource, carries_gradient
from .statistics import SquaredSum, Statistic, StatisticFactory


def gather_parameters(
    model: nn.Module,
    batches: Iterable[Any],
    objective: LossFunction,
    *,
    targets: Sequence[str] | None = None,
    statistic: StatisticFactory = SquaredSum,
    per: Literal["example", "batch"] = "example",
    progress: bool = True,
) -> Gathered:
    """Gather a statistic of the objective's gradient at every parameter of the model, over one pass of the batches.

    [`gather`][semu_peft.gradients.gather.gather] reads the gradient of a layer's weight off its inputs and output
    gradients, a whole batch at a time; a bias, a norm or a class token has no such layer. Here autograd differentiates
    by the parameters themselves, so that any model will do, and examples are kept apart in the one way that is exact
    for all of them: a batch is passed example by example. That costs as many passes as there are examples, and takes
    no more memory than one. Where the weights of layers are enough, `gather` is the quicker way.

    Args:
        model: Any model; the parameters of adapters in it are left out.
        batches: As for `gather`.
        objective: `(model, batch) -> scalar loss`.
        targets: Which parameters, by their full names or the names of the modules that hold them. By default all that
            carry a gradient.
        statistic: What to keep of each, shaped as the parameter: `SquaredSum`, the diagonal of the Fisher information;
            [`AbsoluteSum`][semu_peft.gradients.parameters.AbsoluteSum]; `GradientSum`.
        per: Whose gradients: of single examples, whatever the batch size; or of whole batches, in which those of unlike
            examples cancel (with `SquaredSum.per_batch` what much published code calls Fisher).
        progress: Show a progress bar.

    Returns:
        The statistics by the parameters' full names in the base model.

    Raises:
        ValueError: No parameter matches, or the data cannot give a gradient.
        TypeError: `batches` is one batch, or a batch cannot be split into its examples.

    Examples:
        >>> from semu_peft.gradients.parameters import gather_parameters
        >>> from semu_peft.objectives import CrossEntropy
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> fisher = gather_parameters(
        ...     model, [(torch.randn(8, 3), torch.randint(2, (8,)))], CrossEntropy(), progress=False
        ... )
        >>> fisher.examples, fisher["0.bias"].mean.shape, "1.weight" in fisher
        (8, torch.Size([4]), True)
    """
    check_model(model)
    check_batches(batches)
    as_objective(objective)
    if per not in ("example", "batch"):
        raise ValueError(
            f"`per` must be 'example' or 'batch', got {per!r}. Take 'example' unless you reproduce others."
        )
    sources = _sources(model, targets)
    statistics = {name: statistic(source.shape, source.dtype, source.device) for name, source in sources.items()}
    runner = extract_model_from_parallel(model)
    taken = (one for batch in batches for one in single_examples(batch)) if per == "example" else batches
    counts = stream_gradients(runner, sources, statistics, taken, objective, progress=progress)
    return Gathered(statistics, counts.batches, counts.examples, counts.unused)


class AbsoluteSum(Statistic):
    """The sum of the gradients' absolute values, `Σ_i |g_i|`: the importance that label-free dampening takes.

    Source: LFSSD, Foster et al. 2024, arXiv 2402.19308; see
    [`SquaredLogits`][semu_peft.objectives.label_free.SquaredLogits].

    Args:
        shape: Of the parameter.
        dtype: Of the sum.
        device: Where it is kept.

    Examples:
        >>> from semu_peft.gradients import DenseGradient
        >>> total = AbsoluteSum((2,), torch.float32, torch.device("cpu"))
        >>> for gradient in ([3.0, -1.0], [-1.0, -1.0]):
        ...     total.add(DenseGradient(torch.tensor(gradient)))
        ...     total.end_batch(1)
        >>> total.mean
        tensor([2., 1.])
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        """Over how many gradients: examples, or batches."""
        return int(self._count)

    @property
    def mean(self) -> Tensor:
        """The sum over `count`."""
        return self.total / self._count.clamp_min(1).to(self.total.dtype)

    def add(self, gradient: BatchGradient) -> None:
        self.total += gradient.dense().abs().to(self.total)

    def end_batch(self, examples: int | None) -> None:
        self._count += 1

    def tensors(self) -> list[Tensor]:
        return [self.total, self._count]


def _sources(model: nn.Module, targets: Sequence[str] | None) -> dict[str, GradientSource]:
    if targets is not None:
        check_kind("targets", targets, (list, tuple, set), "a list of names or None", "Put one in a list.")
    found: dict[str, GradientSource] = {}
    seen: set[int] = set()
    for name, parameter in own_parameters(model).items():
        wanted = targets is None or any(name == each or name.startswith(f"{each}.") for each in targets)
        if wanted and carries_gradient(parameter) and id(parameter) not in seen:  # tied ones once
            seen.add(id(parameter))
            found[name] = WeightSource(parameter)
    if not found:
        raise ValueError(
            f"`targets`: no parameter of {type(model).__name__} that carries a gradient is among {targets}. Give full "
            "names as `named_parameters()` has them, or leave it out to take all."
        )
    return found
