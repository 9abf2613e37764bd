"""One report of what was asked, done, measured and not measured: as JSON, Markdown and a page that stands alone."""

from __future__ import annotations

import datetime
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from semu_peft.arguments import check_adapter_name, check_kind, check_model, check_path, check_switch
from semu_peft.evaluation.classification import Predictions
from semu_peft.files import folder_written_whole, written_whole
from semu_peft.subspace.profile import SubspaceProfile
from semu_peft.training.unlearn import UnlearnResult

from .contents import (
    LIMITS,
    as_reasons,
    environment_contents,
    file_contents,
    model_contents,
    not_tested,
    settings_contents,
    spectrum_contents,
    task_of,
    text_contents,
    training_contents,
)
from .curves import AttackCurve, plot_attack
from .document import Picture, vector_picture
from .figure import new_figure
from .fingerprints import data_fingerprint
from .html import to_html
from .markdown import to_markdown
from .measured import fits, flat_attacks, read_attacks, read_metrics, read_task, untested
from .plots import plot_confusion, plot_spectra
from .samples import Samples, plot_samples, read_samples
from .sections import sections
from .tradeoff import forgetting_of, has_losses, is_of_retain_data, plot_losses, plot_tradeoff

FORMAT = "semu_peft.Audit"
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Audit:
    """A report. `write` and `write_all` put it into files; `print(audit.to_markdown())` shows it.

    Attributes:
        contents: All that it says, as JSON has it: `schema_version`, `request`, `model`, `training`, `metrics`,
            `attacks`, `not_tested`, `limits`, `environment` …
        pictures: What the page shows; a report that was loaded has none.

    Examples:
        >>> from semu_peft.report import audit
        >>> audit("Forget the threes.", metrics={"forget accuracy": 1.5})
        Audit('What was forgotten': 1 measured, 0 attacks, 12 kinds of evidence missing, 0 pictures)
    """

    contents: Mapping[str, Any]
    pictures: tuple[Picture, ...] = field(default=())

    def __repr__(self) -> str:
        counts = {name: len(self.contents[name]) for name in ("attacks", "not_tested")}
        return (
            f"Audit({self.contents['title']!r}: {len(self.contents['metrics']['rows'])} measured, {counts['attacks']} "
            f"attacks, {counts['not_tested']} kinds of evidence missing, {len(self.pictures)} pictures)"
        )

    def to_json(self) -> str:
        """The contents; `schema_version` changes when a reader of an older version could not read them."""
        return json.dumps(self.contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The report in GitHub's Markdown, with the pictures' texts."""
        return to_markdown(self.contents["title"], self.contents["created"], sections(self.contents, self.pictures))

    def to_html(self) -> str:
        """The report as one page, with pictures and style inside: it asks no other host for anything."""
        return to_html(self.contents["title"], self.contents["created"], sections(self.contents, self.pictures))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write one file, whole or not at all.

        Args:
            path: The file; `.html`, `.md` or `.json` says what is written.

        Returns:
            The path written.

        Raises:
            ValueError: It has another suffix.
        """
        check_path("path", path)
        target = Path(path)
        texts = {".html": self.to_html, ".md": self.to_markdown, ".json": self.to_json}
        if target.suffix not in texts:
            raise ValueError(f"`path` must end in '.html', '.md' or '.json', got {target.suffix!r}. Add one of these.")
        text = texts[target.suffix]()
        with written_whole(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return target

    def write_all(self, folder: str | os.PathLike[str], name: str = "report") -> list[Path]:
        """Write the report in all three forms, which a reader sees all old or all new.

        Args:
            folder: The folder; other files in it stay.
            name: The files' name without suffix.

        Returns:
            The paths written: JSON, Markdown and HTML.
        """
        check_path("folder", folder)
        texts = {
            f"{name}.json": self.to_json(), f"{name}.md": self.to_markdown(), f"{name}.html": self.to_html()
        }  # fmt: skip
        with folder_written_whole(folder, texts) as temporary:
            for file, text in texts.items():
                (temporary / file).write_text(text, encoding="utf-8")
        return [Path(folder, file) for file in texts]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Audit:
        """Read the JSON of a report; its pictures are in the page alone.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no report, or one of a later version.
        """
        check_path("path", path)
        try:
            contents = json.loads(Path(path).read_text(encoding="utf-8"))
            found = contents["format"], contents["schema_version"]
            if found[0] != FORMAT or not 1 <= found[1] <= SCHEMA_VERSION:
                raise ValueError(f"its format is {found[0]!r}, version {found[1]}")
            loaded = cls(contents)
            loaded.to_markdown()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"`path` must be the JSON of a report of version {SCHEMA_VERSION}, got {os.fspath(path)}: {error!r}. "
                "Give what `Audit.write` wrote, and read later versions with a later semu_peft."
            ) from error
        return loaded


def audit(
    request: str | None = None,
    *,
    title: str = "What was forgotten",
    model: nn.Module | None = None,
    data: Mapping[str, Any] | None = None,
    adapter_file: str | os.PathLike[str] | None = None,
    settings: Any = None,
    profile: SubspaceProfile | None = None,
    training: UnlearnResult | Mapping[str, UnlearnResult] | None = None,
    metrics: Any = None,
    attacks: Any = None,
    predictions: tuple[Predictions, Predictions] | None = None,
    class_names: Sequence[str] | None = None,
    samples: Samples | None = None,
    forgotten: int | str | Sequence[int | str] | None = None,
    digest_weights: bool = True,
    adapter_name: str = "default",
) -> Audit:
    """Put together what a person signs and another doubts: a report of one unlearning, and of what it leaves open.

    Everything is optional, and what is missing is said in the report. Data enter as digests and counts alone, except
    for `request`, the names of classes and prompts, and `samples`, which are shown.

    Args:
        request: What was asked, in words.
        title: The heading.
        model: The unlearned model, with its adapter or without: layers, ranks, norms of corrections, digests, device.
        data: Data sets by what they were for, such as `{"forget": loader, "retain": loader}`: batches, loaders, lists
            of rows, or paths.
        adapter_file: The folder that the adapter was saved to, or the file: its digest.
        settings: The objective and whatever else was set, in a dictionary; the adapter's configuration is read from
            the model.
        profile: What the initialisation returned: spectra, ranks, energies.
        training: What [`unlearn`][semu_peft.training.unlearn.unlearn] returned, or several runs by name.
        metrics: What an evaluation returned (`ForgettingMetrics`, `LanguageMetrics`, `ErasureMetrics` …), a list of one
            model's over seeds, a mapping of either by the model's name, or a
            [`ForgettingComparison`][semu_peft.evaluation.comparison.ForgettingComparison]. A mapping of numbers is a
            result too, each with its 95% interval as `(value, low, high)` where there is one.
        attacks: What attacks returned: one, several, a mapping by name, or a report with `results` and `not_run`.
        predictions: On the same examples before and after, for the confusion matrices.
        class_names: The classes' names for these.
        samples: Before and after, by the row's name: images `(N, channels, height, width)`, or what a language model
            wrote, a text or several, by the prompt. They stand in the report as they are: those of what was forgotten
            can give it away to whoever reads it.
        forgotten: What was to be forgotten, marked in the pictures: indices of classes in `predictions`, names of rows
            in `samples`, such as prompts.
        digest_weights: Digest the model's own weights, all of which are read for it.
        adapter_name: The adapter.

    Returns:
        The report.

    Raises:
        ImportError: There is something to draw, and matplotlib is not installed.
        TypeError: An argument is of another kind.
        ValueError: The model has adapters, but none of that name, or two arguments do not fit each other.
        FileNotFoundError: A path does not exist.

    Examples:
        >>> import tempfile, torch
        >>> from semu_peft.evaluation import ForgettingMetrics
        >>> from semu_peft.report import audit
        >>> forget = [(torch.randn(8, 6), torch.full((8,), 3))]
        >>> metrics = ForgettingMetrics(99.0, 98.0, 97.0, 96.0, trainable_parameters=2, total_parameters=50)
        >>> report = audit("Forget the threes.", data={"forget": forget}, metrics=metrics)
        >>> report.contents["request"]["data"]["forget"]["examples"]
        8
        >>> report.write(f"{tempfile.mkdtemp()}/report.html").name
        'report.html'
    """
    _check(request, title, model, data, profile, digest_weights, adapter_name)
    runs = _runs(training)
    marked = _marked(forgotten)
    drawn, written = read_samples(samples)
    _check_rows_are_there(marked, samples)
    measured, (attacked, not_run) = read_metrics(metrics), read_attacks(attacks)
    contents: dict[str, Any] = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "request": {
            "text": request,
            "data": {str(role): data_fingerprint(each, f"data[{role!r}]") for role, each in (data or {}).items()},
        },
        "model": model_contents(model, adapter_name, digest_weights),
        "adapter_file": file_contents(adapter_file),
        "settings": settings_contents(settings),
        "training": training_contents(runs),
        "metrics": measured,
        "attacks": attacked,
        "spectra": spectrum_contents(profile),
        "samples": list(map(str, samples[0])) if samples else [],
        "texts": [] if written is None else text_contents(*written, marked),
        "limits": list(LIMITS),
        "environment": environment_contents(model),
    }
    contents["share"] = _share(contents)
    task = read_task(measured, attacked, attacks) or task_of(contents["model"].get("class", ""))
    missed = [each for each in not_run if fits(each["attack"], task)]
    damage = ["damage"] if _with_damage(runs) else []
    missing = untested(measured, attacked, task, damage, [each["attack"] for each in missed])
    contents["task"] = task
    contents["not_tested"] = not_tested(missing, missed)
    contents["does_not_apply"] = as_reasons(each for each in not_run if each not in missed)
    pictures = [*_curves(runs, attacks), *_spectra(profile)]
    if predictions is not None:
        pictures += _confusion(predictions, class_names, [each for each in marked if isinstance(each, int)])
    if drawn is not None:
        pictures += _samples(drawn, [each for each in marked if isinstance(each, str)])
    contents["pictures"] = [{"section": each.section, "caption": each.caption, "text": each.text} for each in pictures]
    return Audit(contents, tuple(pictures))


def _check(
    request: Any, title: Any, model: Any, data: Any, profile: Any, digest_weights: Any, adapter_name: Any
) -> None:
    check_kind("request", request, (str, type(None)), "a text or None", "Say in words what was asked.")
    check_kind("title", title, str, "a text", "Give a short heading.")
    if model is not None:
        check_model(model)
    mend = "Write `{'forget': loader}`."
    check_kind("data", data, (Mapping, type(None)), "a mapping of data sets by what they were for", mend)
    mend = "Give what `initialize_semu_weights` returned."
    check_kind("profile", profile, (SubspaceProfile, type(None)), "a `SubspaceProfile` or None", mend)
    check_switch("digest_weights", digest_weights)
    check_adapter_name(adapter_name)


def _runs(training: Any) -> dict[str, UnlearnResult]:
    runs = {} if training is None else {"": training} if isinstance(training, UnlearnResult) else training
    mend = "Give what `unlearn` returned."
    check_kind("training", runs, Mapping, "an `UnlearnResult`, or several by name", mend)
    for result in runs.values():
        check_kind("training", result, UnlearnResult, "an `UnlearnResult`, or several by name", mend)
    return dict(runs)


def _with_damage(runs: Mapping[str, UnlearnResult]) -> bool:
    return any(
        is_of_retain_data(result.history)
        and result.damage_on is None
        and any("damage" in entry for entry in result.history)
        for result in runs.values()
    )


def _marked(forgotten: Any) -> list[int | str]:
    """Classes and rows that were to be forgotten."""
    several = isinstance(forgotten, Iterable) and not isinstance(forgotten, str)
    marked = [] if forgotten is None else list(forgotten) if several else [forgotten]
    mend = "Give indices of classes in `predictions`, or names of rows in `samples`."
    for each in marked:
        check_kind("forgotten", each, (int, str), "an index, a name, or several of these", mend)
    return marked


def _check_rows_are_there(marked: Sequence[int | str], samples: Samples | None) -> None:
    rows = [] if samples is None else [str(name) for name in samples[0]]
    if rows and (unknown := [name for name in marked if isinstance(name, str) and name not in rows]):
        raise ValueError(
            f"`forgotten` must name rows of `samples`, got {unknown[0]!r}, which is none of {rows[:5]}. "
            "Write it as it is there."
        )


def _share(contents: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many numbers were trained, of all: of the adapter in the model, or of the run."""
    model, training = contents["model"], contents["training"]
    if not model:
        return None
    adapter = model["adapter"]
    trained = adapter["trained_parameters"] if adapter else training[0]["trainable_parameters"] if training else None
    total = model["parameters"]
    return None if trained is None else {"trained": trained, "total": total, "percent": 100 * trained / max(1, total)}


def _curves(runs: Mapping[str, UnlearnResult], attacks: Any) -> list[Picture]:
    pictures = []
    both = {
        name: result
        for name, result in runs.items()
        if any("damage" in entry and forgetting_of(result) in entry for entry in result.history)
    }
    if both:
        caption = "Forgetting against damage"
        pictures.append(vector_picture("tradeoff", caption, lambda axes: plot_tradeoff(both, ax=axes)))
    others = {name: result for name, result in runs.items() if name not in both and has_losses(result)}
    if others:
        pictures.append(vector_picture("tradeoff", "Losses", lambda axes: plot_losses(others, ax=axes)))
    curves = [curve for name, each in flat_attacks(attacks) if (curve := AttackCurve.of(each, name)) is not None]
    for kind in dict.fromkeys((curve.kind, curve.unit) for curve in curves):
        alike = [curve for curve in curves if (curve.kind, curve.unit) == kind]
        caption = "Relearning" if kind[0] == "relearning" else "Probes of inner layers"
        pictures.append(vector_picture("attacks", caption, functools.partial(_draw_attack, alike)))
    return pictures


def _draw_attack(curves: Sequence[AttackCurve], axes: Any) -> None:
    plot_attack(curves, ax=axes)


def _spectra(profile: SubspaceProfile | None) -> list[Picture]:
    if profile is None or not profile.layers:
        return []

    def panel(number: int) -> Any:
        def draw(axes: Any) -> None:
            both = [new_figure(5, 4).subplots() for _ in range(2)]
            both[number] = axes
            plot_spectra(profile, ax=both)
            axes.set_title("", loc="left")  # the caption says it

        return draw

    height = min(9.0, max(3.8, 1.2 + 0.2 * len(profile.layers)))
    return [
        vector_picture("layers", "Spectra of the forget gradients; a dot at the last direction kept", panel(0)),
        vector_picture("layers", "Rank of each layer, of the possible rank", panel(1), height=height),
    ]


def _confusion(predictions: Any, class_names: Sequence[str] | None, forgotten: list[int]) -> list[Picture]:
    if not isinstance(predictions, tuple) or not all(isinstance(each, Predictions) for each in predictions):
        raise TypeError(
            f"`predictions` must be two `Predictions`, before and after, got {type(predictions).__name__}. Give what "
            "`predict` returned for the original model and for the unlearned one."
        )

    def panel(number: int) -> Any:
        def draw(axes: Any) -> None:
            both = [new_figure(5, 5).subplots() for _ in range(2)]
            both[number] = axes
            plot_confusion(*predictions, class_names=class_names, forgotten=forgotten, ax=both)
            axes.title.set_fontsize(8.5)  # to fit a phone

        return draw

    captions = [f"{when}: what the examples of each class were taken for, in percent" for when in ("Before", "After")]
    return [vector_picture("metrics", text, panel(number), height=5.6) for number, text in enumerate(captions)]


def _samples(images: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], forgotten: list[str]) -> list[Picture]:
    """Two pictures, which stand side by side on a desk and one above the other on a phone."""
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        for when, rows in zip(("Before", "After"), images, strict=True):
            path = Path(folder, f"{when}.png")
            text = plot_samples(rows, path, marked=forgotten, dpi=110).get_label()
            pictures.append(Picture("samples", when, f"{when}. {text}", png=path.read_bytes()))
    return pictures
