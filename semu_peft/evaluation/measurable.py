"""Which metrics of a language model the data allow, known before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .prompts import are_plain

# What each metric is made from.
_NEEDS = {
    "probability": "answers",
    "extraction_strength": "answers",
    "exact_memorisation": "answers",
    "paraphrased_probability": "paraphrased",
    "truth_ratio": "truth",
    "rouge": "rouge",
    "fluency": "rouge",
    "model_utility": "utility",
    "neutral_kl": "neutral",
    "membership": "holdout",
}
_OF_FORGET = {"paraphrased_probability", "truth_ratio"}  # what is made from paraphrases of the forget set
# What is told beside gold's: the metric that it is made from, and the field of gold's metrics.
BESIDE_GOLD = {"forget_quality": ("truth_ratio", "truth_ratios"), "privacy_leakage": ("membership", "membership")}
"""What is told beside gold alone: the metric that is measured for it, and what gold must have of it."""


def metrics_to_measure(
    metrics: Sequence[str] | None,
    sets: Mapping[str, list[Any]],
    neutral: Any = None,
    holdout: Any = None,
    gold: Any = None,
) -> list[str]:
    """The metrics to compute, in the order of the table, before any model is there; each must have its data.

    Args:
        metrics: Those that are asked for; None: all that the data allow.
        sets: Rows by name, as [`read_text`][semu_peft.language.shapes.read_text] gives them: `forget`, and those of the
            utility.
        neutral: Whether there are texts to stay as they are: None where not.
        holdout: Rows that no model was trained on.
        gold: Metrics of a model that never saw the forget set; None where there are none.

    Raises:
        ValueError: There is no such metric, or its data are missing, or of texts and of questions; or some rows of a
            set have `paraphrased_answer` and others not.

    Examples:
        >>> from semu_peft.evaluation.measurable import metrics_to_measure
        >>> from semu_peft.language import read_text
        >>> metrics_to_measure(None, {"forget": list(read_text(["the sky is blue"]))})
        ['probability', 'extraction_strength', 'exact_memorisation']
    """
    unlike = holdout is not None and are_plain(holdout) is not are_plain(sets["forget"])
    without = [name for name, rows in sets.items() if not all(row.perturbed_answers for row in rows)]
    there = {
        "truth": "forget" not in without,
        "paraphrased": "forget" not in without and all(row.paraphrased_answer for row in sets["forget"]),
        "utility": len(sets) > 1,
        "neutral": neutral is not None,
        "holdout": holdout is not None and not unlike,
        "rouge": not are_plain(sets["forget"]),
    }
    lacking = {
        "truth": "`perturbed_answer` in the rows of `forget`",
        "paraphrased": "`paraphrased_answer` and `perturbed_answer` in the rows of `forget`",
        "rouge": "questions in `forget`",
        **{need: f"`{need}`" for need in ("utility", "neutral", "holdout")},
    }
    if unlike and (metrics is None or {"membership", "privacy_leakage"} & {*_listed(metrics)}):
        kinds = ("plain texts", "answers to questions")
        is_plain = are_plain(sets["forget"])
        raise ValueError(
            f"`holdout` must be what `forget` is, {kinds[not is_plain]}, got {kinds[is_plain]}. Give such, or leave it "
            "out: membership tells the two apart."
        )
    asked = {*_NEEDS} if metrics is None else {BESIDE_GOLD.get(name, (name,))[0] for name in _listed(metrics)}
    reads = {name: _OF_FORGET if name == "forget" else {"model_utility"} for name in sets if name not in without}
    _check_paraphrases({name: sets[name] for name, made in reads.items() if made & asked})
    if metrics is None:
        return [name for name, need in _NEEDS.items() if there.get(need, True)]
    if poor := [name for name in without if name != "forget"]:  # part of the utility is to be had, but no mean of it
        there["utility"], lacking["utility"] = False, f"`perturbed_answer` in the rows of `{poor[0]}`"
    names: list[str] = []
    for name in _listed(metrics):
        part, of_gold = BESIDE_GOLD.get(name, (name, None))
        if part not in _NEEDS:
            raise ValueError(f"`metrics` must be among {[*_NEEDS, *BESIDE_GOLD]}, got {name!r}. Correct the name.")
        lacks = None if there.get(_NEEDS[part], True) else lacking[_NEEDS[part]]
        if lacks is None and of_gold is not None and not getattr(gold, of_gold, None):
            lacks = f"`gold` with its {part.replace('_', ' ')}"
        if lacks is not None:
            raise ValueError(f"`metrics` has {name!r}, which needs {lacks}. Give it, or leave that out.")
        names.append(part)
    return [name for name in _NEEDS if name in names]


def _check_paraphrases(sets: Mapping[str, list[Any]]) -> None:
    """Check that of each set all rows have a paraphrased answer, or none: the two are no one measure."""
    for name, rows in sets.items():
        missing = [number for number, row in enumerate(rows) if not row.paraphrased_answer]
        if 0 < len(missing) < len(rows):
            raise ValueError(
                f"`{name}[{missing[0]}]` must have `paraphrased_answer`, as {len(rows) - len(missing)} of the "
                f"{len(rows)} rows of `{name}` do, got none. Give it, or leave it out of all: then the answers "
                "themselves are measured."
            )


def _listed(metrics: Sequence[str]) -> Sequence[str]:
    return [metrics] if isinstance(metrics, str) else metrics
