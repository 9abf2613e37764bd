"""Objectives for language models that tell the sequences of a batch apart, and those that only tokens have.

A batch is what [`call_model`][semu_peft.objectives.tokens.call_model] reads: labels of −100 and padding do not count,
on whichever side they stand, and sequences packed into one row are told apart by their `position_ids`. All losses are
in float32 whatever the model's dtype. The original model is the model itself without its adapter, not a second copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from semu_peft.arguments import check_count, check_kind, check_model, check_number, check_positive
from semu_peft.model_state import device_of, eval_mode

from .base import Evaluation, Outputs
from .batches import check_batches
from .classification import ClassificationObjective
from .original import reference_model
from .quantiles import at_quantiles, check_ranked_among, quantiles_of
from .tokens import Tokens, read_tokens


@dataclass
class SequenceObjective(ClassificationObjective):
    """What objectives share that see which sequence each token is of.

    Args:
        shift_labels: Whether a token's label stands one position after its prediction; by default as the model says.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.language import SequenceObjective
        >>> class LongestAnswer(SequenceObjective):
        ...     def token_loss(self, tokens, prepared):
        ...         return tokens.sums(tokens.nll()).max()
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[-100, 0, 1], [-100, 2, -100]])
        >>> round(LongestAnswer(shift_labels=True)(torch.nn.Identity(), (logits, labels)).item(), 4)  # 2 log 4
        2.7726
    """

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        tokens = self._read_tokens(model, batch)
        return Evaluation(self.token_loss(tokens, prepared), (Outputs(tokens.logits, tokens.labels),))

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        """The loss of a batch's tokens, and of what `prepare` returned for it."""
        raise NotImplementedError

    def _read_tokens(self, model: nn.Module, batch: Any) -> Tokens:
        return read_tokens(model, batch, shift_labels=self.shift_labels).in_float32()

    @torch.no_grad()
    def _original_tokens(self, model: nn.Module, batch: Any, reference: nn.Module | None) -> Tokens:
        """What the reference says, or else the model without its adapter."""
        with reference_model(model, reference) as original:
            return self._read_tokens(original, batch)


@dataclass
class KLToOriginal(ClassificationObjective):
    """`KL(p₀ ‖ p)`, the mean over tokens of how far the model's predictions are from the original's, for retain data.

    It keeps all that the original says on text that need not be what the model was trained on, and is the damage that
    a budget bounds. OpenUnlearning's `KL` averages over prompt and padding as well.

    Args:
        reference: A frozen original model. By default the model itself without its adapter.
        without: Classes or tokens that both predictions are taken without, such as those of a concept's name, about
            which the model may change its mind. What is left is a distribution again: a sum that merely leaves terms
            out, as in SIU's *dual masked KL* (arXiv 2405.12523), is no divergence and can fall below zero.

    Raises:
        ValueError: `without` names a class that there is not, or leaves none.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import KLToOriginal
        >>> model, uniform = torch.nn.Identity(), lambda x: torch.zeros(1, 2)
        >>> loss = KLToOriginal(reference=uniform)(model, (torch.tensor([[0.0, 1.0]]), torch.tensor([0])))
        >>> round(loss.item(), 4)  # ½ log ¼ − ½ log p₀ p₁
        0.1201
    """

    reference: nn.Module | None = field(default=None, repr=False)
    without: Sequence[int] = field(default=(), kw_only=True)
    minimum = 0.0
    forgets = False

    def __post_init__(self) -> None:
        check_kind("without", self.without, (list, tuple), "a list of numbers of classes", "Write [17, 42].")
        for number in self.without:
            check_count("without", number, least=0)

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        return self._left(self._read_original(model, batch, self.reference)[0]).log_softmax(-1)

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return F.kl_div(self._left(logits).log_softmax(-1), prepared, reduction="batchmean", log_target=True)

    def damage(self, logits: Tensor, labels: Tensor, prepared: Any, loss: Tensor) -> Tensor | None:
        return loss if self.reference is None else None

    def _left(self, logits: Tensor) -> Tensor:
        """The logits of the classes that count."""
        if not self.without:
            return logits
        kept = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        if max(self.without) >= len(kept) or len(set(self.without)) == len(kept):
            raise ValueError(
                f"`without` must name some of {len(kept)} classes, from 0 on, got {list(self.without)[:5]}. Take the "
                "numbers from the model's tokenizer."
            )
        kept[list(self.without)] = False
        return logits[..., kept]


@dataclass
class UNDIAL(ClassificationObjective):
    """`KL(q ‖ p)` with `q = softmax(z₀ − β · 1_y)`: the original's own prediction with the true token's logit lowered.

    Self-distillation to adjusted logits (Dong et al. 2024, arXiv 2402.10052); at `β = ∞` it is
    [`DecoupledDistillation`][semu_peft.objectives.classification.DecoupledDistillation]. Its cross entropy differs from
    this divergence by the target's entropy, a constant. The released code also averages over prompt and padding, where
    the label −100 lowers some token's logit.

    Args:
        beta: By how much the true token's logit is lowered, β.
        reference: A frozen original model. By default the model itself without its adapter.

    Raises:
        ValueError: `beta` is not above zero.

    Examples:
        >>> import math, torch
        >>> from semu_peft.objectives import UNDIAL
        >>> model, batch = torch.nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))  # the inputs are the logits
        >>> round(UNDIAL(beta=math.log(3), reference=model)(model, batch).item(), 4)  # KL((¼, ¾) ‖ (½, ½))
        0.1308
    """

    beta: float = 10.0
    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        original, labels = self._read_original(model, batch, self.reference)
        return (original - self.beta * F.one_hot(labels, original.shape[1])).log_softmax(-1)

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return F.kl_div(logits.log_softmax(-1), prepared, reduction="batchmean", log_target=True)


@dataclass
class CEU(SequenceObjective):
    """`−log(1 − p(y | x))`: the model's own present prediction with the true token struck out is what it should say.

    CE-U (2025, arXiv 2503.01224) is the cross entropy to `softmax(z)` with the true token's logit at −∞ and held fixed.
    Its gradient is that of this, a function of the model alone, which is its divergence from that target: so a step can
    be judged by whether the loss fell.

    Args:
        ignore_first: How many tokens at the beginning of each answer do not count. The first tells how an answer
            begins and nothing of what is to be forgotten; struck out, it would change every answer.

    Raises:
        ValueError: No answer of the batch is longer than `ignore_first`.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CEU
        >>> model, batch = torch.nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))  # the inputs are the logits
        >>> round(CEU(ignore_first=0)(model, batch).item(), 4)  # −log(1 − ½)
        0.6931
    """

    ignore_first: int = 1
    minimum = 0.0

    def __post_init__(self) -> None:
        check_count("ignore_first", self.ignore_first, least=0)

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        counts = tokens.places() >= self.ignore_first
        if not counts.any():
            raise ValueError(
                f"`ignore_first` must leave a token of some answer in every batch, got {self.ignore_first} with "
                f"answers of up to {int(tokens.places().max()) + 1} tokens. Take `ignore_first=0`."
            )
        logits = tokens.logits[counts]
        struck_out = logits.scatter(1, tokens.labels[counts].unsqueeze(1), float("-inf"))
        return (logits.logsumexp(-1) - struck_out.logsumexp(-1)).mean()


@dataclass
class WeightedAscent(ClassificationObjective):
    """`∫ p^(β−1) (1 − p)^β₂ dp` at `p = p(y | x)`: ascent whose weight on a token follows how well it is known.

    Its gradient is that of `w · log p` with the weight `w = p^β (1 − p)^β₂` held fixed, as the papers write it: tokens
    that are forgotten already are left alone (β), and those that are still certain wait (β₂). What is returned is the
    function that has this gradient, so that a step can be judged by whether the loss fell: `w · log p` itself rises
    again where p is small. For `β₂ = 0` it is `p^β / β`; for `β = 0` it is unbounded below.

    Args:
        beta: How fast the weight falls with the token's probability, β. With zero in both it is plain ascent.
        beta2: How fast it falls with the probability of everything else, β₂.

    Raises:
        ValueError: One of them is negative.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import WGA, SatImp
        >>> model, batch = torch.nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))  # the inputs are the logits
        >>> round(WGA(beta=2.0)(model, batch).item(), 4)  # ½² / 2
        0.125
        >>> round(SatImp()(model, batch).item(), 6)  # ½⁵ / 5 − ½⁶ / 6
        0.003646
    """

    beta: float = 1.0
    beta2: float = 0.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0)
        check_number("beta2", self.beta2, low=0)

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        log_p = -F.cross_entropy(logits, labels, reduction="none")
        with torch.no_grad():
            weight = (self.beta * log_p).exp() * (1 - log_p.exp()).clamp(min=0) ** self.beta2
            value = self._potential(log_p)
        return (weight * (log_p - log_p.detach()) + value).mean()

    def _potential(self, log_p: Tensor) -> Tensor:
        """The integral from 0 to p, of `p^(β−1) (1 − p)^β₂`; for `β = 0` without the constant that is infinite."""
        nodes, weights = (torch.from_numpy(each).to(log_p) for each in np.polynomial.legendre.leggauss(32))
        nodes, weights = (1 + nodes) / 2, weights / 2  # on (0, 1)
        p = log_p.exp().unsqueeze(-1)
        if not self.beta:
            return log_p + (((1 - p * nodes) ** self.beta2 - 1) / nodes) @ weights
        power = max(1.0, 2.0 / self.beta)  # the integral over u with p u^power for p leaves no singular end
        inner = power * nodes ** (power * self.beta - 1) * (1 - p * nodes**power) ** self.beta2
        return (self.beta * log_p).exp() * (inner @ weights)


@dataclass
class WGA(WeightedAscent):
    """Weighted gradient ascent, `w = p^β` (Wang et al. 2025, arXiv 2502.19301): tokens that are forgotten rest.

    Args:
        beta: How fast the weight falls with the token's probability, β.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import WGA
        >>> round(WGA()(torch.nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))).item(), 4)  # p itself
        0.5
    """

    beta2: float = field(default=0.0, init=False, repr=False)


@dataclass
class SatImp(WeightedAscent):
    """Weights by saturation and importance, `w = p^β (1 − p)^β₂` (Yang et al. 2025, arXiv 2505.11953).

    Args:
        beta: How fast the weight falls with the token's probability, the paper's β₁.
        beta2: How fast it falls with the probability of everything else.

    Examples:
        >>> from semu_peft.objectives import SatImp
        >>> SatImp()
        SatImp(beta=5.0, beta2=1.0)
    """

    beta: float = 5.0
    beta2: float = 1.0


@dataclass
class FlatLogits(ClassificationObjective):
    """`(max_v z_v − mean_v z_v)²`: no token stands out (PDU's forget loss, arXiv 2506.05314).

    Together with [`PrimalDual`][semu_peft.objectives.wrappers.PrimalDual] on retain data it is PDU. The released code
    takes the labels' mask without shifting it with the predictions.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import FlatLogits
        >>> FlatLogits()(torch.nn.Identity(), (torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]))).item()  # (3 − 1)²
        4.0
    """

    minimum = 0.0

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return (logits.amax(-1) - logits.mean(-1)).square().mean()


@dataclass
class UnseenAnswer(SequenceObjective):
    """`relu(tᵢ − nᵢ)²`: each answer becomes as unlikely as answers that the model has not learnt, and no further.

    `n = −1/|y| log p(y | x)`. A model that was retrained without the forget data finds their answers as likely as other
    plausible answers that nobody taught it; how likely that is, the original model says of such answers. So the answers
    are ranked by the original's likelihood, and the target `tᵢ` of the one at quantile `t` is the negative
    log-likelihood at quantile `t` of the unseen answers. It is to language what
    [`UnseenConfidence`][semu_peft.objectives.classification.UnseenConfidence] is to classes.

    Args:
        nll: Negative log-likelihoods per token of answers that the model was not trained on, `(M,)`, by the original
            model; see [`sequence_nll`][semu_peft.objectives.language.sequence_nll].
        reference: A frozen original model. By default the model itself without its adapter.
        forget_nll: The same of all forget answers, `(N,)`: each is then ranked among all of them, so that its target is
            the same in a batch of any size and in any number of processes. By default answers are ranked within their
            batch, which should then hold tens of them, or quantiles are coarse and targets change.

    Raises:
        TypeError: `nll` or `forget_nll` is no tensor.
        ValueError: `nll` is empty or holds something else than finite numbers from zero on, or `forget_nll` is empty or
            has NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import UnseenAnswer
        >>> model, batch = torch.nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))  # the inputs are the logits
        >>> objective = UnseenAnswer(torch.tensor([1.0, 2.0, 3.0]), reference=model)
        >>> round(objective(model, batch).item(), 4)  # (2 − log 2)²
        1.7079
    """

    nll: Tensor = field(repr=False)
    reference: nn.Module | None = field(default=None, repr=False)
    forget_nll: Tensor | None = field(default=None, kw_only=True, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        mend = "Take `sequence_nll(model, unseen)`, or `torch.tensor([...])` of a list."
        check_kind("nll", self.nll, Tensor, "a tensor of negative log-likelihoods", mend)
        if self.reference is not None:
            check_model(self.reference, "reference")
        nll = self.nll.detach().flatten().float().cpu()
        if not nll.numel() or not (nll.isfinite() & (nll >= 0)).all():
            raise ValueError(
                f"`nll` must be finite numbers from 0 on, at least one, got {nll.numel()} values"
                + (f" from {nll.min()} to {nll.max()}. " if nll.numel() else ". ")
                + mend
            )
        self.nll = nll
        mend = "Take `sequence_nll(model, forget)`, or None to rank within each batch."
        self.forget_nll = check_ranked_among("forget_nll", self.forget_nll, mend)

    @property
    def is_reached(self) -> bool:
        """Whether every answer of `forget_nll` is at its target or past it, so that there is no gradient at all.

        Examples:
            >>> import torch
            >>> from semu_peft.objectives import UnseenAnswer
            >>> unseen = torch.tensor([3.0, 4.0])
            >>> [UnseenAnswer(unseen, forget_nll=nll).is_reached for nll in (unseen + 1, unseen - 1)]
            [True, False]
        """
        known = self.forget_nll
        return known is not None and bool((known >= at_quantiles(self.nll, quantiles_of(known, known))).all())

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        tokens = self._original_tokens(model, batch, self.reference)
        known = tokens.means(tokens.nll())
        return at_quantiles(self.nll, quantiles_of(known, self.forget_nll))

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        return F.relu(prepared - tokens.means(tokens.nll())).square().mean()


def sequence_nll(
    model: nn.Module, batches: Iterable[Any], *, shift_labels: bool | None = None, progress: bool = True
) -> Tensor:
    """How unlikely a model finds each answer: the mean negative log-likelihood of its tokens.

    In eval mode and without gradients; the model is afterwards as it was. On the model as it is, with its adapter.

    Args:
        model: A language model.
        batches: Batches of answers, see [`call_model`][semu_peft.objectives.tokens.call_model].
        shift_labels: Whether a token's label stands one position after its prediction; by default as the model says.
        progress: Show a progress bar.

    Returns:
        One number an answer, `(M,)`, float32, on the CPU.

    Raises:
        ValueError: There is no batch.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.language import sequence_nll
        >>> answers = [(torch.zeros(2, 3, 4), torch.tensor([[-100, 1, 2], [-100, 3, -100]]))]  # logits and labels
        >>> sequence_nll(torch.nn.Identity(), answers, shift_labels=True, progress=False)  # log 4
        tensor([1.3863, 1.3863])
    """
    check_model(model)
    check_batches(batches)
    device, found = device_of(model), []
    with torch.no_grad(), eval_mode(model):
        for batch in tqdm(batches, desc="Likelihoods", disable=not progress, leave=False):
            tokens = read_tokens(model, send_to_device(batch, device), shift_labels=shift_labels)
            found.append(tokens.means(tokens.nll()).float().cpu())
    if not found:
        raise ValueError("`batches` must give at least one batch, got none. Check that it has not been used up.")
    return torch.cat(found)
