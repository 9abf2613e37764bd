"""The methods by the names that the command line knows, what each needs, and where it is from: the one list of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

import typer

from .verbs import Told

Job = Literal["images", "text", "concept", "python"]


@dataclass(frozen=True)
class Method:
    """A way of forgetting.

    Attributes:
        job: What it is for; `--method NAME` of `semu unlearn JOB`. `python`: a function of `semu_peft.methods`.
        name: As `--method` and the functions in Python take it.
        objective: Its objective in `semu_peft.objectives`, which makes it up; of `python` its sentence.
        needs: The data.
        source: The paper.
        note: What to know of it.

    Examples:
        >>> from semu_cli.catalogue import METHODS
        >>> [method.objective for method in METHODS if (method.job, method.name) == ("images", "delete")]
        ['DecoupledDistillation']
    """

    job: Job
    name: str
    objective: str
    needs: str
    source: str
    note: str = ""


_FORGET = "what to forget"
_REFUSALS = "questions with answers; a refusal is taken where no second answer is given"
_POOR = "to compare with: it also destroys"

METHODS = (
    Method("images", "delete", "DecoupledDistillation", _FORGET, "DELETE, arXiv 2503.23751", "the default"),
    Method("images", "unseen-confidence", "UnseenConfidence", f"{_FORGET}, and --test", "semu_peft",
           "single pictures, not a class"),
    Method("images", "random-label", "RandomLabel", _FORGET, "SEMU, arXiv 2502.07587", "the SEMU paper's"),
    Method("images", "inverted-hinge", "InvertedHinge", _FORGET, "LoKU, arXiv 2408.06621"),
    Method("images", "uniform", "UniformDistribution", _FORGET, "arXiv 1911.04933"),
    Method("images", "gradient-ascent", "GradientAscent", _FORGET, "arXiv 2109.13398", _POOR),
    Method("text", "wga", "WGA", f"{_FORGET}; better with --retain", "arXiv 2502.19301", "the default"),
    Method("text", "npo", "NPO", _FORGET, "arXiv 2404.05868", "β 0.03"),
    Method("text", "simnpo", "SimNPO", _FORGET, "arXiv 2410.07163"),
    Method("text", "unseen-answers", "UnseenAnswer", "questions with answers; better with --retain", "semu_peft"),
    Method("text", "dpo", "DPO", _REFUSALS, "arXiv 2305.18290"),
    Method("text", "idk", "DPO", _REFUSALS, "arXiv 2305.18290", "the same as dpo"),
    Method("text", "altpo", "DPO", "questions with answers and wrong answers (perturbed_answer)", "arXiv 2409.13474"),
    Method("text", "flat", "FDivergence", _REFUSALS, "FLAT, arXiv 2410.11143"),
    Method("text", "delete", "DecoupledDistillation", _FORGET, "DELETE, arXiv 2503.23751"),
    Method("text", "undial", "UNDIAL", _FORGET, "arXiv 2402.10052"),
    Method("text", "ce-u", "CEU", _FORGET, "arXiv 2503.01224"),
    Method("text", "satimp", "SatImp", _FORGET, "arXiv 2505.11953"),
    Method("text", "inverted-hinge", "InvertedHinge", _FORGET, "LoKU, arXiv 2408.06621"),
    Method("text", "gradient-ascent", "GradientAscent", _FORGET, "arXiv 2109.13398", _POOR),
    Method("concept", "condition-matching", "ConditionMatching", "a prompt, and --anchor for what to give instead",
           "arXiv 2303.13516", "the default"),
    Method("concept", "negative-guidance", "NegativeGuidance", "a prompt", "ESD, arXiv 2303.07345"),
    Method("concept", "gradient-ascent", "DenoisingAscent", "a prompt", "arXiv 2109.13398", _POOR),
)  # fmt: skip


def method_of(job: Job, name: str) -> Method:
    """The method of a job by its name.

    Raises:
        typer.BadParameter: There is none.

    Examples:
        >>> from semu_cli.catalogue import method_of
        >>> method_of("text", "npo").objective
        'NPO'
    """
    names = {method.name: method for method in METHODS if method.job == job}
    if name not in names:
        raise typer.BadParameter(f"`--method` must be one of {', '.join(names)}, got {name!r}. See `semu methods`.")
    return names[name]


def zoo() -> list[Method]:
    """The published methods that are functions in Python, from their own table.

    Examples:
        >>> from semu_cli.catalogue import zoo
        >>> [method.source for method in zoo() if method.name == "salun"]
        ['SalUn, 2310.12508']
    """
    from semu_peft.methods import METHODS as published

    def needs(row: Any) -> str:
        return ", ".join((_FORGET, *row.needs))

    return [Method("python", row.name, row.sentence, needs(row), row.source, row.use) for row in published.values()]


def methods(
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB", help="Only of images, text, concept or python.")
    ] = None,
) -> Told:
    """List the methods, what each needs, and the paper."""
    from rich.table import Table

    jobs = get_args(Job)
    if job is not None and job not in jobs:
        raise typer.BadParameter(f"`--job` must be one of {', '.join(jobs)}, got {job!r}.")
    known = (*METHODS, *(zoo() if job in (None, "python") else ()))  # which waits for torch
    chosen = [method for method in known if job in (None, method.job)]
    table = Table("job", "--method", "needs", "source", "")
    for method in chosen:
        table.add_row(method.job, method.name, method.needs, method.source, method.note)
    return Told({"methods": [asdict(method) for method in chosen]}, [table])
