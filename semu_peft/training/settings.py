"""What a run is told, checked before anything is touched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

_COUNTS = ("epochs", "max_steps", "gradient_accumulation_steps", "checkpointing_steps", "save_total_limit")
_OPTIONAL = ("epochs", "max_steps", "checkpointing_steps", "save_total_limit")
_PATHS = ("output_dir", "resume_from_checkpoint")
_NEED_FOLDER = ("checkpointing_steps", "log_with")
_PRECISIONS = (None, "no", "fp16", "bf16", "fp8")


@dataclass(frozen=True)
class Settings:
    """The plain arguments of [`unlearn`][semu_peft.training.unlearn.unlearn], which says what they mean.

    Raises:
        ValueError: A count is not a positive integer, or something needs `output_dir`.
        TypeError: A path, the seed or a switch is of another kind.

    Examples:
        >>> Settings(epochs=0)
        Traceback (most recent call last):
        ValueError: `epochs` must be a positive integer, got 0. Give at least 1.
    """

    epochs: int | None = None
    max_steps: int | None = None
    gradient_accumulation_steps: int = 1
    mixed_precision: str | None = None
    output_dir: str | Path | None = None
    log_with: str | None = None
    checkpointing_steps: int | None = None
    resume_from_checkpoint: str | Path | None = None
    seed: int = 0
    progress: bool = True
    save_total_limit: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}. Give at least 1.")
        for name in _PATHS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise TypeError(f"`{name}` must be a path, got {value!r}. Give the folder as a string or a Path.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise TypeError(f"`seed` must be an integer of 0 or more, got {self.seed!r}. Give a number, such as 0.")
        if not isinstance(self.progress, bool):
            raise TypeError(f"`progress` must be True or False, got {self.progress!r}. It shows a progress bar.")
        if self.mixed_precision not in _PRECISIONS:
            raise ValueError(
                f"`mixed_precision` must be 'no', 'fp16', 'bf16' or None, got {self.mixed_precision!r}. Leave it out "
                "to compute in the model's own precision."
            )
        for name in _NEED_FOLDER:
            if getattr(self, name) is not None and self.output_dir is None:
                raise ValueError(f"`{name}` writes files: set `output_dir` as well.")
        if self.save_total_limit is not None and self.checkpointing_steps is None:
            raise ValueError(
                "`save_total_limit` says how many checkpoints are kept: set `checkpointing_steps` as well."
            )

    def most_batches(self, accelerator: Accelerator | None) -> int | None:
        """How many ready batches a run of `max_steps` can ask for, on all processes; None where there is no limit."""
        if self.max_steps is None:
            return None
        accumulation = accelerator.gradient_accumulation_steps if accelerator else self.gradient_accumulation_steps
        return self.max_steps * accumulation * int(os.environ.get("WORLD_SIZE", "1"))
