"""Membership inference: can an attacker who sees the model's confidence tell that it once trained on an example?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_kind

# A wider interval moves the mean of four metrics by more than three points either way: the attack cannot tell. That of
# a good attack on 100 examples is 20 at the most, from their number alone.
WIDEST_INTERVAL = 25.0
_BOOTSTRAP_EXAMPLES = 400  # per side of each refit


@dataclass(frozen=True)
class MembershipInference:
    """What attacks say of a forget set, in percent of its examples that they take for never trained on.

    Attributes:
        share: Of the papers' support vector classifier, see
            [`membership_inference`][semu_peft.evaluation.membership.membership_inference].
        interval: Between which shares 95% of its refits on resampled examples lie.
        threshold_share: Of a threshold on the score, put where it tells members from non-members best. It sees an order
            alone, so that it neither saturates nor guesses beyond the examples that it knows.

    Examples:
        >>> from semu_peft.evaluation import MembershipInference
        >>> MembershipInference(97.0, (2.0, 100.0), 98.0)  # of a model that is as sure of test as of training data
        MembershipInference(97.0%, 95% interval 2.0 to 100.0, threshold 98.0%: cannot tell)
    """

    share: float
    interval: tuple[float, float]
    threshold_share: float

    @property
    def can_tell(self) -> bool:
        """Whether the interval is narrow enough for the share to mean something."""
        return self.interval[1] - self.interval[0] <= WIDEST_INTERVAL

    def __str__(self) -> str:
        low, high = self.interval
        doubt = "" if self.can_tell else ": cannot tell"
        return f"{self.share:.1f}%, 95% interval {low:.1f} to {high:.1f}, threshold {self.threshold_share:.1f}%{doubt}"

    def __repr__(self) -> str:
        return f"MembershipInference({self})"


def attack_membership(
    member: Tensor,
    non_member: Tensor,
    forget: Tensor,
    *,
    scores: tuple[Tensor, Tensor, Tensor] | None = None,
    seed: int = 0,
    max_examples: int | None = 2000,
    refits: int = 20,
) -> MembershipInference:
    """The papers' attack with its confidence interval, and beside it one that does not saturate.

    A model that does not overfit confides equally in members and non-members. The support vector classifier then draws
    a border by chance, and a forget set whose confidences crowd together falls on one side of it as a whole: 0 or 100,
    by the draw. The interval shows it: the attack is fitted again on examples drawn with replacement.

    Args:
        member: Confidence in the true class on retained training examples, `(N,)`.
        non_member: The same on examples that no model was trained on.
        forget: The same on the forget set.
        scores: What the threshold attack sees of the three, for example log-odds, which do not round to 1 as
            confidences do; by default the confidences.
        seed: Seeds all draws.
        max_examples: See [`membership_inference`][semu_peft.evaluation.membership.membership_inference].
        refits: How often the attack is fitted again, on at most 400 examples a side.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: See [`membership_inference`][semu_peft.evaluation.membership.membership_inference].

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import attack_membership
        >>> member, non_member = torch.linspace(0.8, 1.0, 20), torch.linspace(0.1, 0.6, 20)
        >>> attack_membership(member, non_member, forget=torch.tensor([0.2, 0.3, 0.4, 0.95] * 25)).threshold_share
        75.0
    """
    share = membership_inference(member, non_member, forget, seed=seed, max_examples=max_examples)
    generator = torch.Generator().manual_seed(seed + 1)
    # No more than there are: more draws would tell of more examples, and of an interval that is too narrow.
    count = min(len(member), len(non_member), _BOOTSTRAP_EXAMPLES)
    shares = []
    for _ in range(refits):
        members, others = (_redraw(side, count, generator) for side in (member, non_member))
        shares.append(_share(members, others, _redraw(forget, len(forget), generator)))
    quantiles = torch.quantile(torch.tensor([share, *shares]).double(), torch.tensor([0.025, 0.975]).double()).tolist()
    return MembershipInference(
        share, (quantiles[0], quantiles[1]), threshold_attack(*(scores or (member, non_member, forget)))
    )


def threshold_attack(member: Tensor, non_member: Tensor, forget: Tensor) -> float:
    """Share of the forget examples, in percent, whose score lies below the best border of members and non-members.

    The border is put where the mean of the two sides' accuracies is largest, at the lowest such place, and below it is
    a non-member (Yeom et al. 2018, arXiv 1709.01604).

    Args:
        member: A score on retained training examples, `(N,)`: the larger, the more confident in the true class.
        non_member: The same on examples that no model was trained on.
        forget: The same on the forget set.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.membership import threshold_attack
        >>> threshold_attack(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), forget=torch.tensor([-9.0, 5.0]))
        50.0
    """
    member, non_member, forget = (side.detach().cpu().double() for side in (member, non_member, forget))
    borders = torch.cat([member, non_member]).unique()
    below = torch.searchsorted(non_member.sort().values, borders) / len(non_member)
    missed = torch.searchsorted(member.sort().values, borders) / len(member)
    return float(100 * (forget < borders[(below - missed).argmax()]).double().mean())


def membership_inference(
    member: Tensor,
    non_member: Tensor,
    forget: Tensor,
    *,
    seed: int = 0,
    max_examples: int | None = 2000,
) -> float:
    """Share of the forget examples that a confidence attack takes for examples the model was never trained on.

    The attack of SalUn (Fan et al., ICLR 2024, arXiv 2310.12508), which SEMU (arXiv 2502.07587) reports too: a support
    vector classifier with `C=3`, `gamma="auto"` and an RBF kernel sees one number per example, the probability the
    model gives to the true class. It is fitted on equally many members (retain-train) and non-members (test) and then
    asked about the forget examples. The number has a meaning only beside that of a model retrained without the forget
    set: where the model confides equally in members and non-members the classifier is guessing, and both very low and
    very high shares come out by chance; [`attack_membership`][semu_peft.evaluation.membership.attack_membership] says
    so. Below all confidences that it was fitted on, as those of a class that is gone for good, an example is called a
    non-member and above them a member: there the classifier has seen nothing and would guess for all at once.

    Args:
        member: Confidence in the true class on retained training examples, `(N,)`, floating point, in [0, 1].
        non_member: Confidence in the true class on examples that no model was trained on (test), `(M,)`.
        forget: Confidence in the true class on the forget set, `(F,)`.
        seed: Seeds the draw of the examples that the attack is fitted on. Nothing else is random.
        max_examples: Most examples per side to fit on. Fitting costs the square of their number: 2000 per side take
            about 2 s on one CPU core, 5000 about 10 s. `None` uses `min(N, M)` per side, as the papers do.

    Returns:
        The share in percent, 0 to 100.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: A tensor is empty, not one-dimensional or holds a value outside [0, 1], or `max_examples` < 1.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import membership_inference
        >>> member, non_member = torch.linspace(0.8, 1.0, 20), torch.linspace(0.1, 0.6, 20)
        >>> membership_inference(member, non_member, forget=torch.tensor([0.2, 0.3, 0.4, 0.95]))
        75.0
    """
    _scikit_learn()
    for name, confidence in (("member", member), ("non_member", non_member), ("forget", forget)):
        check_kind(name, confidence, Tensor, "a tensor of confidences", "Write `torch.tensor([...])` of a list.")
        _check_confidence(name, confidence)
    check_count("max_examples", max_examples, optional=True)
    check_count("seed", seed, least=0)

    count = min(len(member), len(non_member))
    if max_examples is not None:
        count = min(count, max_examples)
    generator = torch.Generator().manual_seed(seed)
    drawn = [_draw(confidence, count, generator) for confidence in (member, non_member)]
    return _share(drawn[0], drawn[1], forget.detach().cpu().double())


def _share(member: Tensor, non_member: Tensor, forget: Tensor) -> float:
    """Fit the attack on two sides of the same size, and ask it about the forget set; all float64 on the CPU."""
    np, svc = _scikit_learn()
    fitted = torch.cat([member, non_member])
    attack = svc(C=3, gamma="auto", kernel="rbf", random_state=0)  # else it draws from NumPy's global generator
    attack.fit(fitted.unsqueeze(1).numpy(), np.repeat([1, 0], len(member)))
    # Confidence saturates at 0 and 1, so a forget set repeats values; asking about each one once is exact and faster.
    values, repeats = np.unique(forget.numpy(), return_counts=True)
    called_non_member = attack.predict(values[:, None]) == 0
    called_non_member[values < float(fitted.min())] = True
    called_non_member[values > float(fitted.max())] = False
    return float(100 * repeats[called_non_member].sum() / repeats.sum())


def _scikit_learn() -> tuple[Any, Any]:
    try:
        import numpy
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            'membership_inference needs scikit-learn: run `pip install ".[evaluation]"` in a clone of semu-peft.'
        ) from error
    return numpy, SVC


def _redraw(confidence: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of the `(N,)` values with replacement, as float64 on the CPU."""
    return confidence.detach().cpu().double()[torch.randint(len(confidence), (count,), generator=generator)]


def _draw(confidence: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of the `(N,)` values without replacement, as float64 on the CPU."""
    order = torch.randperm(len(confidence), generator=generator)
    return confidence.detach().cpu().double()[order[:count]]


def _check_confidence(name: str, confidence: Tensor) -> None:
    """Raise ValueError unless `confidence` is a non-empty vector of probabilities."""
    mend = "Give the model's probability of the true class for each example, as in `predict(...).confidence`."
    if confidence.dim() != 1 or len(confidence) == 0:
        raise ValueError(f"`{name}` must be a non-empty vector, got shape {tuple(confidence.shape)}. {mend}")
    outside = ~((confidence >= 0) & (confidence <= 1))  # written so that NaN counts as outside
    if outside.any():
        raise ValueError(
            f"`{name}` must be probabilities, got {int(outside.sum())} of {len(confidence)} values outside [0, 1] or "
            f"NaN. {mend}"
        )
