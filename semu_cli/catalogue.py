"""The methods by the names that the command line knows, what each needs, and where it is from: the one list of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from .verbs import Told

Job = Literal["images", "text", "concept"]


@dataclass(frozen=True)
class Method:
    """A way of forgetting.

    Attributes:
        job: What it is for; `--method NAME` of `semu unlearn JOB`.
        name: As `--method` and the functions in Python take it.
        objective: Its objective in `semu_peft.objectives`, which makes it up; for those that Python alone has, their
            function in `semu_peft.methods`.
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
    in_python_alone: bool = False


_FORGET = "what to forget"
_REFUSALS = "questions with answers; a refusal is taken where no second answer is given"
_BOTH = "what to forget and what to keep"
_POOR = "to compare with: it also destroys"


def _python(job: Job, name: str, needs: str, source: str) -> Method:
    return Method(job, name, name, needs, source, f"Python: semu_peft.methods.{name}", in_python_alone=True)


METHODS = (
    Method("images", "delete", "DecoupledDistillation", _FORGET, "DELETE, arXiv 2503.23751", "the default"),
    Method("images", "random-label", "RandomLabel", _FORGET, "SEMU, arXiv 2502.07587", "the SEMU paper's"),
    Method("images", "inverted-hinge", "InvertedHinge", _FORGET, "LoKU, arXiv 2408.06621"),
    Method("images", "uniform", "UniformDistribution", _FORGET, "arXiv 1911.04933"),
    Method("images", "gradient-ascent", "GradientAscent", _FORGET, "arXiv 2109.13398", _POOR),
    Method("text", "npo", "NPO", _FORGET, "arXiv 2404.05868", "the default, β 0.03"),
    Method("text", "simnpo", "SimNPO", _FORGET, "arXiv 2410.07163"),
    Method("text", "unseen-answers", "UnseenAnswer", "questions with answers; better with --retain", "semu_peft"),
    Method("text", "dpo", "DPO", _REFUSALS, "arXiv 2305.18290"),
    Method("text", "idk", "DPO", _REFUSALS, "arXiv 2305.18290", "the same as dpo"),
    Method("text", "altpo", "DPO", "questions with answers and wrong answers (perturbed_answer)", "arXiv 2409.13474"),
    Method("text", "flat", "FDivergence", _REFUSALS, "FLAT, arXiv 2410.11143"),
    Method("text", "delete", "DecoupledDistillation", _FORGET, "DELETE, arXiv 2503.23751"),
    Method("text", "undial", "UNDIAL", _FORGET, "arXiv 2402.10052"),
    Method("text", "ce-u", "CEU", _FORGET, "arXiv 2503.01224"),
    Method("text", "wga", "WGA", _FORGET, "arXiv 2502.19301"),
    Method("text", "satimp", "SatImp", _FORGET, "arXiv 2505.11953"),
    Method("text", "inverted-hinge", "InvertedHinge", _FORGET, "LoKU, arXiv 2408.06621"),
    Method("text", "gradient-ascent", "GradientAscent", _FORGET, "arXiv 2109.13398", _POOR),
    Method("concept", "condition-matching", "ConditionMatching", "a prompt, and --anchor for what to give instead",
           "arXiv 2303.13516", "the default"),
    Method("concept", "negative-guidance", "NegativeGuidance", "a prompt", "ESD, arXiv 2303.07345"),
    Method("concept", "gradient-ascent", "DenoisingAscent", "a prompt", "arXiv 2109.13398", _POOR),
    _python("images", "scrub", _BOTH, "SCRUB, arXiv 2302.09880"),
    _python("images", "bad_teacher", _BOTH, "arXiv 2205.08096"),
    _python("images", "boundary_shrink", _FORGET, "arXiv 2303.11570"),
    _python("images", "neg_grad_plus", _BOTH, "arXiv 2302.09880"),
    _python("images", "unsir", _BOTH, "UNSIR, arXiv 2111.08947"),
    _python("text", "repselect", _FORGET, "RepSelect, arXiv 2606.17168"),
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
    names = {method.name: method for method in METHODS if method.job == job and not method.in_python_alone}
    if name not in names:
        raise typer.BadParameter(f"`--method` must be one of {', '.join(names)}, got {name!r}. See `semu methods`.")
    return names[name]


def methods(
    job: Annotated[str | None, typer.Option("--job", help="Only of images, text or concept.")] = None,
) -> Told:
    """List the methods, what each needs, and the paper."""
    from rich.table import Table

    jobs = list(dict.fromkeys(method.job for method in METHODS))
    if job is not None and job not in jobs:
        raise typer.BadParameter(f"`--job` must be one of {', '.join(jobs)}, got {job!r}.")
    chosen = [method for method in METHODS if job in (None, method.job)]
    table = Table("job", "--method", "needs", "source", "")
    for method in chosen:
        table.add_row(method.job, method.name, method.needs, method.source, method.note)
    return Told({"methods": [asdict(method) for method in chosen]}, [table])
