"""A class of an image classifier, or single images, for `semu unlearn images`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from .bases import classifier
from .catalogue import Job, method_of
from .estimate import Estimate, estimate_on, last_third, target_names
from .image_folder import ImageFolder, read_images, read_others
from .request import Outcome, counted, hardly_forgotten, saver

if TYPE_CHECKING:
    from semu_peft.evaluation import Predictions

# Ten times the library's: who gives no other images has most to lose, and a folder may have a handful to forget.
_PROXIMAL = 0.1
_LIKE_UNSEEN = "unseen-confidence"


@dataclass(frozen=True)
class ImageRequest:
    """An image classifier, and the folders that it is to forget, to keep, and never saw. Fields are named as the flags.

    Examples:
        >>> from semu_cli.forget_images import ImageRequest
        >>> ImageRequest.job
        'images'
    """

    job: ClassVar[Job] = "images"
    model: str
    forget: Path
    output_dir: Path
    forget_class: str | None
    retain: str | None
    test: str | None
    method: str
    max_steps: int | None
    max_retain_kl: float | None
    batch_size: int
    target_modules: str | None
    explained_variance: float
    seed: int
    adapter_name: str
    progress: bool

    def check(self) -> None:
        """Raise a usage error for a mistake that can be seen while nothing is loaded."""
        if self.max_retain_kl is not None and self.retain is None and self.test is None:
            raise typer.BadParameter("`--max-retain-kl` is measured on what is to be kept: give --retain as well.")
        if (self.method == _LIKE_UNSEEN) != (self.test is not None):
            raise typer.BadParameter(
                f"`--test` and `--method {_LIKE_UNSEEN}` go together: the model is to be as unsure of the images as of "
                "those of --test, which it was not trained on. Give both, or neither."
            )
        if self.test is not None and self.forget_class is not None:
            raise typer.BadParameter(
                f"`--method {_LIKE_UNSEEN}` is for single images of classes that stay, and `--forget-class` for one "
                "that goes. Give a folder of the images alone as --forget, or leave out --method and --test."
            )

    def estimate(self, step_seconds: float | None) -> Estimate:
        """Load model and data, and say what training would take."""
        base, data = self._read()
        loader = data.loader(self.batch_size)
        return estimate_on(base, self._targets(base), loader, len(data), self.max_steps, step_seconds)

    def train(self) -> Outcome:
        """Load model and data, and train; what is recognised is looked at before and after."""
        from peft import get_peft_model

        from semu_peft import NaturalGradient, SemuConfig, initialize_semu_weights, objectives, unlearn

        base, data = self._read()
        unseen = self._unseen(base, data)
        retain, parts = self._hold(base, data, unseen), {"forget": data, **self._others(base)}
        if unseen is not None:
            parts["test"] = unseen
        before = self._seen(base, parts)
        make = getattr(objectives, method_of(self.job, self.method).objective)
        objective = (
            make() if unseen is None else make(before["test"].confidence, forget_log_odds=before["forget"].log_odds)
        )
        config = SemuConfig(target_modules=self._targets(base), explained_variance=self.explained_variance)
        adapted: Any = get_peft_model(base, config, adapter_name=self.adapter_name)
        profile = initialize_semu_weights(
            adapted, data.loader(self.batch_size), objective, adapter_name=self.adapter_name, progress=self.progress
        )
        result = unlearn(
            adapted, data.loader(self.batch_size, shuffle=True), objective, retain=retain,
            optimizer=NaturalGradient(proximal=_PROXIMAL), max_retain_kl=self.max_retain_kl,
            max_steps=self.max_steps, seed=self.seed, progress=self.progress, adapter_name=self.adapter_name,
        )  # fmt: skip
        after = self._seen(adapted, parts)
        found = {
            f"{part}_{what}": {"before": number(before[part]), "after": number(after[part])}
            for what, number in self._numbers().items()
            for part in parts
        }
        words = self._words(len(data), found, result)
        save = saver(adapted, self.adapter_name)
        told = {**found, "examples": len(data)}
        return Outcome(profile, result, self._request(len(data)), told, words, self._then(), save)

    def _request(self, examples: int) -> str:
        """What was to be forgotten."""
        of = "" if self.forget_class is None else f" of the class `{self.forget_class}`"
        return f"Forgets {counted(examples, 'image')}{of}."

    def _read(self) -> tuple[Any, ImageFolder]:
        base = classifier(self.model)
        data = read_images(self.forget, base, only=self.forget_class)
        if self.test is None and self._names_all(data, base):
            warnings.warn(
                f"Every class of the model is to be forgotten: the folders in {self.forget} name all of them, and "
                "there is no `--forget-class`. Give one, or only the folders of what is to be forgotten.",
                stacklevel=2,
            )
        return base, data

    def _names_all(self, data: ImageFolder, base: Any) -> bool:
        """Whether folders, and not the model's own answers, say that there are images of each of its classes."""
        is_flat = all(file.parent == Path(self.forget) for file in data.files)
        return not is_flat and len(set(data.labels)) == len(base.config.id2label)

    def _targets(self, base: Any) -> Any:
        if self.target_modules is None:
            return last_third(base)
        target_names(base, self.target_modules)
        return self.target_modules

    def _others(self, base: Any) -> dict[str, ImageFolder]:
        """The images beside those of the class to forget, which are looked at and not trained on."""
        if self.forget_class is None:
            return {}
        others = read_others(self.forget, base, self.forget_class, "forget")
        return {} if others is None else {"retain": others}

    def _unseen(self, base: Any, data: ImageFolder) -> ImageFolder | None:
        """Images that no model was trained on, where those to forget are to become as unsure."""
        if self.test is None:
            return None
        unseen = read_images(self.test, base, "test")
        self._check_apart("test", self.test, unseen, data)
        return unseen

    def _hold(self, base: Any, data: ImageFolder, unseen: ImageFolder | None) -> list[Any]:
        """What is held while training: by a weight or, with a budget, by that alone. Nothing in it may be forgotten."""
        held = [] if unseen is None else [unseen]
        if self.retain is not None:
            kept = read_others(self.retain, base, self.forget_class)
            if kept is None:
                raise typer.BadParameter(
                    f"`--retain`: {self.retain} has no class but {self.forget_class!r}. Add images of others."
                )
            self._check_apart("retain", self.retain, kept, data)
            held.append(kept)
        from semu_peft import Retain
        from semu_peft.objectives import KLToOriginal

        weight = 1.0 if self.max_retain_kl is None else 0.0
        return [Retain(each.loader(self.batch_size, shuffle=True), KLToOriginal(), weight) for each in held]

    def _check_apart(self, flag: str, folder: str, images: ImageFolder, data: ImageFolder) -> None:
        both = {file.resolve() for file in images.files} & {file.resolve() for file in data.files}
        if both:
            name = ", or name the class, --forget-class" if flag == "retain" else ""
            raise typer.BadParameter(
                f"`--{flag}`: {folder} holds {len(both)} of the images to be forgotten, {min(both).name} among "
                f"them. Give a folder without them{name}."
            )

    def _seen(self, model: Any, parts: Mapping[str, ImageFolder]) -> dict[str, Predictions]:
        """What the model says of each part."""
        from semu_peft.evaluation import predict

        return {
            name: predict(model, part.loader(self.batch_size), progress=self.progress, name=f"{name} images")
            for name, part in parts.items()
        }

    def _numbers(self) -> dict[str, Callable[[Predictions], float]]:
        """What is told of each part, in percent: how many are recognised and, where that is to stay, how surely."""
        found: dict[str, Callable[[Predictions], float]] = {"accuracy": lambda seen: seen.accuracy}
        return found if self.test is None else {**found, "confidence": lambda seen: 100 * float(seen.confidence.mean())}

    def _words(self, examples: int, found: Mapping[str, Mapping[str, float]], training: Any) -> list[str]:
        """What became of the images."""
        of = found["forget_accuracy"]
        words = [
            f"{counted(examples, 'image')}: {of['before']:.1f}% were recognised before, {of['after']:.1f}% are now."
        ]
        if self.test is not None:
            return [*words, *self._words_of_unseen(found, training.steps)]
        if (others := found.get("retain_accuracy")) is not None:
            words.append(f"Images of the other classes: {others['before']:.1f}% before, {others['after']:.1f}% now.")
            if others["before"] - others["after"] > 1 and self.retain is None:
                words.append(f"To hold the others better, give them: --retain {self.forget}")
        if of["after"] > 0.9 * of["before"]:
            words.append(hardly_forgotten([], training, self.max_retain_kl, self.explained_variance))
        return words

    def _words_of_unseen(self, found: Mapping[str, Mapping[str, float]], steps: int) -> list[str]:
        """How sure the model is of the images beside those that it was not trained on."""
        sure, unseen, right = (found[name] for name in ("forget_confidence", "test_confidence", "test_accuracy"))
        words = [
            f"It was {sure['before']:.1f}% sure of them and is {sure['after']:.1f}%; of those of --test it was "
            f"{unseen['before']:.1f}% and is {unseen['after']:.1f}%.",
            f"Images of --test: {right['before']:.1f}% were recognised before, {right['after']:.1f}% are now.",
        ]
        return words if steps else [*words, "Nothing was to be done: it is as sure of what it was not trained on."]

    def _then(self) -> list[str]:
        """The command that measures what was done."""
        only = ["--forget-class", self.forget_class] if self.forget_class else []
        only += ["--test", self.test] if self.test else []
        adapted = ["--model", self.model, "--adapter", str(self.output_dir)]
        return ["semu", "evaluate", *adapted, "--forget", str(self.forget), *only]
