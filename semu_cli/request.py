"""A request to forget, of whatever kind of model: checked, estimated or trained, saved with its record, and told."""

from __future__ import annotations

import dataclasses
import math
import platform
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import typer

from .bases import PROFILE, check_job, check_output, write_adapter
from .catalogue import Job, method_of
from .estimate import Estimate
from .verbs import Told


@dataclass(frozen=True)
class Outcome:
    """What training came to, before anything is saved.

    Attributes:
        profile: The spectra and ranks of the forget gradients.
        training: What `unlearn` returned.
        request: What was to be forgotten, for the model card: in words that may be public, so of texts their number.
        found: What was measured before and after, for the record.
        words: The same for people.
        then: The command that comes next.
        save: Writes the adapter into a folder.

    Examples:
        >>> Outcome(None, None, "Forgets 2 images.", {"examples": 2}, ["2 images."], ["semu"], print).request
        'Forgets 2 images.'
    """

    profile: Any
    training: Any
    request: str
    found: Mapping[str, Any]
    words: list[str]
    then: list[str]
    save: Callable[[Path], Any]


class Request(Protocol):
    """A model, what it is to forget, and how: a dataclass whose fields are named as the flags."""

    job: ClassVar[Job]

    def check(self) -> None:
        """Raise a usage error for a mistake that can be seen while nothing is loaded."""

    def estimate(self, step_seconds: float | None) -> Estimate:
        """Load model and data, and say what training would take."""

    def train(self) -> Outcome:
        """Load model and data, and train."""


def carry_out(kind: type[Any], flags: Mapping[str, Any]) -> Told:
    """Do what a verb was asked to: nothing is loaded before all is checked, nothing is written before all is done.

    Args:
        kind: The kind of [`Request`][semu_cli.request.Request].
        flags: What the verb was given, by the names of its parameters.
    """
    fields = {each.name for each in dataclasses.fields(kind)}
    request: Request = kind(**{name: value for name, value in flags.items() if name in fields})
    method_of(request.job, flags["method"])
    _check_share(flags["explained_variance"])
    _check_name(flags["adapter_name"])
    _check_seconds(flags["step_seconds"])
    request.check()
    check_output(flags["output_dir"])
    check_job(flags["model"], request.job)
    if flags["dry_run"]:
        return request.estimate(flags["step_seconds"]).told()
    outcome = request.train()
    record = _record(request.job, flags, outcome)

    def save(folder: Path) -> None:
        outcome.save(folder)
        outcome.profile.save(folder / PROFILE)
        _fill_card(folder, request.job, flags["method"], outcome)

    write_adapter(flags["output_dir"], save, record)
    return _told(record, outcome, flags["output_dir"])


def saver(model: Any, adapter_name: str) -> Callable[[Path], None]:
    """Saves an adapter of a `PeftModel`, which puts all names but `default` into a folder of their own, without one."""

    from semu_peft.tuner.model_card import fill_model_card

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder), selected_adapters=[adapter_name])
        inside = folder / adapter_name
        if adapter_name != "default" and inside.is_dir():
            for file in inside.iterdir():
                file.replace(folder / file.name)
            inside.rmdir()
            fill_model_card(folder, model.peft_config[adapter_name].to_dict())

    return save


def counted(number: int, one: str, more: str | None = None) -> str:
    """So many of something.

    Examples:
        >>> counted(1, "image"), counted(2000, "image")
        ('1 image', '2,000 images')
    """
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def hardly_forgotten(
    tries: list[str], training: Any, max_retain_kl: float | None, explained_variance: float, first: str | None = None
) -> str:
    """What to try where a run ended with all as well known as before: it is no success because it ended.

    Args:
        tries: What else there is to try in this kind of model.
        training: What `unlearn` returned.
        max_retain_kl: The budget of the run.
        explained_variance: Of its directions.
        first: What mostly helps, to be tried by itself before all else.
    """
    if max_retain_kl is not None:
        tries = [*tries, "allow more damage, --max-retain-kl"]
    if not training.stopped_early:
        tries = [*tries, "train for longer, --max-steps"]
    if explained_variance < 0.99:
        tries = [*tries, "keep more directions, --explained-variance 0.99"]
    begin = "Things to try" if first is None else f"Try this first: {first}. If that is not enough"
    return f"Hardly anything was forgotten. {begin}: {'; '.join([*tries, 'take another --method'])}."


def _check_share(explained_variance: float) -> None:
    if not 0 < explained_variance <= 1:
        raise typer.BadParameter(
            f"`--explained-variance` must be above 0 and at most 1, got {explained_variance:g}. Take 0.9, or 1 to keep "
            "every direction."
        )


def _check_name(adapter_name: str) -> None:
    # PyTorch keeps it as the name of a module, and PEFT as that of a folder.
    if re.fullmatch(r"[\w-]+", adapter_name) is None:
        raise typer.BadParameter(
            f"`--adapter-name` must be letters, digits, - and _, got {adapter_name!r}. Leave it out for `default`."
        )


def _check_seconds(step_seconds: float | None) -> None:
    if step_seconds is not None and not 0 <= step_seconds < math.inf:
        raise typer.BadParameter(
            f"`--step-seconds` must be a number of seconds of 0 or more, got {step_seconds:g}. Leave it out to have a "
            "step tried."
        )


def _record(job: Job, flags: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """What was done, for the file beside the adapter and for `--json`."""
    import torch

    import semu_peft

    training = outcome.training
    return {
        "job": job,
        "settings": {name: value for name, value in flags.items() if name not in ("dry_run", "progress")},
        **outcome.found,
        "ranks": {name: layer.rank for name, layer in outcome.profile.layers.items()},
        "training": {
            "steps": training.steps, "examples_seen": training.examples_seen, "seconds": training.seconds,
            "trainable_parameters": training.trainable_parameters,
            "stopped_early": training.stopped_early, "stop_reason": training.stop_reason,
            "history": training.history, "damage_on": training.damage_on,
        },
        "versions": {
            "semu_peft": semu_peft.__version__, "torch": torch.__version__, "python": platform.python_version()
        },
    }  # fmt: skip


_TASKS: dict[Job, str] = {
    "images": "image-classification", "text": "text-generation", "concept": "text-to-image"
}  # fmt: skip
"""The Hub's names of what models of these kinds do."""


def _fill_card(folder: Path, job: Job, method: str, outcome: Outcome) -> None:
    """Say in the adapter's model card what was forgotten, how, and what was measured before and after."""
    from semu_peft import update_model_card

    measured = {
        f"{name.replace('_', ' ')} {when}": value
        for name, found in outcome.found.items()
        if isinstance(found, Mapping)
        for when, value in found.items()
        if value is not None and math.isfinite(value)
    }
    steps = counted(outcome.training.steps, "step")
    how = f"Trained by `semu unlearn {job} --method {method}` in {steps} ({outcome.training.stop_reason})."
    update_model_card(
        folder, description=f"{outcome.request} {how}", metrics=measured, dataset="the data of the run",
        task=_TASKS[job],
    )  # fmt: skip


def _told(record: Mapping[str, Any], outcome: Outcome, output_dir: Path) -> Told:
    training, then = outcome.training, shlex.join(outcome.then)
    words = [
        *outcome.words,
        f"{training.trainable_parameters:,} numbers were trained, {counted(training.steps, 'step')} in "
        f"{training.seconds:.1f} s ({training.stop_reason}).",
        f"The adapter is in {output_dir}.",
        f"Next: {then}",
    ]
    return Told({"output_dir": str(output_dir), "next": then, **record}, words)
