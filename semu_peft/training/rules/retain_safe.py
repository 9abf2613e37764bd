"""Steps that to first order leave the retain loss where it is, whatever the optimiser made of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from semu_peft.arguments import check_count

from .base import Rule, Step

_ROUNDING = 4.0  # in units of the last place: a constraint is kept that is broken by no more
_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq")  # of Adam and its kin; AMSGrad divides by the first

ByName = Mapping[str, Tensor]


@dataclass
class RetainSafe(Rule):
    """Let no step raise the retain loss to first order: `⟨g_r, Δ⟩ ≤ 0` for the change `Δ` that is really made.

    A gradient that was made orthogonal to the retain gradient does not stay so in an optimiser with momentum or second
    moments. Here the optimiser's own change `Δ₀` is moved to the nearest one that is safe, in the optimiser's metric:
    `Δ = argmin ½ ‖Δ − Δ₀‖²_M` subject to `⟨g_i, Δ⟩ ≤ 0` for the retain gradients `g_i` of this step and of earlier
    ones. The solution is `Δ₀ − M⁻¹ Σ λ_i g_i` with `λ ≥ 0`, of as many unknowns as there are constraints.

    The retain data are those of the run: `unlearn(..., retain=Retain(batches, objective), rules=RetainSafe())`. Each
    `Retain` is a constraint of its own, and one of `weight=0` is nothing else. Keep the constraints fewer than the
    trained numbers, or hardly a step is left.

    Source: Geometric-disentanglement Unlearning, Zhou et al. 2025, arXiv 2511.17100, in the one-sided form that its
    authors' code supports now.

    Args:
        memory: How many steps' retain gradients to keep as constraints beside this step's; 0 for this step's alone.
        metric: `"optimizer"`: what the optimiser divides gradients by, `M = diag(√v̂ + ε)` of AdamW and its kin, the
            damped curvature of natural gradients; `"identity"`: for optimisers without, such as SGD.

    Raises:
        ValueError: `memory` or `metric` is out of range; in a run, it has no retain data, or its optimiser has no
            second moments and `metric` asks for them.

    Examples:
        >>> from semu_peft import Retain, objectives, unlearn
        >>> model = torch.nn.Linear(4, 3)
        >>> forget, retain = ([(torch.randn(8, 4), torch.randint(3, (8,)))] for _ in range(2))
        >>> keep = Retain(retain, objectives.CrossEntropy(), weight=0)
        >>> ascent = objectives.GradientAscent()
        >>> unlearn(model, forget, ascent, retain=keep, rules=RetainSafe(), max_steps=3, progress=False).steps
        3
    """

    needs_whole_parameters = True

    memory: int = 8
    metric: Literal["optimizer", "identity"] = "optimizer"

    def __post_init__(self) -> None:
        check_count("memory", self.memory, least=0)
        if self.metric not in ("optimizer", "identity"):
            raise ValueError(f"`metric` must be 'optimizer' or 'identity', got {self.metric!r}. Take 'optimizer'.")
        self._number = -1
        self._now: list[dict[str, Tensor]] = []
        self._past: list[list[dict[str, Tensor]]] = []  # by step, the newest first

    def gradients(self, step: Step) -> None:
        found = step.needed_data(self).retain_gradients()
        if not found:
            raise ValueError(
                "`rules`: RetainSafe needs the run's retain data, got none. Give `retain=Retain(batches, objective)`, "
                "with `weight=0` to keep them out of the loss."
            )
        if step.number != self._number:  # an optimiser that evaluates again asks about one step several times
            self._past = [each for each in [self._now, *self._past] if each][: self.memory]
        self._now, self._number = found, step.number

    def update(self, step: Step) -> None:
        constraints = self._now + [each for earlier in self._past for each in earlier]
        safe = nearest_safe(step.changes, constraints, self._divided(step, constraints))
        for name, change in safe.items():
            step.parameters[name].copy_(step.before[name] + change)

    def _divided(self, step: Step, constraints: Sequence[ByName]) -> Sequence[ByName]:
        """`M⁻¹ g` of each constraint."""
        if self.metric == "identity":
            return constraints
        if step.natural is not None:
            return [
                step.natural({name: each[name].to(p.device) for name, p in step.parameters.items()})
                for each in constraints
            ]
        metric = _adam_metric(
            step, step.needed_optimizer(self, "with `metric='optimizer'` reads the optimiser's metric")
        )
        return [{name: each[name].to(weight) / weight for name, weight in metric.items()} for each in constraints]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number, "now": list(self._now), "past": [list(each) for each in self._past]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number, self._now, self._past = state["number"], list(state["now"]), list(state["past"])


def _adam_metric(step: Step, optimizer: Optimizer) -> dict[str, Tensor]:
    """`√v̂ + ε` of each parameter, float64.

    Raises:
        ValueError: The optimiser keeps no second moments by entry.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    metric = {}
    for name, parameter in step.parameters.items():
        state, group = step.state_of(name), groups[id(parameter)]
        moment = next((state[key] for key in _MOMENTS if isinstance(state.get(key), Tensor)), None)
        if moment is None or "betas" not in group or moment.shape != parameter.shape:
            kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise ValueError(
                f"`metric` of RetainSafe must be 'identity' with {kind}, got 'optimizer': it keeps no second moments "
                f"of {name!r} that could be read. Or train by AdamW."
            )
        correction = 1.0 - group["betas"][1] ** float(state["step"])
        metric[name] = (moment.double() / correction).sqrt() + group.get("eps", 0.0)
    return metric


def nearest_safe(changes: ByName, constraints: Sequence[ByName], divided: Sequence[ByName]) -> dict[str, Tensor]:
    """The nearest change with `⟨g, Δ⟩ ≤ 0` for every constraint `g`; empty where the change is safe as it is.

    Args:
        changes: `Δ₀` by parameter name.
        constraints: The gradients `g`, by the same names.
        divided: `M⁻¹ g` of each; the gradients themselves for `M = I`.

    Examples:
        >>> change, retain = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}
        >>> nearest_safe(change, [retain], [{"w": torch.tensor([1.0, 0.25])}])["w"]
        tensor([-0.6000,  0.6000])
    """
    if not constraints:
        return {}
    count, sizes = len(constraints), [0.0, 0.0]
    gram, broken = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for name, change in changes.items():
        rows, solved = (_rows(each, name, change) for each in (constraints, divided))
        gram += (rows @ solved.mT).cpu()
        broken += (rows @ change.double().flatten()).cpu()
        sizes = [sizes[0] + float(rows.square().sum(1).max()), sizes[1] + float(change.double().square().sum())]
    unit = gram.diagonal().clamp_min(0).sqrt()
    unit = torch.where(unit > 0, 1.0 / unit, 0.0)
    precision = max((torch.finfo(change.dtype).eps for change in changes.values()), default=0.0)
    allowed = _ROUNDING * precision * (sizes[0] * sizes[1]) ** 0.5 * float(unit.max())
    scaled = unit[:, None] * (gram + gram.mT) / 2 * unit
    multipliers = unit * nonnegative_multipliers(scaled, unit * broken, allowed)
    if not multipliers.any():
        return {}
    return {name: _corrected(change, multipliers, divided, name) for name, change in changes.items()}


def _rows(gradients: Sequence[ByName], name: str, like: Tensor) -> Tensor:
    return torch.stack([each[name].to(like.device).double().flatten() for each in gradients])


def _corrected(change: Tensor, multipliers: Tensor, divided: Sequence[ByName], name: str) -> Tensor:
    wide = change.double()
    for multiplier, each in zip(multipliers.tolist(), divided, strict=True):
        if multiplier:
            wide = wide - multiplier * each[name].to(wide)
    return wide.to(change.dtype)


def nonnegative_multipliers(gram: Tensor, broken: Tensor, allowed: float) -> Tensor:
    """`λ ≥ 0` with `K λ ≥ b` and `λ_i (K λ − b)_i = 0`, by Lawson and Hanson's active sets (1974, algorithm 23.10).

    Args:
        gram: `K`, `(k, k)`, positive semidefinite with a diagonal of ones (or zeros).
        broken: `b`, `(k,)`.
        allowed: By how much `K λ` may fall short of `b`.

    Examples:
        >>> nonnegative_multipliers(torch.eye(2).double(), torch.tensor([0.5, -1.0]).double(), 0.0)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    multipliers, active = torch.zeros_like(broken), torch.zeros_like(broken, dtype=torch.bool)
    for _ in range(3 * len(broken)):
        short = torch.where(active, -torch.inf, broken - gram @ multipliers)
        if not len(short) or short.max() <= allowed:
            break
        active[short.argmax()] = True
        while active.any():
            wanted = torch.zeros_like(broken)
            inside = gram[active][:, active]
            wanted[active] = torch.linalg.pinv(inside, hermitian=True) @ broken[active]
            falling = active & (wanted <= 0)
            if not falling.any():
                multipliers = wanted
                break
            share = (multipliers[falling] / (multipliers[falling] - wanted[falling])).min().nan_to_num()
            multipliers = torch.where(active, multipliers + share * (wanted - multipliers), 0.0)
            active &= ~(falling & (multipliers <= 1e-15))
            multipliers[~active] = 0.0
    return multipliers
