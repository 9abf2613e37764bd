"""Was a text trained on? Scores of what a language model says of it, and how well they tell two sets of texts apart."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_share
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.attackers import weights_of
from semu_peft.objectives.tokens import call_model

from .auc import auc_with_interval
from .prompts import are_plain, encoder_for, read_questions, read_texts
from .token_scores import TokenScores, score_answers, score_batches, score_texts, text_batches


@dataclass(frozen=True)
class Separation:
    """How well a score tells the forget texts from held-out ones.

    Attributes:
        auc: Chance that a held-out text has the larger score: 1 where the forget texts look like training data, 0.5
            where nothing can be told.
        interval: Between which values 95% of the AUCs of resampled texts lie.

    Examples:
        >>> from semu_peft.evaluation import Separation
        >>> Separation(0.734, (0.68, 0.79))
        Separation(AUC 0.734, 95% interval 0.680 to 0.790)
    """

    auc: float
    interval: tuple[float, float]

    def __repr__(self) -> str:
        return f"Separation(AUC {self.auc:.3f}, 95% interval {self.interval[0]:.3f} to {self.interval[1]:.3f})"


def separation(forget: Tensor, holdout: Tensor, *, resamples: int = 1000, seed: int = 0) -> Separation:
    """AUC of a score by which training data are low, with a bootstrap interval.

    `P(holdout > forget) + ½ P(holdout = forget)`, as OpenUnlearning (arXiv 2506.12618) has it: forget texts are the
    class 0. Both sets are drawn again with replacement for the interval.

    Args:
        forget: The score of each forget text, `(N,)`.
        holdout: That of each text that no model was trained on, `(M,)`.
        resamples: How many draws the interval is of.
        seed: Of the draws.

    Raises:
        ValueError: A set is empty or has a NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import separation
        >>> separation(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4])).auc
        0.75
    """
    check_count("resamples", resamples)
    check_count("seed", seed, least=0)
    for name, values in (("forget", forget), ("holdout", holdout)):
        if not len(values) or values.isnan().any():
            raise ValueError(
                f"`{name}` must be scores without NaN, got {values.tolist()[:5]}. Score at least one text."
            )
    return Separation(*auc_with_interval(holdout, forget, redraws=resamples, seed=seed))


def zlib_score(scores: TokenScores, texts: Sequence[str]) -> Tensor:
    """Mean negative log likelihood over the bytes that zlib packs a text into (Carlini et al. 2021, arXiv 2012.07805).

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import TokenScores
        >>> from semu_peft.evaluation.language_membership import zlib_score
        >>> part = [torch.tensor([-3.0])]
        >>> zlib_score(TokenScores(part, part, part), ["abc"]).item() == 3 / 11
        True
    """
    packed = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    return scores.nll / torch.tensor(packed, dtype=torch.float64)


def min_k(scores: TokenScores, share: float = 0.4, *, standardized: bool = False) -> Tensor:
    """Min-K%: minus the mean of the lowest share of a text's log probabilities (Shi et al. 2024, arXiv 2310.16789).

    The end of the sequence does not count; a text of nothing else has NaN.

    Args:
        scores: What the model says of the texts.
        share: Of the tokens; at least one is taken.
        standardized: Min-K%++ (Zhang et al. 2025, arXiv 2404.02936): of `(log p(y_t) − μ_t) / σ_t`.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import TokenScores
        >>> from semu_peft.evaluation.language_membership import min_k
        >>> part = [torch.tensor([-1.0, -5.0, -3.0, -0.5, -0.1])]
        >>> min_k(TokenScores(part, part, part)).item()
        4.0
    """
    check_share("share", share)
    inner = scores.without_eos()
    parts = inner.standardized if standardized else inner.log_probs
    return torch.stack([-part.double().sort().values[: max(1, int(share * len(part)))].mean() for part in parts])


def gradient_norm(
    model: nn.Module, tokenizer: Any, pairs: Any, *, template: str | None = None, progress: bool = True
) -> Tensor:
    """Mean over the model's weights of the norm of the gradient of each answer's loss, `(N,)`.

    The gradients are of all floating-point weights, frozen ones too, but not of an adapter's own, so that a model with
    an adapter and the same model merged compare; none is kept, and flags stay as they were.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        pairs: Questions with their answers.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        progress: Show a progress bar.

    Examples:
        >>> from semu_peft.evaluation.language_membership import gradient_norm
        >>> gradient_norm(decoder, tokenizer, [("What colour?", "blue")], progress=False).shape
        torch.Size([1])
    """
    encoder = encoder_for(model, tokenizer, template)
    rows = [encoder.answer(example.prompt or "", example.answer) for example in read_questions(pairs)]
    weights = list(weights_of(model).values())
    flags = [parameter.requires_grad for parameter in weights]
    found = torch.zeros(len(rows), dtype=torch.float64)

    def read(places: list[int], batch: dict[str, Tensor]) -> None:
        loss = nn.functional.cross_entropy(*_in_float32(call_model(model, batch)))
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        norms = [gradient.double().norm() for gradient in gradients if gradient is not None]
        found[places[0]] = float(torch.stack(norms).mean())

    try:
        for parameter in weights:
            parameter.requires_grad_(True)
        with torch.enable_grad(), eval_mode(model):
            text_batches(tokenizer, rows, 1, read, progress=progress, name="gradient norms", device=device_of(model))
    finally:
        for parameter, flag in zip(weights, flags, strict=True):
            parameter.requires_grad_(flag)
    return found


def _in_float32(read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return read[0].float(), read[1]


def text_membership(
    model: nn.Module,
    tokenizer: Any,
    forget: Any,
    holdout: Any,
    *,
    reference: nn.Module | None = None,
    gradients: bool = False,
    template: str | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Separation]:
    """Membership attacks on answers, or plain texts: loss, zlib, Min-K%, Min-K%++, a reference, gradient norms.

    Each AUC means something beside that of a model which never saw the forget set: held-out answers are never quite
    like the forgotten ones.

    Args:
        model: The unlearned model.
        tokenizer: Its tokenizer.
        forget: Questions with the answers that were to be forgotten, or plain texts.
        holdout: Questions with answers alike that no model was trained on, or texts.
        reference: Another model of the same tokenizer, for the difference of the losses.
        gradients: Also by gradient norms, one backward pass an answer; of questions alone.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        batch_size: Answers at a time.
        resamples: Draws for the interval.
        seed: Of these draws.
        progress: Show progress bars.

    Returns:
        A [`Separation`][semu_peft.evaluation.language_membership.Separation] by the attack's name, of NaN where the
        model has diverged or no text has the score.

    Examples:
        >>> from semu_peft.evaluation import text_membership
        >>> found = text_membership(decoder, tokenizer, [("a", "b c")], [("a", "d e")], progress=False)
        >>> list(found)
        ['loss', 'zlib', 'min_k', 'min_k_plus_plus']
    """
    check_count("resamples", resamples)
    options: dict[str, Any] = {"template": template, "progress": progress}
    sets = {"forget": read_texts(forget, "forget"), "holdout": read_texts(holdout, "holdout")}
    if gradients or not all(map(are_plain, sets.values())):
        sets = {name: read_questions(examples, name) for name, examples in sets.items()}
    found: list[dict[str, Tensor]] = []

    def read(by: nn.Module, name: str) -> TokenScores:
        shown: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "name": name}
        if are_plain(sets[name]):
            return score_texts(by, tokenizer, [example.answer for example in sets[name]], **shown)
        return score_answers(by, tokenizer, sets[name], template=template, **shown)

    for name, examples in sets.items():
        scores = read(model, name)
        values = _read_by_all(scores, [example.answer for example in examples])
        if reference is not None:
            values["reference"] = scores.nll - read(reference, name).nll
        if gradients:
            values["gradient_norm"] = gradient_norm(model, tokenizer, examples, **options)
        found.append(values)
    found = [_with_scores(values) for values in found]
    lacking = {attack for attack in found[0] if any(not len(v[attack]) or v[attack].isnan().any() for v in found)}
    finite = [{attack: scores for attack, scores in values.items() if attack not in lacking} for values in found]
    told = _told_apart(finite[0], finite[1], resamples=resamples, seed=seed)
    return {attack: told.get(attack, Separation(math.nan, (math.nan, math.nan))) for attack in found[0]}


def _read_by_all(scores: TokenScores, texts: Sequence[str] | None) -> dict[str, Tensor]:
    """The scores that need no other model; zlib's where the texts are known."""
    by_zlib = {} if texts is None else {"zlib": zlib_score(scores, texts)}
    ranked = {"min_k": min_k(scores), "min_k_plus_plus": min_k(scores, standardized=True)}
    return {"loss": scores.nll, **by_zlib, **ranked}


def _with_scores(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each score of the texts that have it: of a whole model, one of nothing but its end has no lowest tokens."""
    whole = values["loss"].isfinite()
    return {attack: scores[~(scores.isnan() & whole)] for attack, scores in values.items()}


def _told_apart(
    forget: Mapping[str, Tensor], holdout: Mapping[str, Tensor], *, resamples: int, seed: int
) -> dict[str, Separation]:
    return {
        attack: separation(scores, holdout[attack], resamples=resamples, seed=seed) for attack, scores in forget.items()
    }


@dataclass(frozen=True)
class TextMembership:
    """How well attacks tell forget texts from those that no model was trained on, of a model and of a reference.

    Attributes:
        found: By the attack's name: `loss`, `zlib`, `min_k`, `min_k_plus_plus`, and `reference`, the loss less that of
            the reference.
        reference: The same of the reference, without the last.

    Examples:
        >>> from semu_peft.evaluation import Separation
        >>> from semu_peft.evaluation.language_membership import TextMembership
        >>> TextMembership({"loss": Separation(0.734, (0.68, 0.79))})
        TextMembership(AUC by loss 73.4% (68.0 to 79.0))
    """

    found: Mapping[str, Separation]
    reference: Mapping[str, Separation] = field(default_factory=dict)

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference, with 95% intervals."""
        return "membership of texts", _areas(self.found), _areas(self.reference)

    def __repr__(self) -> str:
        beside = f"; reference {_areas(self.reference)}" if self.reference else ""
        return f"TextMembership({_areas(self.found)}{beside})"


def _areas(found: Mapping[str, Separation]) -> str:
    words = {"min_k": "Min-K%", "min_k_plus_plus": "Min-K%++", "reference": "loss less the reference's"}
    told = [
        f"{words.get(attack, attack)} {100 * each.auc:.1f}% ({100 * each.interval[0]:.1f} to "
        f"{100 * each.interval[1]:.1f})"
        for attack, each in found.items()
    ]
    return f"AUC by {', '.join(told)}" if told else ""


def batch_membership(
    model: nn.Module,
    forget: Iterable[Any],
    holdout: Iterable[Any],
    *,
    tokenizer: Any = None,
    reference: nn.Module | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> TextMembership:
    """The attacks of `text_membership` on batches of tokens, whose labels say what counts; alike on the reference.

    Args:
        model: The unlearned model.
        forget: Batches of the texts or answers that were to be forgotten.
        holdout: Batches alike that no model was trained on.
        tokenizer: Makes texts of the labels, for zlib; without one that is left out. What ends a sequence is its end
            token, or else that of the model's configuration.
        reference: A model that never saw the forget set.
        resamples: Draws for the interval.
        seed: Of these draws.

    Raises:
        ValueError: There is no sequence.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.language_membership import batch_membership
        >>> forget, holdout = ([{"input_ids": ids, "labels": ids}] for ids in torch.tensor([[[3, 4]], [[5, 6]]]))
        >>> list(batch_membership(decoder, forget, holdout).found)
        ['loss', 'min_k', 'min_k_plus_plus']
    """
    check_count("resamples", resamples)
    sides = [list(forget), list(holdout)]
    ends = _ends(model, tokenizer)

    def scored(attacked: nn.Module) -> list[tuple[TokenScores, list[str] | None]]:
        found = []
        for side in sides:
            scores, tokens = score_batches(attacked, side)
            scores = replace(scores, has_eos=[int(part[-1]) in ends for part in tokens])
            texts = None if tokenizer is None else [tokenizer.decode(part, skip_special_tokens=True) for part in tokens]
            found.append((scores, texts))
        return found

    own, other = scored(model), [] if reference is None else scored(reference)
    values, beside = ([_read_by_all(*side) for side in each] for each in (own, other))
    for value, (mine, _), (theirs, _) in zip(values, own, other, strict=False):
        value["reference"] = mine.nll - theirs.nll
    told = [_told_apart(*map(_with_scores, each), resamples=resamples, seed=seed) for each in (values, beside) if each]
    return TextMembership(*told)


def _ends(model: nn.Module, tokenizer: Any) -> Collection[int]:
    """The tokens that end a sequence, as far as they are known."""
    configured = getattr(getattr(model, "config", None), "eos_token_id", None)
    known = configured if tokenizer is None else tokenizer.eos_token_id
    return [] if known is None else known if isinstance(known, (list, tuple)) else [known]


def privacy_leakage(auc: float, gold_auc: float) -> float:
    """MUSE's PrivLeak in percent: `100 ((1 − AUC) − (1 − AUC_gold)) / (1 − AUC_gold)` (arXiv 2407.06460).

    Near 0 is good; −100 is a model that is known to have been trained on the forget set, and far above 0 one that was
    made too ignorant of it, which tells as well. The AUCs are of Min-40%, with forget texts as the low class.

    Raises:
        ValueError: Gold's AUC is 1.

    Examples:
        >>> from semu_peft.evaluation import privacy_leakage
        >>> privacy_leakage(1.0, 0.5), privacy_leakage(0.5, 0.5)
        (-100.0, 0.0)
    """
    if gold_auc >= 1:
        raise ValueError(f"`gold_auc` must be below 1, got {gold_auc}. Gold never saw the forget set: check the sets.")
    return 100 * ((1 - auc) - (1 - gold_auc)) / (1 - gold_auc)
