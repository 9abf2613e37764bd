"""What an image classifier recognises, for `semu evaluate`, `attack` and `audit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from .bases import Beside, classifier
from .estimate import Plan, weights_of
from .image_folder import read_images, read_others
from .tables import with_interval

_TOLD = {"forget_test": "forgotten test accuracy"}  # parts whose accuracy is not called as they are


@dataclass(frozen=True)
class Recognised(Beside):
    """An image classifier, and the folders that it is judged by. Fields are named as the flags.

    Attributes:
        model: The classifier.
        adapter: The adapter, or None for the bare model.
        forget: Folder of what was to be forgotten.
        forget_class: Only this class of it; the others were to be kept.
        retain: Folder of what was to be kept.
        test: Folder of images that no model was trained on; those of the forgotten class are told apart.
        reference: A model that never knew.
        related: Folder of images to relearn from instead of the forgotten ones.
        shadow: Models that were trained neither on what was forgotten nor on the test images.
        forget_examples: How many of the forgotten images an attacker has.
        batch_size: Images at a time.
        seed: Of everything drawn.
        progress: Show progress bars.

    Examples:
        >>> from semu_cli.recognised import Recognised
        >>> Recognised("my-classifier", None, "photos", forget_class="cat").files
        {'forget': 'photos'}
    """

    model: str
    adapter: Path | None
    forget: str
    forget_class: str | None = None
    retain: str | None = None
    test: str | None = None
    reference: str | None = None
    related: str | None = None
    shadow: list[str] = field(default_factory=list)
    forget_examples: int | None = None
    batch_size: int = 32
    seed: int = 0
    progress: bool = True

    @property
    def files(self) -> dict[str, Any]:
        """What is measured on, by part: a folder or, where a class of it is left out, digests of the other files."""
        kept = self.retain or (self.forget if self._of_class(self.forget) else None)
        found = {
            "forget": self._of_class(self.forget) or self.forget,
            "retain": None if kept is None else self._beside_class(kept),
            "test": None if self.test is None else self._beside_class(self.test),
            "forget_test": None if self.test is None else self._of_class(self.test),
            "related": self.related,
        }
        return {part: each for part, each in found.items() if each}

    @property
    def counts(self) -> dict[str, int]:
        """How many images there are, by part."""
        return {part: len(images) for part, images in self._of_judged.items()}

    def check(self) -> None:
        """Raise for a mistake that can be seen while nothing is loaded.

        Raises:
            ImportError: There are test images, and scikit-learn is not installed.
            typer.BadParameter: Shadow models without test images, or a model that lacks a class of the images.
        """
        if self.shadow and self.test is None:
            raise typer.BadParameter(
                "`--shadow` models are compared on images that no model was trained on: give --test as well."
            )
        if self.test is not None and find_spec("sklearn") is None:
            raise ImportError(
                'Membership attacks need scikit-learn: run `pip install ".[evaluation]"` in a clone of semu-peft.'
            )
        for flag, places in (("reference", [self.reference]), ("shadow", self.shadow)):
            for place in filter(None, places):
                self._check_classes(place, flag)

    def digests(self) -> dict[str, str | None]:
        """Of the weights of the models that it is compared with, by flag; one shadow model at a time is in memory."""
        from semu_peft.report.fingerprints import model_fingerprint

        found = {} if self.never_knew is None else {"reference": model_fingerprint(self.never_knew)}
        for number, place in enumerate(self.shadow, 1):
            there = place in self._shadow_digests
            found[f"shadow {number}"] = self._shadow_digests[place] if there else model_fingerprint(classifier(place))
        return found

    def measured(self, shows: bool) -> tuple[dict[str, dict[str, Any]], None]:
        """Accuracies of each model in percent and, with data of all three kinds, the membership attack's share.

        Each has an interval.
        """
        from semu_peft.evaluation import evaluate_forgetting, predict

        rows: dict[str, dict[str, Any]] = {}
        for name, base in self.each():
            said: dict[str, Any] = {
                part: predict(base, data.loader(self.batch_size), progress=self.progress, name=f"{name}: {part} images")
                for part, data in self._read(base).items()
            }
            rows[name] = {}
            for part, each in said.items():
                rows[name] |= with_interval(_TOLD.get(part, f"{part} accuracy"), each.accuracy, len(each))
            if {"retain", "test"} <= set(said):
                sides = {part: said[part] for part in ("forget", "retain", "test")}
                judged = evaluate_forgetting(base, **sides, seed=self.seed, progress=False)
                rows[name]["membership inference"] = judged.membership_inference
                rows[name]["membership inference interval"] = judged.membership_interval
        return rows, None

    def plan(self, measures: bool, attacks: bool, shows: bool) -> Plan:
        """What would be loaded, and measured and tried as far as it is to be."""
        data = self._of_judged
        names = [_TOLD.get(part, f"{part} accuracy") for part in data if part != "related"]
        names += ["membership inference"] if {"retain", "test"} <= set(data) else []
        shadows = {f"shadow {number}, one at a time": place for number, place in enumerate(self.shadow, 1)}
        plan = Plan({**self.places(), **shadows}, self.counts, names if measures else (), **weights_of(self.judged))
        return plan.with_attacks(self.attacked(None, dry_run=True)) if attacks else plan

    def attacked(self, time_limit: float | None, *, dry_run: bool = False) -> Any:
        """All attacks that the data allow, as an `AttackReport`; of a dry run those that would be tried."""
        from semu_peft import evaluation

        base, data = self.judged, self._of_judged
        batches: dict[str, Any] = {part: list(each.loader(self.batch_size)) for part, each in data.items()}
        return evaluation.attack(
            base, batches.pop("forget"), **batches, reference=None if dry_run else self.never_knew,
            shadow=self._stand_ins() if dry_run else self._shadows(), forget_examples=self.forget_examples,
            time_limit=time_limit, dry_run=dry_run, seed=self.seed, progress=self.progress,
        )  # fmt: skip

    @cached_property
    def _of_judged(self) -> dict[str, Any]:
        """The images for the model that is judged, related ones among them."""
        data = self._read(self.judged)
        if self.related is not None:
            data["related"] = read_images(self.related, self.judged, "related", original=self.original())
        return data

    def unlearned(self) -> Any:
        """The model with its adapter."""
        return self.judged

    def load(self, place: str, adapter: Path | None) -> Any:
        """One of the classifiers."""
        return classifier(place, adapter)

    def original(self) -> Any:
        """The classifier without an adapter, which is held: it says what is in a folder without classes."""
        return self._original

    @cached_property
    def _original(self) -> Any:
        return self.judged if self.adapter is None else self.load(self.model, None)

    @cached_property
    def _shadow_digests(self) -> dict[str, str | None]:
        """Of the shadow models that were in memory for an attack, by their places."""
        return {}

    def _stand_ins(self) -> list[tuple[Any, Any]]:
        """For a dry run, which loads no shadow model: as many predictions, of the model itself on a single image."""
        from semu_peft.evaluation import predict

        one = next(iter(self._read(self.judged)["forget"].loader(1)))
        return [(said, said) for said in [predict(self.judged, [one], progress=False)] for _ in self.shadow]

    def _shadows(self) -> list[tuple[Any, Any]]:
        """Of each shadow model its predictions of what was forgotten and of the test images; one is in memory."""
        from semu_peft.evaluation import predict
        from semu_peft.report.fingerprints import model_fingerprint

        found = []
        for number, place in enumerate(self.shadow, 1):
            model = None  # the one before makes room
            model = classifier(place)
            self._shadow_digests[place] = model_fingerprint(model)
            data = self._read(model)
            if "test" in data:
                told: dict[str, Any] = {"progress": self.progress, "name": f"shadow {number}: images"}
                sides = [predict(model, data[part].loader(self.batch_size), **told) for part in ("forget", "test")]
                found.append((sides[0], sides[1]))
        return found

    def _read(self, base: Any) -> dict[str, Any]:
        """The images for one of the models; what is in a folder without classes, the original says for all."""
        of = {"original": self.original()}
        data = {
            "forget": read_images(self.forget, base, only=self.forget_class, **of),
            "retain": self._kept(base, of),
            "test": None if self.test is None else read_others(self.test, base, self.forget_class, "test", **of),
            "forget_test": self._unseen(base),
        }
        return {part: images for part, images in data.items() if images is not None}

    def _kept(self, base: Any, of: dict[str, Any]) -> Any:
        """What was kept: the folder that is named, or the other classes of the one with the class to forget."""
        if self.retain is not None:
            return read_others(self.retain, base, self.forget_class, **of)
        return None if self.forget_class is None else read_others(self.forget, base, self.forget_class, "forget", **of)

    def _unseen(self, base: Any) -> Any:
        """The test images of the forgotten class: what relearning is measured on."""
        there = None if self.test is None else self._of_class(self.test)
        return None if there is None else read_images(str(self.test), base, "test", self.forget_class)

    def _of_class(self, path: str) -> str | None:
        """Where the class to forget lies in a folder, if it does."""
        folder = None if self.forget_class is None else Path(path, self.forget_class)
        return str(folder) if folder is not None and folder.is_dir() else None

    def _beside_class(self, path: str) -> str | list[dict[str, str]]:
        """A folder, or of one that holds the class to forget the digests of what else lies in it."""
        if self._of_class(path) is None:
            return path
        from semu_peft.files import digest_of

        folder = Path(path)
        files = [file for file in sorted(folder.glob("*/**/*")) if file.is_file()]
        others = [file for file in files if file.relative_to(folder).parts[0] != self.forget_class]
        return [{"file": file.relative_to(folder).as_posix(), "sha256": digest_of(file)} for file in others]

    def _check_classes(self, place: str, flag: str) -> None:
        """Raise a usage error unless a model knows the classes that the images are of, as far as folders name them."""
        from transformers import AutoConfig

        folder = Path(self.forget)
        if self.forget_class is None and not (folder.is_dir() and any(each.is_dir() for each in folder.iterdir())):
            return
        try:
            read_images(folder, SimpleNamespace(config=AutoConfig.from_pretrained(place)), only=self.forget_class)
        except typer.BadParameter as error:
            raise typer.BadParameter(f"`--{flag}`: {place} cannot be judged by these images. {error.message}") from None
