"""Objectives that see an answer as a whole: a sigmoid of its margin, and divergences from another answer.

`−2/β log σ(β · margin)`, the mean over answers, is bounded below by zero, and its push fades once the margin is many
times `1/β`; the objectives of this kind differ in what the margin is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_number, check_positive

from .base import Evaluation, Outputs
from .batches import IGNORED, alternate_batch, as_labels, split_batch
from .language import SequenceObjective
from .tokens import Tokens


@dataclass
class NPO(SequenceObjective):
    """`2/β log(1 + (p(y | x) / p₀(y | x))^β)` of whole answers (Zhang et al. 2024, arXiv 2404.05868).

    The margin is `N − N₀`, how much less likely the answer is now, `N = −Σ log p` over its tokens, not divided by their
    number. At the original the gradient is that of `log p(y | x)` for every β; it fades as the answer becomes unlikely,
    the later the smaller β is.

    Args:
        beta: How soon the push fades, β.
        reference: A frozen original model. By default the model itself without its adapter.

    Raises:
        ValueError: `beta` is not above zero.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import NPO
        >>> batch = (torch.zeros(2, 4), torch.tensor([0, 1]))  # the inputs are the logits
        >>> model = torch.nn.Identity()
        >>> round(NPO(reference=model)(model, batch).item(), 4)  # 2/β log 2 at the original
        13.8629
    """

    beta: float = 0.1
    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        tokens = self._original_tokens(model, batch, self.reference)
        return tokens.sums(tokens.nll())

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        return _sigmoid_margin(tokens.sums(tokens.nll()) - prepared, self.beta)


@dataclass
class SimNPO(SequenceObjective):
    """NPO without a reference, `−2/β log σ(β (n − δ))` with `n = −1/|y| log p(y | x)` (Fan et al. 2024, 2410.07163).

    The likelihood is a mean over an answer's tokens, so that long answers do not count for more.

    Args:
        beta: How soon the push fades, β.
        delta: The negative log-likelihood per token that is aimed at, δ, before the push has half faded.

    Raises:
        ValueError: `beta` is not above zero.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import SimNPO
        >>> batch = (torch.zeros(2, 4), torch.tensor([0, 1]))  # the inputs are the logits
        >>> round(SimNPO(beta=1.0)(torch.nn.Identity(), batch).item(), 4)  # 2 log(1 + 1/4)
        0.4463
    """

    beta: float = 4.5
    delta: float = 0.0
    minimum = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_number("delta", self.delta)

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        return _sigmoid_margin(tokens.means(tokens.nll()) - self.delta, self.beta)


@dataclass
class TPO(SequenceObjective):
    """`−2/β log σ(β · mean_t(z₀(y_t) − z(y_t)))`, a margin of raw logits (2025, arXiv 2506.03142).

    The paper takes it of an answer's unwanted tokens only, beside the cross entropy of the others:
    `TokenSelective(TPO()) + TokenSelective(CrossEntropy(), selected=False)`, see
    [`TokenSelective`][semu_peft.objectives.wrappers.TokenSelective].

    Args:
        beta: How soon the push fades, β.
        reference: A frozen original model. By default the model itself without its adapter.

    Raises:
        ValueError: `beta` is not above zero.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import TPO
        >>> model, batch = torch.nn.Identity(), (torch.tensor([[5.0, 1.0]]), torch.tensor([0]))
        >>> fallen = lambda x: torch.tensor([[6.0, 1.0]])  # the original's logits: by 1 higher
        >>> round(TPO(beta=1.0, reference=fallen)(model, batch).item(), 4)  # 2 log(1 + 1/e)
        0.6265
    """

    beta: float = 0.32
    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        return _mean_logits(self._original_tokens(model, batch, self.reference))

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        return _sigmoid_margin(prepared - _mean_logits(tokens), self.beta)


@dataclass
class AlternateObjective(SequenceObjective):
    """What objectives share that need a second answer to each prompt, one that the model may give.

    It stands in the batch under `alternate_input_ids`, `alternate_attention_mask` and `alternate_labels`.

    Raises:
        TypeError: The batch has none.
        ValueError: There are not as many second answers as answers.

    Examples:
        >>> from semu_peft.objectives import DPO
        >>> from semu_peft.objectives.preference import AlternateObjective
        >>> isinstance(DPO(), AlternateObjective)
        True
    """

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        second = alternate_batch(batch)
        answers, alternates = self._read_tokens(model, batch), self._read_tokens(model, second)
        is_even = torch.equal(
            _answered(split_batch(batch)[2]), _answered(second["labels"])
        )  # or the pairs would be shifted
        if not is_even or int(answers.sequences[-1]) != int(alternates.sequences[-1]):
            raise ValueError(
                f"`alternate_labels` must leave a token of one second answer for each answer, got "
                f"{int(alternates.sequences[-1]) + 1} for {int(answers.sequences[-1]) + 1}. Give a refusal where there "
                "is no other."
            )
        # Of the second answers nothing is to be forgotten: they have no labels.
        outputs = (Outputs(answers.logits, answers.labels, 0.5), Outputs(alternates.logits, weight=0.5))
        return Evaluation(self.pair_loss(answers, alternates, prepared), outputs)

    def pair_loss(self, answers: Tokens, alternates: Tokens, prepared: Any) -> Tensor:
        """The loss of the answers and the second answers, and of what `prepare` returned for their batch."""
        raise NotImplementedError


@dataclass
class AlternateAnswer(SequenceObjective):
    """`CE(second answer)`: learn the other answer that stands beside each one in the batch.

    With a refusal it is IdkNLL. With the same question about a harmless image and its ordinary answer it is
    SafeEraser's *prompt decoupling* (arXiv 2502.12520), which keeps the question from being refused as such: the pairs
    stand in one batch, so that no loader can part them, as the released code's index does.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import AlternateAnswer
        >>> batch = {"input": torch.zeros(1, 2, 4), "labels": torch.tensor([[0, 1]])}
        >>> batch |= {f"alternate_{name}": value for name, value in batch.items()}
        >>> round(AlternateAnswer(shift_labels=True)(torch.nn.Identity(), batch).item(), 4)  # log 4
        1.3863
    """

    minimum = 0.0

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        tokens = self._read_tokens(model, alternate_batch(batch))
        return Evaluation(tokens.nll().mean(), (Outputs(tokens.logits),))


@dataclass
class DPO(AlternateObjective):
    """`−2/β log σ(β ((N₀ − N)(second answer) − (N₀ − N)(answer)))` (Rafailov et al. 2023, arXiv 2305.18290).

    `N = −Σ log p` over an answer's tokens. With a refusal as the second answer it is IdkDPO, with answers that the
    original gave to the same question when it was sampled it is AltPO (Mekala et al. 2024, arXiv 2409.13474): what the
    second answers are is the data's affair.

    Args:
        beta: How soon the push fades, β.
        reference: A frozen original model. By default the model itself without its adapter.

    Raises:
        ValueError: `beta` is not above zero.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import DPO
        >>> class Table(torch.nn.Embedding):
        ...     def forward(self, input_ids):
        ...         return super().forward(input_ids)
        >>> model, ids = Table(4, 4), torch.tensor([[0, 1, 2]])
        >>> batch = {"input_ids": ids, "labels": ids, "alternate_input_ids": ids + 1, "alternate_labels": ids + 1}
        >>> round(DPO(shift_labels=True, reference=model)(model, batch).item(), 4)  # 2/β log 2 at the original
        13.8629
    """

    beta: float = 0.1
    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def prepare(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        answers = self._original_tokens(model, batch, self.reference)
        alternates = self._original_tokens(model, alternate_batch(batch), self.reference)
        return answers.sums(answers.nll()), alternates.sums(alternates.nll())

    def pair_loss(self, answers: Tokens, alternates: Tokens, prepared: Any) -> Tensor:
        of_answers, of_alternates = prepared
        less_likely = answers.sums(answers.nll()) - of_answers
        more_likely = of_alternates - alternates.sums(alternates.nll())
        return _sigmoid_margin(less_likely + more_likely, self.beta)


@dataclass
class FDivergence(AlternateObjective):
    """`−g(P′) + f*(g(P))`: the divergence of second answers from answers, in its variational form (FLAT, 2410.11143).

    `P` and `P′` are the mean probabilities of an answer's tokens and of the second answer's; raising the bound on the
    divergence makes the one unlikely and the other likely. No reference and no retain data. `name` is one of

    | name | `g(v)` | `f*(g(v))` |
    | --- | --- | --- |
    | `"tv"`, total variation | `tanh(v) / 2` | `tanh(v) / 2` |
    | `"kl"` | `v` | `exp(v − 1)` |
    | `"reverse_kl"` | `−exp(−v)` | `v − 1` |
    | `"pearson"` | `v` | `v + v² / 4` |
    | `"neyman"` | `1 − exp(−v)` | `2 − 2 exp(−v / 2)` |
    | `"hellinger"` | `1 − exp(−v)` | `exp(v) − 1` |
    | `"js"`, Jensen–Shannon | `log 2 − log(1 + exp(−v))` | `log(1 + exp(v)) − log 2` |
    | `"jeffrey"` | `v` | `v + v² / 4 + v³ / 16` |

    The loss is one of each pair, and a mean over pairs. In the released code three of them (reverse KL, Neyman,
    Hellinger) have `exp(v)` in `g`, which falls, so that to lower the loss makes the second answer *less* likely and,
    but for Neyman, the answer to be forgotten likelier; here every `g` rises. `P` are means over prompt and padding as
    well there.

    Args:
        name: Which divergence.

    Raises:
        ValueError: There is none of that name.

    Examples:
        >>> import math, torch
        >>> from semu_peft.objectives import FDivergence
        >>> model = torch.nn.Identity()
        >>> def batch(p):
        ...     return torch.tensor([[p, 1 - p]]).log(), torch.tensor([0])
        >>> (answer, label), (second, _) = batch(0.3), batch(0.8)
        >>> pair = {"input": answer, "labels": label, "alternate_input": second, "alternate_labels": label}
        >>> round(FDivergence("tv")(model, pair).item(), 5)
        -0.18636
    """

    name: str = "tv"

    def __post_init__(self) -> None:
        if self.name not in _DIVERGENCES:
            raise ValueError(f"`name` must be one of {sorted(_DIVERGENCES)}, got {self.name!r}. Take 'tv'.")
        certain = torch.tensor([1.0, 0.0])
        self.minimum = self._of_probabilities(certain[:1], certain[1:]).item()

    def pair_loss(self, answers: Tokens, alternates: Tokens, prepared: Any) -> Tensor:
        likely, unlikely = (tokens.means(tokens.nll().neg().exp()) for tokens in (alternates, answers))
        return self._of_probabilities(likely, unlikely).mean()

    def _of_probabilities(self, likely: Tensor, unlikely: Tensor) -> Tensor:
        variational, conjugate = _DIVERGENCES[self.name]
        return conjugate(unlikely) - variational(likely)


_Function = Callable[[Tensor], Tensor]
_DIVERGENCES: dict[str, tuple[_Function, _Function]] = {  # `g` and `f* ∘ g`
    "tv": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "reverse_kl": (lambda v: -(-v).exp(), lambda v: v - 1),
    "pearson": (lambda v: v, lambda v: v + v**2 / 4),
    "neyman": (lambda v: 1 - (-v).exp(), lambda v: 2 - 2 * (-v / 2).exp()),
    "hellinger": (lambda v: 1 - (-v).exp(), lambda v: v.exp() - 1),
    "js": (lambda v: math.log(2) - F.softplus(-v), lambda v: F.softplus(v) - math.log(2)),
    "jeffrey": (lambda v: v, lambda v: v + v**2 / 4 + v**3 / 16),
}


def _answered(labels: Any) -> Tensor:
    """Which rows of a batch have an answer."""
    rows = as_labels(labels).cpu()
    return (rows != IGNORED).flatten(1).any(1) if rows.dim() > 1 else torch.ones(1).bool()


def _mean_logits(tokens: Tokens) -> Tensor:
    """The mean raw logit of each sequence's own tokens."""
    return tokens.means(tokens.logits.gather(1, tokens.labels.unsqueeze(1)).squeeze(1))


def _sigmoid_margin(margin: Tensor, beta: float) -> Tensor:
    """`−2/β log σ(β · margin)`, the mean."""
    return 2.0 / beta * F.softplus(-beta * margin).mean()
