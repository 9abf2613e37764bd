"""Objectives for classifiers, `(model, batch) -> loss` over logits `(N, classes)` and labels `(N,)`.

A batch is `(inputs, labels)` or a transformers-style mapping with `labels`; a model returns logits or a `ModelOutput`.
All losses are means over the batch, computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_count, check_kind, check_model, check_number

from .base import Evaluation, Outputs, PreparedObjective, RandomObjective, Reader
from .distributions import divergence, strike_out
from .original import reference_model
from .quantiles import at_quantiles, check_ranked_among, quantiles_of
from .tokens import call_model

_A_CLASS = 8  # examples of a label in a batch from which on it looks like a whole class, and not like single examples
_MUCH = 0.25  # of what they are taught: another class of the forget data


@dataclass(frozen=True)
class ReadLogits:
    """How classification objectives run a model, so that those of a sum run it once.

    Args:
        shift_labels: As an objective's.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.classification import ReadLogits
        >>> logits, labels = ReadLogits()(torch.nn.Identity(), (torch.zeros(1, 2).bfloat16(), torch.tensor([1])))
        >>> logits.dtype, ReadLogits() == ReadLogits(None)
        (torch.float32, True)
    """

    shift_labels: bool | None = None

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The logits `(T, classes)` in float32 or better, and the labels `(T,)`."""
        logits, labels = call_model(model, batch, shift_labels=self.shift_labels)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


@dataclass
class ClassificationObjective(PreparedObjective):
    """What the objectives below share: how a batch is read, each real token of a language model being an example.

    Args:
        shift_labels: Whether a token's label stands one position after its prediction; by default as the model says,
            see [`call_model`][semu_peft.objectives.tokens.call_model].

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy
        >>> logits = torch.zeros(1, 3, 4)  # of three tokens, of which the first predicts the second, and so on
        >>> batch = (logits, torch.tensor([[0, -100, 3]]))
        >>> round(CrossEntropy(shift_labels=True)(torch.nn.Identity(), batch).item(), 4)
        1.3863
    """

    distribution = "categorical"
    shift_labels: bool | None = field(default=None, kw_only=True, repr=False)

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        return self.evaluate_reading(self._read(model, batch), prepared)

    def reader(self) -> Reader | None:
        kind, own = type(self), ClassificationObjective
        reads_itself = any(getattr(kind, name) is not getattr(own, name) for name in ("__call__", "evaluate", "_read"))
        return None if reads_itself else ReadLogits(self.shift_labels)

    def evaluate_reading(self, reading: tuple[Tensor, Tensor], prepared: Any) -> Evaluation:
        logits, labels = reading
        loss = self.loss(logits, labels, prepared)
        with torch.no_grad():
            damage = self.damage(logits.detach(), labels, prepared, loss.detach())
        return Evaluation(loss, (Outputs(logits, labels),), damage)

    def damage(self, logits: Tensor, labels: Tensor, prepared: Any, loss: Tensor) -> Tensor | None:
        """How far the other outputs are from the original's, where `prepared` tells of these."""
        return None

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        """The loss of logits `(T, classes)` with labels `(T,)`, and of what `prepare` returned for their batch."""
        raise NotImplementedError

    def _read(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The logits `(T, classes)` in float32 or better, and the labels `(T,)`."""
        return ReadLogits(self.shift_labels)(model, batch)

    @torch.no_grad()
    def _read_original(self, model: nn.Module, batch: Any, reference: nn.Module | None) -> tuple[Tensor, Tensor]:
        """The logits and labels of the reference, or else of the model without its adapter."""
        with reference_model(model, reference) as original:
            return self._read(original, batch)


@dataclass
class ForgettingClasses(ClassificationObjective):
    """What objectives share that lead an example to other classes: which of them are to be forgotten as well.

    Where a request names several classes, each example's own label is not all that has to be struck out: its next best
    class may be another one of them, which would then be taught to the model.

    Args:
        classes: All classes that are to be forgotten. By default an example's own label alone, which is right for one
            class and for single examples.

    Raises:
        TypeError: `classes` is no collection of integers.
        ValueError: They leave no class, name one that the model does not have, or one twice.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import InvertedHinge
        >>> model, batch = torch.nn.Identity(), (torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([0]))
        >>> round(InvertedHinge()(model, batch).item(), 1), round(InvertedHinge(classes=[0, 1])(model, batch).item(), 1)
        (0.0, 1.0)
    """

    classes: Collection[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.classes is None:
            return
        given = self.classes.tolist() if isinstance(self.classes, Tensor) else self.classes
        if not isinstance(given, Collection) or any(isinstance(c, bool) or not isinstance(c, int) for c in given):
            raise TypeError(f"`classes` must be class indices, such as [3, 7], got {self.classes!r}. Give a list.")
        if not given or min(given) < 0 or len(set(given)) < len(given):
            raise ValueError(f"`classes` must be different indices from 0 on, at least one, got {list(given)}.")
        self.classes = sorted(given)

    def forgotten(self, labels: Tensor, num_classes: int) -> Tensor:
        """Which classes an example must not be led to, `(T, classes)`: its own and all that are forgotten with it."""
        own = F.one_hot(labels, num_classes).bool()
        if self.classes is None:
            return own
        if max(self.classes) >= num_classes or len(self.classes) == num_classes:
            raise ValueError(
                f"`classes` must leave at least one of the model's {num_classes} classes, 0 to {num_classes - 1}, got "
                f"{list(self.classes)}. Name only those that are to be forgotten."
            )
        own[:, list(self.classes)] = True
        if own.all(1).any():
            raise ValueError(
                f"`classes` {list(self.classes)} and an example's own label leave no class to lead it to. Give only "
                "examples of the classes to forget."
            )
        return own


@dataclass
class CrossEntropy(ClassificationObjective):
    """`−log p(y | x)`: the ordinary training loss, for retain data.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy
        >>> model, batch = torch.nn.Identity(), (torch.zeros(2, 4), torch.tensor([0, 1]))  # the inputs are the logits
        >>> round(CrossEntropy()(model, batch).item(), 4)  # log 4
        1.3863
    """

    minimum = 0.0
    forgets = False

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return F.cross_entropy(logits, labels)


@dataclass
class GradientAscent(ClassificationObjective):
    """`log p(y | x)`: the training loss with its sign turned (Thudi et al. 2022, arXiv 2109.13398).

    Unbounded below: stop early, or the model is destroyed.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import GradientAscent
        >>> model, batch = torch.nn.Identity(), (torch.zeros(2, 4), torch.tensor([0, 1]))  # the inputs are the logits
        >>> round(GradientAscent()(model, batch).item(), 4)  # −log 4
        -1.3863
    """

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return -F.cross_entropy(logits, labels)


@dataclass
class RandomLabel(ForgettingClasses, RandomObjective):
    """Cross entropy to a random label other than the true one, drawn afresh at each call (SEMU, arXiv 2502.07587, §4).

    Args:
        num_labels: The number of classes; by default that of the logits.
        classes: All classes that are to be forgotten, where there are several: none of them is drawn.
        seed: Seed of the draws.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import RandomLabel
        >>> logits = torch.tensor([[9.0, 0.0, 0.0]])  # sure of the true class 0
        >>> loss = RandomLabel()(torch.nn.Identity(), (logits, torch.tensor([0])))
        >>> round(loss.item(), 1)  # −log p of another class, whichever was drawn
        9.0
    """

    num_labels: int | None = None

    def __post_init__(self) -> None:
        check_count("num_labels", self.num_labels, least=2, optional=True)
        ForgettingClasses.__post_init__(self)
        RandomObjective.__post_init__(self)

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        self.load_state_dict(prepared)
        count = self.num_labels or logits.shape[-1]
        if not 2 <= count <= logits.shape[-1]:
            raise ValueError(f"`num_labels` must lie between 2 and the {logits.shape[-1]} logits, got {count}.")
        if self.classes is None:
            shift = torch.randint(1, count, labels.shape, generator=self.generator).to(labels.device)
            return F.cross_entropy(logits, (labels + shift) % count)
        allowed = (~self.forgotten(labels, logits.shape[-1])[:, :count]).float().cpu()
        drawn = torch.multinomial(allowed, 1, generator=self.generator).squeeze(1)
        return F.cross_entropy(logits, drawn.to(labels.device))


@dataclass
class DecoupledDistillation(ForgettingClasses):
    """Distil the original model's own prediction with the true class struck out and the rest renormalised.

    `KL(q ‖ p)` with `q = softmax(z_ref)` over all classes but `y` (DELETE, Zhou et al. 2025, arXiv 2503.23751), or but
    all `classes` that are to be forgotten. It forgets the class and keeps what the model knows of the others, so it
    needs no retain data.

    Args:
        classes: All classes that are to be forgotten, where there are several: all of them are struck out.
        reference: A frozen original model. By default the model itself without its adapter.
        margin: Raise the struck logits by this before the softmax, `p = softmax(z + margin · 1[struck])`, so that the
            class stays out also where a later change lifts it that far. The outputs, and the answer probability that a
            run tells of, are then those of the raised logits.

    Raises:
        ValueError: `margin` is negative or not finite.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import DecoupledDistillation
        >>> original = torch.nn.Linear(3, 3).requires_grad_(False)
        >>> batch = (torch.eye(3), torch.arange(3))
        >>> bool(DecoupledDistillation(reference=original)(original, batch) > 0)  # it still knows the true classes
        True
    """

    reference: nn.Module | None = field(default=None, repr=False)
    margin: float = field(default=0.0, kw_only=True)
    minimum = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("margin", self.margin, low=0)
        self._has_warned = False

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        original, labels = self._read_original(model, batch, self.reference)
        target = original.masked_fill(self.forgotten(labels, original.shape[1]), float("-inf")).softmax(-1)
        if not self._has_warned:
            self._look_for_classes(labels, target)
        return target

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return F.kl_div(logits.log_softmax(-1), prepared, reduction="batchmean")

    def damage(self, logits: Tensor, labels: Tensor, prepared: Any, loss: Tensor) -> Tensor | None:
        if self.reference is not None:
            return None
        # The loss is this divergence among the classes that stay, and the negative logarithm of their probability.
        staying = logits.masked_fill(self.forgotten(labels, logits.shape[1]), float("-inf"))
        return (loss + (staying.logsumexp(-1) - logits.logsumexp(-1)).mean()).clamp_min(0)

    def _look_for_classes(self, labels: Tensor, target: Tensor) -> None:
        """Warn where whole classes seem to be forgotten together, and their examples are taught one another's class.

        Or where the classes that are named are none of the examples', so that it may be a slip.
        """
        found, counts = labels.unique(return_counts=True)
        if self.classes is not None:
            if set(self.classes).isdisjoint(found.tolist()):
                warnings.warn(
                    f"A batch of forget examples is of classes {found.tolist()[:10]}, and none of it of `classes` "
                    f"{list(self.classes)[:10]}. Name all classes that are to be forgotten, or leave `classes` out.",
                    stacklevel=2,
                )
                self._has_warned = True
            return
        if not 1 < len(found) < target.shape[1] or counts.min() < _A_CLASS:
            return
        share = target[:, found].sum(1).mean().item()
        if share >= _MUCH:
            warnings.warn(
                f"The forget examples of classes {found.tolist()} are led to one another's class with {share:.0%} of "
                "the probability. If these classes are to be forgotten as a whole, name all that are: `classes=[...]`.",
                stacklevel=2,
            )
            self._has_warned = True

    def _read(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits, labels = super()._read(model, batch)
        if self.margin:
            logits = logits + self.margin * self.forgotten(labels, logits.shape[1])
        return logits, labels


@dataclass
class UnseenConfidence(ClassificationObjective):
    """Treat forget examples as the model treats data that it has never seen: the target for random forgetting.

    A model that was retrained without some training examples is right about most of them, with the confidence of unseen
    data. So the examples are ranked by the original model's confidence in their labels, and the target of the one at
    quantile `t` puts the confidence at quantile `t` of unseen data on the true class; the rest goes to the other
    classes as the original model divides it. No target is above the original's own confidence: forgetting never makes a
    model surer of an example. The loss is `KL(q ‖ p)`.

    Args:
        confidences: True-class confidences of the original model on labelled data that it was not trained on, `(M,)`;
            see [`Predictions.confidence`][semu_peft.evaluation.Predictions].
        reference: A frozen original model. By default the model itself without its adapter.
        forget_log_odds: What the original model says of all forget examples, `(N,)`, see
            [`Predictions.log_odds`][semu_peft.evaluation.Predictions]: each is then ranked among all of them, so that
            its target is the same in a batch of any size and in any number of processes. By default examples are ranked
            within their batch, which should then hold hundreds of them, or quantiles are coarse and targets change.

    Raises:
        TypeError: `confidences` or `forget_log_odds` is no tensor.
        ValueError: `confidences` is empty or not within [0, 1], or `forget_log_odds` is empty or has NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import UnseenConfidence
        >>> original = torch.nn.Identity()  # the inputs are the logits
        >>> memorised = (9 * torch.eye(3), torch.arange(3))
        >>> objective = UnseenConfidence(torch.tensor([0.4, 0.5, 0.6]), reference=original)
        >>> bool(objective(original, memorised) > objective(original, (torch.eye(3), torch.arange(3))))
        True
    """

    confidences: Tensor = field(repr=False)
    reference: nn.Module | None = field(default=None, repr=False)
    forget_log_odds: Tensor | None = field(default=None, kw_only=True, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        mend = "Take `Predictions.confidence`, or `torch.tensor([...])` of a list."
        check_kind("confidences", self.confidences, Tensor, "a tensor of probabilities", mend)
        if self.reference is not None:
            check_model(self.reference, "reference")
        confidences = self.confidences.detach().flatten().float().cpu()
        if not confidences.numel() or not ((confidences >= 0) & (confidences <= 1)).all():
            raise ValueError(
                f"`confidences` must be probabilities in [0, 1], at least one, got {confidences.numel()} values"
                + (f" from {confidences.min()} to {confidences.max()}." if confidences.numel() else ".")
            )
        self.confidences = confidences
        mend = "Take `predict(model, forget).log_odds`, or None to rank within each batch."
        self.forget_log_odds = check_ranked_among("forget_log_odds", self.forget_log_odds, mend)

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        original, labels = self._read_original(model, batch, self.reference)
        index = labels.unsqueeze(1)
        struck_out = original.scatter(1, index, float("-inf"))
        # The margin orders examples whose confidence has saturated at 1.
        margin = original.gather(1, index).squeeze(1) - struck_out.logsumexp(-1)
        unseen = at_quantiles(self.confidences, quantiles_of(margin, self.forget_log_odds)).unsqueeze(1)
        confidence = torch.minimum(unseen, original.softmax(-1).gather(1, index))
        return ((1 - confidence) * struck_out.softmax(-1)).scatter(1, index, confidence)

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return F.kl_div(logits.log_softmax(-1), prepared, reduction="batchmean")

    def damage(self, logits: Tensor, labels: Tensor, prepared: Any, loss: Tensor) -> Tensor | None:
        if self.reference is not None:
            return None
        others = strike_out(prepared, labels).clamp_min(torch.finfo(prepared.dtype).tiny).log()
        return divergence("categorical", others, strike_out(logits, labels))


@dataclass
class InvertedHinge(ForgettingClasses):
    """`1 + p(y | x) − max_{v ≠ y} p(v | x)`: bounded; zero where another class is certain (LoKU, arXiv 2408.06621).

    Args:
        classes: All classes that are to be forgotten, where there are several: `v` is none of them.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import InvertedHinge
        >>> model, labels = torch.nn.Identity(), torch.tensor([0])  # the inputs are the logits
        >>> known, unknown = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
        >>> InvertedHinge()(model, (known, labels)).item(), InvertedHinge()(model, (unknown, labels)).item()
        (2.0, 0.0)
    """

    minimum = 0.0

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        probabilities = logits.softmax(-1)
        true = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
        others = probabilities.masked_fill(self.forgotten(labels, logits.shape[1]), -1.0)
        return (1.0 + true - others.amax(-1)).mean()


@dataclass
class UniformDistribution(ClassificationObjective):
    """`KL(uniform ‖ p)`: make the model know nothing of the forget data (Golatkar et al. 2020, arXiv 1911.04933).

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import UniformDistribution
        >>> model, batch = torch.nn.Identity(), (torch.zeros(2, 4), torch.tensor([0, 1]))  # the inputs are the logits
        >>> abs(round(UniformDistribution()(model, batch).item(), 4))
        0.0
    """

    minimum = 0.0

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        uniform = torch.full_like(logits, 1.0 / logits.shape[-1])
        return F.kl_div(logits.log_softmax(-1), uniform, reduction="batchmean")
