"""Membership inference with shadow models: LiRA and RMIA, with the attack's AUC and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_kind, check_number

from .auc import auc_with_interval


@dataclass(frozen=True)
class ShadowMembership:
    """How well an attack tells examples that were to be forgotten from examples that nobody trained on.

    Attributes:
        attack: Its name.
        auc: The area under its curve in percent: 50 where it cannot tell. A retrained model has that where the two are
            alike; where they are not, such as a class and the other classes, it says what unlike examples give.
        interval: Between which areas 95% of those of examples drawn with replacement lie.
        reference: The same of a model that never trained on them.

    Examples:
        >>> ShadowMembership("RMIA", 61.2, (57.0, 65.3))
        ShadowMembership(RMIA: AUC 61.2%, 95% interval 57.0 to 65.3)
    """

    attack: str
    auc: float
    interval: tuple[float, float]
    reference: ShadowMembership | None = None

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        other = "" if self.reference is None else self.reference._found()
        return f"membership: {self.attack}", self._found(), other

    def _found(self) -> str:
        return f"AUC {self.auc:.1f}%, 95% interval {self.interval[0]:.1f} to {self.interval[1]:.1f}"

    def __repr__(self) -> str:
        beside = "" if self.reference is None else f"; reference {self.reference._found()}"
        return f"ShadowMembership({self.attack}: {self._found()}{beside})"


def score_attack(
    forget: Tensor, non_member: Tensor, *, attack: str = "log-odds", seed: int = 0, redraws: int = 1000
) -> ShadowMembership:
    """The AUC of a score, and its interval over examples drawn with replacement.

    Args:
        forget: Scores of the examples that were to be forgotten, `(F,)`: the higher, the more like a member.
        non_member: Scores of examples that no model was trained on, `(M,)`.
        attack: What to call it.
        seed: Seed of the draws.
        redraws: How many.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: One is empty, not one-dimensional or not finite.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import score_attack
        >>> score_attack(torch.linspace(1, 2, 50), torch.linspace(0, 1.5, 50)).auc > 80
        True
    """
    check_count("seed", seed, least=0)
    check_count("redraws", redraws)
    for name, scores in (("forget", forget), ("non_member", non_member)):
        _check_scores(name, scores, 1)
    area, (low, high) = auc_with_interval(forget, non_member, redraws=redraws, seed=seed)
    return ShadowMembership(attack, 100 * area, (100 * low, 100 * high))


def lira_scores(target: Tensor, shadow_out: Tensor, shadow_in: Tensor | None = None) -> Tensor:
    """`log N(x; μ_in, σ_in) − log N(x; μ_out, σ_out)` of each example's log-odds `x` (Carlini et al. 2022, 2112.03570).

    Without shadow models that were trained on the example (offline) it is the one-sided `Φ((x − μ_out) / σ_out)`, as
    the paper has it, here by its argument. With fewer than 64 shadow models the variance is one for all examples, as in
    the paper.

    Args:
        target: Log-odds of the true class by the attacked model, `(N,)`; see `Predictions.log_odds`.
        shadow_out: The same by models that were not trained on the example, `(S, N)`; NaN where one was.
        shadow_in: The same by models that were, `(S, N)`; NaN where one was not.

    Returns:
        Scores `(N,)`, float64: the higher, the more like a member.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: The shapes do not fit, or an example has no shadow model.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import lira_scores
        >>> lira_scores(torch.tensor([3.0, 1.0]), torch.tensor([[0.0, 0.0], [2.0, 2.0]])).tolist()
        [2.0, 0.0]
    """
    x = _check_scores("target", target, 1)
    mean, deviation = _gaussian("shadow_out", shadow_out, len(x))
    outside = (x - mean) / deviation
    if shadow_in is None:
        return outside
    mean, spread = _gaussian("shadow_in", shadow_in, len(x))
    inside = (x - mean) / spread
    return (outside**2 - inside**2) / 2 + (deviation / spread).log()


def rmia_scores(
    target: Tensor,
    shadow_out: Tensor,
    population: Tensor,
    population_shadow: Tensor,
    *,
    gamma: float = 2.0,
    offline_slope: float = 0.3,
) -> Tensor:
    """`Pr_z[ (p(x|θ) / p(x)) / (p(z|θ) / p(z)) ≥ γ ]`, the share of a population that an example dominates.

    RMIA (Zarifzadeh et al. 2024, arXiv 2312.03262), offline: `p(x) = ½ ((1 + a) p_out(x) + (1 − a))` with `p_out` the
    mean over shadow models that were not trained on `x`; `p(z)` is the plain mean.

    Args:
        target: Confidence of the attacked model in the true class, `(N,)`.
        shadow_out: The same by shadow models, `(S, N)`; NaN where one was trained on the example.
        population: Confidence of the attacked model on examples that are like the data and not in them, `(Z,)`.
        population_shadow: The same by the shadow models, `(S, Z)`.
        gamma: γ, how clearly an example must dominate.
        offline_slope: a, which the authors fit to a shadow model; theirs is 0.3 on CIFAR-10 and 0.6 on CIFAR-100.

    Returns:
        Scores `(N,)` in [0, 1], float64: the higher, the more like a member.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: The shapes do not fit, or a number is out of range.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import rmia_scores
        >>> z, by_shadow = torch.full((4,), 0.5), torch.full((2, 4), 0.5)
        >>> rmia_scores(torch.tensor([0.9, 0.1]), torch.tensor([[0.1, 0.1]] * 2), z, by_shadow, gamma=1.5).tolist()
        [1.0, 0.0]
    """
    check_number("gamma", gamma, low=0)
    check_number("offline_slope", offline_slope, low=0, high=1)
    x, z = _check_scores("target", target, 1), _check_scores("population", population, 1)
    outside = _shadows("shadow_out", shadow_out, len(x)).nanmean(0)
    of_z = _shadows("population_shadow", population_shadow, len(z)).nanmean(0)
    marginal = 0.5 * ((1 + offline_slope) * outside + (1 - offline_slope))
    tiny = torch.finfo(torch.float64).tiny
    ratios, others = x / marginal.clamp(min=tiny), (z / of_z.clamp(min=tiny)).sort().values
    return torch.searchsorted(others, ratios / max(gamma, tiny), right=True).double() / len(others)


def _gaussian(name: str, shadows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values = _shadows(name, shadows, count)
    mean = values.nanmean(0)
    known = ~values.isnan()
    squares = torch.where(known, (values - mean) ** 2, torch.zeros_like(values))
    variance = squares.sum(0) / known.sum(0) if len(values) >= 64 else squares.sum() / known.sum()
    return mean, variance.sqrt().clamp(min=1e-6)


def _shadows(name: str, shadows: Tensor, count: int) -> Tensor:
    check_kind(name, shadows, Tensor, "a tensor (S, N)", "Stack what the shadow models say: `torch.stack([...])`.")
    values = shadows.detach().cpu().double()
    if values.dim() != 2 or values.shape[1] != count or values.isnan().all(0).any():
        raise ValueError(
            f"`{name}` must be (shadow models, {count} examples) with one that counts for each example, got "
            f"{tuple(values.shape)}. Give NaN only where a model does not count."
        )
    return values


def _check_scores(name: str, scores: Tensor, dim: int) -> Tensor:
    check_kind(name, scores, Tensor, "a tensor of scores", "Write `torch.tensor([...])` of a list.")
    if scores.dim() != dim or not len(scores) or not scores.isfinite().all():
        raise ValueError(
            f"`{name}` must be a vector of finite scores, got shape {tuple(scores.shape)}. Take `Predictions.log_odds` "
            "or `Predictions.confidence`."
        )
    return scores.detach().cpu().double()
