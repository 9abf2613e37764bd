"""One step in closed form: along the difference of two gradients, or Newton's with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from semu_peft.arguments import check_kind, check_number
from semu_peft.gradients.gather import Gathered, of_each_weight
from semu_peft.gradients.statistics import CoreCovariance, GradientSum
from semu_peft.linalg.closed_form import kronecker_solve

from .deltas import Dense
from .edit import Edit


def influence_step(
    forget: Gathered, retain: Gathered, *, step_size: float, update: Literal["gradient", "sign"] = "gradient"
) -> Edit:
    """IAU: one step that learns the negative of the forget data, `Δθ = η (g_F − g_R)`, with the gradients' means.

    The released code takes that step with a fresh Adam, whose first step is `η sign(g_F − g_R)`: as large for every
    weight, whatever the losses are. `update="sign"` is that; with it a step of 1e-3 forgets nothing in a small
    classifier, and one of 1e-2 costs ten points of the others' accuracy. The means are over batches: give batches of
    one size.

    Source: Liu et al. 2025, *Influence Approximation Unlearning*, arXiv 2507.23257. Their pre-training with a penalty
    on the gradient's norm is not needed, and concerns those alone who train the original.

    Args:
        forget: Sums of the gradients of the data to forget, of `gather` or `gather_parameters` with
            [`GradientSum`][semu_peft.gradients.statistics.GradientSum].
        retain: Those of the data to keep, of the same parameters.
        step_size: `η`, the learning rate.
        update: The difference itself, or its sign.

    Raises:
        ValueError: The two are not of the same parameters, or an argument is out of range.
        TypeError: They are no sums of gradients.

    Examples:
        >>> import torch
        >>> from semu_peft import gather, objectives
        >>> from semu_peft.edits import influence_step
        >>> model, loss = torch.nn.Linear(4, 3), objectives.CrossEntropy()
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> seen = [gather(model, data, loss, progress=False) for data in (forget, retain)]
        >>> before = loss(model, forget[0])
        >>> with influence_step(*seen, step_size=0.1).apply(model):
        ...     bool(loss(model, forget[0]) > before)
        True
    """
    check_number("step_size", step_size, low=0.0)
    if update not in ("gradient", "sign"):
        raise ValueError(f"`update` must be 'gradient' or 'sign', got {update!r}. Take 'gradient'.")
    parts, others = _means("forget", forget), _means("retain", retain)
    if {n: g.shape for n, g in parts.items()} != {n: g.shape for n, g in others.items()}:
        raise ValueError("`forget` and `retain` must be gradients of the same parameters. Gather both in one way.")
    differences = {name: part - others[name] for name, part in parts.items()}
    if update == "sign":
        differences = {name: difference.sign() for name, difference in differences.items()}
    deltas = {name: Dense(step_size * difference) for name, difference in differences.items()}
    return Edit(deltas, "influence_step", {"step_size": step_size, "update": update})


def newton_step(
    forget: Gathered,
    retain: Gathered,
    *,
    damping: float = 0.01,
    step_size: float = 1.0,
    outputs: Literal["fisher", "identity"] = "fisher",
) -> Edit:
    """K-FADE: a Newton step uphill on the forget data, in the curvature of the data to keep, `ΔW = η B⁻¹ G A⁻¹`.

    `A` and `B` are K-FAC's factors of the retained data, the second moments of a layer's inputs and of its output
    gradients, and `G` is `n_F / n_R` times the mean gradient of the `n_F` examples to forget: at a minimum of the loss
    of all data the gradient of the retained data is its negative, so that a step of 1 goes to where training without
    them would end, as far as the loss is quadratic and its curvature `B ⊗ A`. For a linear regression it is, and the
    step *is* retraining. The moments are means over rows (tokens, or windows of a convolution); an example's curvature
    is that of all its rows, as if these were independent.

        forget = gather(model, forget_batches, loss)
        retain = gather(model, retain_batches, loss, statistic=CoreCovariance.of_weight)
        newton_step(forget, retain).apply(model)

    Biases stay: give a layer a constant input to have its bias in the weight.

    Source: K-FADE (PB&J), arXiv 2602.10568, inferred from its abstract as there is no code; K-FAC: Martens and Grosse
    2015, arXiv 1503.05671; its rows of one example: Grosse and Martens 2016, arXiv 1602.01407.

    Args:
        forget: Sums of gradients, [`GradientSum`][semu_peft.gradients.statistics.GradientSum].
        retain: Factors, [`CoreCovariance.of_weight`][semu_peft.gradients.statistics.CoreCovariance.of_weight], of at
            least those layers; layers that have none stay.
        damping: Share of the mean curvature that is added to each.
        step_size: `η`.
        outputs: What the outputs' curvature is: the second moment of their gradients, or the identity, which is exact
            for a loss `½‖y − t‖²`.

    Raises:
        ValueError: The layers have no factors or do not fit them, or an argument is out of range.
        TypeError: The statistics are of other kinds.

    Examples:
        >>> import torch
        >>> from semu_peft import CoreCovariance, gather, objectives
        >>> from semu_peft.edits import newton_step
        >>> model, loss = torch.nn.Linear(4, 3), objectives.CrossEntropy()
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> gradients = gather(model, forget, loss, progress=False)
        >>> factors = gather(model, retain, loss, statistic=CoreCovariance.of_weight, progress=False)
        >>> newton_step(gradients, factors)
        Edit(newton_step(damping=0.01, step_size=1): 12 numbers of 1 parameters)
    """
    check_number("damping", damping, low=0.0)
    check_number("step_size", step_size, low=0.0)
    if outputs not in ("fisher", "identity"):
        raise ValueError(f"`outputs` must be 'fisher' or 'identity', got {outputs!r}. Take 'fisher' for a classifier.")
    gradients = _means("forget", forget)
    mend = "Gather with `statistic=CoreCovariance.of_weight`."
    check_kind("retain", retain, Mapping, "gathered factors", mend)
    for statistic in retain.values():
        check_kind("retain", statistic, CoreCovariance, "gathered factors", mend)
    if not forget.examples or not retain.examples:
        raise ValueError("`forget` and `retain` must say how many examples they saw. Give batches that hold tensors.")
    share = forget.examples / retain.examples
    deltas = {}
    for name in [name for name in gradients if name in retain]:
        factors = retain[name]
        assert isinstance(factors, CoreCovariance)
        a, b = factors.inputs, factors.outputs if outputs == "fisher" else None
        if gradients[name].shape != (len(factors.outputs), len(a)):
            raise ValueError(f"`retain`: the factors of {name!r} do not fit its gradient. Gather `of_weight`.")
        mean = float(a.double().trace() / len(a)) * (1.0 if b is None else float(b.double().trace() / len(b)))
        rows = factors.rows / retain.examples  # none where no retained example came by
        step = kronecker_solve(share * step_size * gradients[name].double(), rows * a, b, damping * rows * mean)
        deltas[name] = Dense(step.to(gradients[name].dtype))
    if not deltas:
        raise ValueError("`retain` must have the factors of some of the layers in `forget`. Gather the same `targets`.")
    return Edit(deltas, "newton_step", {"damping": damping, "step_size": step_size, "outputs": outputs})


def _means(role: str, gathered: Gathered) -> dict[str, Tensor]:
    """The mean gradient of each parameter, over batches."""
    mend = "Gather with `statistic=GradientSum`, the default of `gather`."
    check_kind(role, gathered, Gathered, "gathered gradients", mend)
    for statistic in gathered.values():
        check_kind(role, statistic, GradientSum, "sums of gradients", mend)
    means = of_each_weight(gathered).items()  # shared weights are changed once
    return {name: s.total / gathered.batches for name, s in means if isinstance(s, GradientSum)}
