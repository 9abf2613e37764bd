"""Look at a pipeline while its denoiser is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from semu_peft.training.callbacks import Callback, TrainingContext


@dataclass
class Preview(Callback):
    """Call a function with the pipeline and the step before, a few times during, and after training.

    Give it last among several callbacks, so that it shows what the others leave.

    Args:
        pipe: The pipeline whose denoiser is trained.
        show: `(pipe, step)`, for example [`SampleGrids`][semu_peft.report.samples.SampleGrids].
        times: How often during training, evenly spread.

    Raises:
        TypeError: `show` cannot be called.
        ValueError: `times` is negative.

    Examples:
        >>> from torch import nn
        >>> from semu_peft.training.progress import Progress
        >>> preview = Preview("the pipeline", show=lambda pipe, step: print(pipe, "at step", step), times=1)
        >>> for step in range(1, 7):
        ...     preview.on_step_end(TrainingContext(nn.Identity(), Progress(step), total_steps=6))
        the pipeline at step 3
    """

    pipe: Any = field(repr=False)
    show: Callable[[Any, int], Any]
    times: int = 4

    def __post_init__(self) -> None:
        if not callable(self.show):
            raise TypeError(f"`show` must be a function (pipe, step), got {type(self.show).__name__}.")
        if not isinstance(self.times, int) or self.times < 0:
            raise ValueError(f"`times` must be an integer of at least 0, got {self.times!r}.")

    def on_train_begin(self, context: TrainingContext) -> None:
        self.show(self.pipe, context.progress.step)

    def on_step_end(self, context: TrainingContext) -> None:
        due = {round((number + 1) * context.total_steps / (self.times + 1)) for number in range(self.times)}
        if context.progress.step in due - {context.total_steps}:
            self.show(self.pipe, context.progress.step)

    def on_train_end(self, context: TrainingContext) -> None:
        self.show(self.pipe, context.progress.step)
