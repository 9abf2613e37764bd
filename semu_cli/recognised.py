"""What an image classifier recognises, for `semu evaluate`, `attack` and `audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bases import classifier, models_beside
from .image_folder import read_images, read_others


@dataclass(frozen=True)
class Recognised:
    """An image classifier, and the folders that it is judged by. Fields are named as the flags.

    Attributes:
        model: The classifier.
        adapter: The adapter, or None for the bare model.
        forget: Folder of what was to be forgotten.
        forget_class: Only this class of it; the others were to be kept.
        retain: Folder of what was to be kept.
        test: Folder of images that no model was trained on.
        reference: A model that never knew.
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
    batch_size: int = 32
    seed: int = 0
    progress: bool = True

    @property
    def files(self) -> dict[str, Any]:
        """Where the data lie, by flag; of a class to forget, where that lies."""
        only = Path(self.forget, self.forget_class or "")
        paths = {"forget": str(only) if only.is_dir() else self.forget, "retain": self.retain, "test": self.test}
        return {flag: path for flag, path in paths.items() if path is not None}

    def measured(self) -> tuple[dict[str, dict[str, float]], None]:
        """Accuracies of each model in percent and, with data of all three kinds, the membership attack's share."""
        from semu_peft.evaluation import evaluate_forgetting, predict

        rows, original = {}, None
        for name, place, own in models_beside(self.model, self.adapter, self.reference):
            base = classifier(place, own)
            original = original or base
            said: dict[str, Any] = {
                part: predict(base, data.loader(self.batch_size), progress=self.progress, name=f"{name}: {part} images")
                for part, data in self._read(base, original).items()
            }
            rows[name] = {f"{part} accuracy": each.accuracy for part, each in said.items()}
            if len(said) == 3:
                judged = evaluate_forgetting(base, **said, seed=self.seed, progress=False)
                rows[name]["membership inference"] = judged.membership_inference
        return rows, None

    def attacked(self, time_limit: float | None) -> Any:
        """All attacks that the data allow, as an `AttackReport`."""
        from semu_peft import evaluation

        base = classifier(self.model, self.adapter)
        original = base if self.adapter is None else classifier(self.model)
        batches = {part: list(data.loader(self.batch_size)) for part, data in self._read(base, original).items()}
        other = None if self.reference is None else classifier(self.reference)
        return evaluation.attack(
            base, batches["forget"], batches.get("retain"), test=batches.get("test"), reference=other,
            time_limit=time_limit, seed=self.seed, progress=self.progress,
        )  # fmt: skip

    def unlearned(self) -> Any:
        """The model with its adapter."""
        return classifier(self.model, self.adapter)

    def _read(self, base: Any, original: Any) -> dict[str, Any]:
        """The images for one of the models; what is in a folder without classes, the original says for all."""
        of = {"original": original}
        data = {
            "forget": read_images(self.forget, base, only=self.forget_class, **of),
            "retain": self._kept(base, of),
            "test": None if self.test is None else read_images(self.test, base, "test", **of),
        }
        return {part: images for part, images in data.items() if images is not None}

    def _kept(self, base: Any, of: dict[str, Any]) -> Any:
        """What was kept: the folder that is named, or the other classes of the one with the class to forget."""
        if self.retain is not None:
            return read_others(self.retain, base, self.forget_class, **of)
        return None if self.forget_class is None else read_others(self.forget, base, self.forget_class, "forget", **of)
