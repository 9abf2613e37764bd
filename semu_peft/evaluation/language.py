"""Forgetting in language models, in one call: TOFU's measures and those beside them, cached and resumed by measurement.

Rows are those of TOFU's files (Maini et al. 2024, arXiv 2401.06121), or whatever
[`read_text`][semu_peft.language.shapes.read_text] takes: `question`, `answer`, the wrong answers `perturbed_answer`
and, for the forget and retain sets, `paraphrased_answer`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_model
from semu_peft.language.shapes import TextExample

from .auc import mean_interval
from .cached import Measurements, model_digest
from .drift import fluency, neutral_kl
from .generation import generate_answers, rouge_l
from .language_membership import privacy_leakage, text_membership
from .measurable import metrics_to_measure
from .memorisation import (
    OPEN_UNLEARNING_EPSILON,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    model_utility,
    probability_with_options,
    retain_truth_ratio,
    symmetric_ratio,
    truth_ratio,
)
from .prompts import are_plain, encoder_for, read_plain, read_texts
from .token_scores import score_answers, score_texts

_REDRAWS = 1000  # of the intervals of the AUCs


@dataclass(frozen=True, repr=False)
class LanguageMetrics:
    """What a language model still knows of a forget set, and what it kept. What was not measured is None.

    Attributes:
        probability: Mean `p(y | x)^(1/|y|)` of the forget answers, end of sequence counted.
        rouge: ROUGE-L recall of the greedy answers.
        truth_ratio: Mean `min(R, 1/R)`; gold's is the goal, not 1.
        paraphrased_probability: Of the paraphrased answers.
        extraction_strength: See [`extraction_strength`][semu_peft.evaluation.memorisation.extraction_strength].
        exact_memorisation: See [`exact_memorisation`][semu_peft.evaluation.memorisation.exact_memorisation].
        forget_quality: See [`forget_quality`][semu_peft.evaluation.memorisation.forget_quality]; needs gold.
        model_utility: Harmonic mean of what `utility` holds; needs wrong answers in all of its sets.
        neutral_kl: `KL(original ‖ now)` on neutral text, in nats per token.
        fluency: Entropy of the n-grams of the greedy forget answers, in bits.
        utility: Probability, ROUGE-L recall and, of a set with wrong answers, truth ratio of each set that is to be
            kept, by "set metric".
        membership: AUC of each attack of [`text_membership`][semu_peft.evaluation.language_membership.text_membership].
        privacy_leakage: MUSE's, in percent, by Min-40%; needs gold.
        truth_ratios: `R` of each forget row, which forget quality compares.
        probability_interval: Between which values 95% of those of rows drawn again lie, as of the next six; None of a
            single row. They do not count when metrics are compared.
        rouge_interval: Of the ROUGE-L recall.
        truth_ratio_interval: Of the truth ratio.
        paraphrased_probability_interval: Of the paraphrased answers' probability.
        extraction_strength_interval: Of the extraction strength.
        exact_memorisation_interval: Of the exact memorisation.
        membership_interval: Of the AUC of each attack, with both sets drawn again.

    Examples:
        >>> from semu_peft.evaluation import LanguageMetrics
        >>> gold = LanguageMetrics(probability=0.1, truth_ratios=(0.5, 0.7, 0.9))
        >>> LanguageMetrics(probability=0.2, truth_ratios=(0.5, 0.7, 0.9)).against(gold)
        LanguageMetrics(probability 0.200, forget quality 1)
    """

    probability: float | None = None
    rouge: float | None = None
    truth_ratio: float | None = None
    paraphrased_probability: float | None = None
    extraction_strength: float | None = None
    exact_memorisation: float | None = None
    forget_quality: float | None = None
    model_utility: float | None = None
    neutral_kl: float | None = None
    fluency: float | None = None
    utility: Mapping[str, float] = field(default_factory=dict)
    membership: Mapping[str, float] = field(default_factory=dict)
    privacy_leakage: float | None = None
    truth_ratios: tuple[float, ...] = ()
    probability_interval: tuple[float, float] | None = field(default=None, compare=False)
    rouge_interval: tuple[float, float] | None = field(default=None, compare=False)
    truth_ratio_interval: tuple[float, float] | None = field(default=None, compare=False)
    paraphrased_probability_interval: tuple[float, float] | None = field(default=None, compare=False)
    extraction_strength_interval: tuple[float, float] | None = field(default=None, compare=False)
    exact_memorisation_interval: tuple[float, float] | None = field(default=None, compare=False)
    membership_interval: Mapping[str, tuple[float, float]] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return f"LanguageMetrics({', '.join(f'{name} {value}' for name, value in self.row().items())})"

    def row(self) -> dict[str, str]:
        """The numbers that were measured as text, by the head of their column."""
        forms = {"forget_quality": ".2g", "neutral_kl": ".4f", "fluency": ".2f", "privacy_leakage": ".1f"}
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values |= self.utility if self.model_utility is None else {}  # else it sums them up
        values |= {"membership AUC": self.membership["min_k"]} if "min_k" in self.membership else {}
        return {
            name.replace("_", " "): format(value, forms.get(name, ".3f"))
            for name, value in values.items()
            if isinstance(value, float)
        }

    def against(self, gold: LanguageMetrics) -> LanguageMetrics:
        """The same with the forget quality beside a gold model's metrics, and where both have it the privacy leakage.

        Either is NaN where one of the models has diverged, and the leakage where gold's AUC is 1, a share of
        nothing: it takes all of the forget texts for members, which says that the two sets are not alike.

        Raises:
            ValueError: The truth ratios of the two are of different rows, or there is nothing to compare.
        """
        own, theirs = self.membership.get("min_k"), gold.membership.get("min_k")
        leakage = None
        if own is not None and theirs is not None:
            leakage = math.nan if theirs >= 1 else privacy_leakage(own, theirs)
        alike = len(self.truth_ratios) == len(gold.truth_ratios) if self.truth_ratios else leakage is not None
        if not alike:
            raise _unlike(gold, len(self.truth_ratios))
        quality = _of_finite(forget_quality, self.truth_ratios, gold.truth_ratios) if self.truth_ratios else None
        return replace(self, forget_quality=quality, privacy_leakage=leakage)


def evaluate_language(
    model: nn.Module,
    tokenizer: Any,
    forget: Any,
    *,
    utility: Mapping[str, Any] | None = None,
    neutral: Any = None,
    holdout: Any = None,
    gold: LanguageMetrics | None = None,
    reference: nn.Module | None = None,
    metrics: Sequence[str] | None = None,
    template: str | None = None,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    output_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LanguageMetrics:
    """Measure what a language model still knows of the forget set, and what it kept.

    TOFU's protocol as OpenUnlearning (arXiv 2506.12618) computes it, with the 1e-10 that it adds to denominators: a
    destroyed model, to which all answers are alike impossible, has no good forget quality. Where a model has diverged a
    metric is NaN, and so is what is made of it. With `output_dir`, every measurement is written to a JSON file as soon
    as it is made, and read from there the next time; files of another model are refused.

    Args:
        model: A causal language model of transformers, with any adapter or none.
        tokenizer: Its tokenizer.
        forget: Rows to forget, with `question` and `answer`; the truth ratio also takes `perturbed_answer`, a list, and
            `paraphrased_answer`, of all rows or of none: then it takes `answer`, and there is no paraphrased
            probability. Or plain texts, which no question can be asked for: then what needs one is left out.
        utility: Sets to keep by name, `{"retain": ..., "real_authors": ..., "world_facts": ...}`; model utility is over
            all three measures of each. In sets with wrong answers and without `paraphrased_answer`, the probability is
            that among the options. Sets without wrong answers have no truth ratio, and then there is no model utility.
        neutral: Plain texts for the KL to the original model.
        holdout: Questions with answers, or texts, like those to forget that no model was trained on, for membership.
        gold: Metrics of the model that never saw the forget set, for the forget quality and the privacy leakage.
        reference: The model before unlearning, for the KL; by default the same model without its adapter.
        metrics: Names of [`LanguageMetrics`][semu_peft.evaluation.language.LanguageMetrics] to compute; by default all
            that the data allow.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        max_new_tokens: Longest greedy answer.
        batch_size: Answers at a time.
        output_dir: Folder of the measurements, of this model alone.
        progress: Show a progress bar per measurement.

    Raises:
        ImportError: ROUGE or the forget quality is asked for and the extra `evaluation` is not installed.
        TypeError: Rows have an unknown form, `gold` is a model, or `utility` has no names.
        ValueError: A metric is unknown, or lacks the data it is made from; some rows of a set have
            `paraphrased_answer` and others not; of `holdout` and `forget` one is texts and the other questions; a set
            to keep is called "forget"; or the folder is another model's.

    Examples:
        >>> from semu_peft.evaluation import evaluate_language
        >>> rows = [{"question": "What colour?", "answer": "blue", "perturbed_answer": ["red", "a"]}]
        >>> evaluate_language(decoder, tokenizer, rows, metrics=["probability"], progress=False)
        LanguageMetrics(probability 0.0...)
    """
    check_model(model)
    check_count("batch_size", batch_size)
    if gold is not None:
        of_gold = "Measure that one first: `gold=evaluate_language(gold_model, tokenizer, forget, ...)`."
        check_kind("gold", gold, LanguageMetrics, "the `LanguageMetrics` of the model that never saw `forget`", of_gold)
    if utility is not None:
        check_kind("utility", utility, Mapping, "a mapping of sets by name", 'Write `{"retain": rows}`.')
    if "forget" in (utility or {}):
        raise ValueError(
            "`utility` must name its sets otherwise than what is to be forgotten, got a set named 'forget'. Rename it."
        )
    sets = {name: read_texts(rows, name) for name, rows in {"forget": forget, **(utility or {})}.items()}
    texts = None if neutral is None else read_plain(neutral, "neutral")
    others = None if holdout is None else read_texts(holdout, "holdout")
    wanted = metrics_to_measure(metrics, sets, texts, others, gold)
    if gold is not None and "truth_ratio" in wanted and len(gold.truth_ratios) != len(sets["forget"]):
        raise _unlike(gold, len(sets["forget"]))  # before anything is measured
    suite = _Suite(
        model, tokenizer, sets, Measurements(output_dir, model), template, max_new_tokens, batch_size, progress
    )
    found: dict[str, Any] = {}
    for metric in wanted:
        if metric == "neutral_kl":
            found[metric] = suite.neutral_kl(texts or [], reference)
        elif metric == "membership":
            areas = suite.membership(others or [])
            found[metric] = {attack: each["auc"] for attack, each in areas.items()}
            found[f"{metric}_interval"] = {
                attack: tuple(each["interval"]) for attack, each in areas.items() if math.isfinite(each["auc"])
            }
        elif metric == "model_utility":
            found["utility"] = suite.utility()
            is_whole = len(found["utility"]) == 3 * len(utility or {})
            found[metric] = _of_finite(model_utility, found["utility"].values()) if is_whole else None
        elif metric == "fluency":
            found[metric] = math.nan if suite.diverged("forget") else fluency(suite.rouge("forget")["written"])
        else:
            by_row = suite.forget(metric)
            found[metric] = float(by_row.mean())
            is_sample = len(by_row) > 1 and math.isfinite(found[metric])  # one row drawn again is that row
            found[f"{metric}_interval"] = mean_interval(by_row) if is_sample else None
    if "truth_ratio" in wanted:
        found["truth_ratios"] = tuple(suite.ratios("forget").tolist())
    measured = LanguageMetrics(**found)
    return measured if gold is None or not {"truth_ratio", "membership"} & set(wanted) else measured.against(gold)


def _unlike(gold: LanguageMetrics, rows: int) -> ValueError:
    return ValueError(
        "`gold` must have been measured on the same forget rows, truth ratio or membership included, got "
        f"{len(gold.truth_ratios)} truth ratios and {rows} here. Evaluate both models alike."
    )


@dataclass(frozen=True)
class _Suite:
    """The measurements of one model on sets of rows; each is made once, from cached passes over the set."""

    model: nn.Module
    tokenizer: Any
    sets: Mapping[str, list[Any]]
    kept: Measurements
    template: str | None
    max_new_tokens: int
    batch_size: int
    progress: bool
    seen: dict[str, Any] = field(default_factory=dict)

    def forget(self, metric: str) -> Tensor:
        """One metric of each row of the forget set that has it; NaN where the model has diverged."""
        if metric == "truth_ratio":
            return symmetric_ratio(self.ratios("forget"))
        if metric == "paraphrased_probability":
            return _probabilities(self.truth("forget")["correct"])
        if metric == "probability":
            return _probabilities(self.answers("forget")["nll"])
        if self.diverged("forget"):
            return _vector([math.nan])
        values = _vector(self.rouge("forget")["recall"] if metric == "rouge" else self.answers("forget")[metric])
        return values[~values.isnan()]  # an answer without words or tokens has none

    def utility(self) -> dict[str, float]:
        """The three measures of each set that is to be kept; two of one without wrong answers, one of plain texts."""
        parts = {}
        for name in list(self.sets)[1:]:
            if not all(row.perturbed_answers for row in self.sets[name]):
                parts[f"{name} probability"] = _mean_probability(self.answers(name)["nll"])
                if not are_plain(self.sets[name]):
                    parts[f"{name} rouge"] = self.recall(name)
                continue
            truth = self.truth(name)
            among = probability_with_options(truth["correct"], truth["wrong"], epsilon=OPEN_UNLEARNING_EPSILON)
            parts[f"{name} probability"] = (
                _mean_probability(self.answers(name)["nll"]) if truth["paraphrased"] else float(among.mean())
            )
            parts[f"{name} rouge"] = self.recall(name)
            parts[f"{name} truth_ratio"] = retain_truth_ratio(self.ratios(name))
        return parts

    def recall(self, name: str) -> float:
        return math.nan if self.diverged(name) else float(_vector(self.rouge(name)["recall"]).nanmean())

    def diverged(self, name: str) -> bool:
        """Whether the model gives NaN for a set's own answers: what it writes is then made of nothing."""
        return bool(_vector(self.answers(name)["nll"]).isnan().any())

    def ratios(self, name: str) -> Tensor:
        truth = self.truth(name)
        return truth_ratio(truth["correct"], truth["wrong"], epsilon=OPEN_UNLEARNING_EPSILON)

    def answers(self, name: str) -> Any:
        """Of a set's own answers: mean negative log likelihood, and what of them is known by heart."""

        def measure() -> Any:
            scores = (
                self._read(name) if are_plain(self.sets[name]) else self._score(self._pairs(name), f"{name}: answers")
            )
            return {
                "nll": scores.nll.tolist(),
                "extraction_strength": extraction_strength(scores).tolist(),
                "exact_memorisation": exact_memorisation(scores).tolist(),
            }

        return self._once(f"{name}_answers", {"pairs": self._pairs(name)}, measure)

    def truth(self, name: str) -> Any:
        """Of a set's right answers (paraphrased, where the rows have that) and wrong ones: mean NLL per token."""
        rows = self.sets[name]
        paraphrased = all(row.paraphrased_answer for row in rows)
        groups = [_options(row, paraphrased) for row in rows]

        def measure() -> Any:
            pairs = [(row.prompt, answer) for row, group in zip(rows, groups, strict=True) for answer in group]
            parts = self._score(pairs, f"{name}: truth ratio").nll.split([len(group) for group in groups])
            return {
                "paraphrased": paraphrased,
                "correct": [float(part[0]) for part in parts],
                "wrong": [part[1:].tolist() for part in parts],
            }

        return self._once(f"{name}_truth", {"questions": [row.prompt for row in rows], "answers": groups}, measure)

    def rouge(self, name: str) -> Any:
        """A set's greedy answers, and the ROUGE-L recall of each."""
        pairs = self._pairs(name)

        def measure() -> Any:
            written = generate_answers(
                self.model, self.tokenizer, [question for question, _ in pairs], template=self.template,
                max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, progress=self.progress,
                name=f"{name}: greedy answers",
            )  # fmt: skip
            return {"written": written, "recall": rouge_l([answer for _, answer in pairs], written).recall.tolist()}

        return self._once(f"{name}_rouge", {"pairs": pairs, "max_new_tokens": self.max_new_tokens}, measure)

    def neutral_kl(self, texts: list[str], reference: nn.Module | None) -> float:
        def measure() -> float:
            drift = neutral_kl(
                self.model,
                self.tokenizer,
                texts,
                reference=reference,
                batch_size=self.batch_size,
                progress=self.progress,
            )
            return drift.kl

        to = None if reference is None or self.kept.folder is None else model_digest(reference)
        return float(self._once("neutral_kl", {"texts": texts, "reference": to}, measure))

    def membership(self, holdout: list[TextExample]) -> dict[str, Any]:
        """The AUC of each attack with its interval, forget set against held-out answers."""
        others = [(row.prompt, row.answer) for row in holdout]

        def measure() -> dict[str, Any]:
            found = text_membership(
                self.model, self.tokenizer, self.sets["forget"], holdout, template=self.template,
                batch_size=self.batch_size, resamples=_REDRAWS, progress=self.progress,
            )  # fmt: skip
            return {attack: {"auc": each.auc, "interval": list(each.interval)} for attack, each in found.items()}

        inputs = {"pairs": self._pairs("forget"), "holdout": others, "redraws": _REDRAWS}
        return dict(self._once("membership", inputs, measure))

    def _pairs(self, name: str) -> list[Any]:
        return [(row.prompt, row.answer) for row in self.sets[name]]

    def _read(self, name: str) -> Any:
        return score_texts(
            self.model, self.tokenizer, [row.answer for row in self.sets[name]], batch_size=self.batch_size,
            progress=self.progress, name=f"{name}: texts",
        )  # fmt: skip

    def _score(self, pairs: list[Any], name: str) -> Any:
        return score_answers(
            self.model, self.tokenizer, pairs, template=self.template, batch_size=self.batch_size,
            progress=self.progress, name=name,
        )  # fmt: skip

    def _once(self, name: str, inputs: dict[str, Any], measure: Any) -> Any:
        if name not in self.seen:
            self.seen[name] = self.kept.get(name, {**inputs, "template": self.template, "tokens": self._first}, measure)
        return self.seen[name]

    @property
    def _first(self) -> dict[str, list[int]]:
        """The first row as the model reads it: another tokenizer or chat template makes other measurements."""
        row, encoder = self.sets["forget"][0], encoder_for(self.model, self.tokenizer, self.template)
        return encoder.windows(row.answer)[0] if row.prompt is None else encoder.answer(row.prompt, row.answer)


def _of_finite(measure: Callable[..., float], *parts: Iterable[float]) -> float:
    """A number made of others; NaN where one of them is, of which the measure itself would make an error."""
    given = [list(part) for part in parts]
    return math.nan if any(math.isnan(value) for part in given for value in part) else measure(*given)


def _options(row: TextExample, paraphrased: bool) -> list[str]:
    """The right answer and the wrong ones."""
    return [str(row.paraphrased_answer) if paraphrased else row.answer, *row.perturbed_answers]


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _probabilities(nll: Sequence[float]) -> Tensor:
    return _vector(nll).neg().exp()


def _mean_probability(nll: Sequence[float]) -> float:
    return float(_probabilities(nll).mean())
