"""Train what is trainable in a model on forget batches: the loop around an objective, on Accelerate."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from semu_peft.arguments import check_adapter_name, check_kind, check_model, check_number
from semu_peft.model_state import eval_mode
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.retain import Retain, as_retain

from .accelerate_state import prepared
from .batches import as_loader
from .callbacks import as_callbacks
from .checkpoint import only_writer
from .loop import Loop
from .natural import Choose, NaturalGradient, choose_natural, is_natural
from .natural_loop import NaturalLoop
from .optimizers import OptimizerFactory, SchedulerFactory, default_learning_rate, make_optimizer
from .parameters import (
    check_trainable,
    empty_ones_frozen,
    leave_shards_alone,
    only_adapter_trains,
    trained_parameters,
)
from .rules import Rule, as_rules
from .settings import Settings


@dataclass(frozen=True)
class UnlearnResult:
    """What a run did.

    Attributes:
        history: One entry a step: `step`, `epoch`, `loss` (the mean over all processes), with retain data `forget_loss`
            and `retain_loss` (the weighted sum), and what callbacks have logged, such as `metric`. The values are those
            before the step. `damage` is how far the outputs on retain data are from the original's or, without any,
            the other answers to the forget data: with `max_retain_kl` or `choose`, and where the objective on these
            data asks the original anyway (`KLToOriginal` and `PreservePrediction`, `DecoupledDistillation` and
            `UnseenConfidence`, without a `reference` of their own). Natural gradients tell more: `answer_probability`,
            the mean probability of the labels; `kl`, how far the step moved the outputs; and end with one more entry,
            on the first batches, for the cores that they leave, which a callback may still move.
        steps: Optimiser steps taken, those before a resume included.
        examples_seen: Forget examples seen, on all processes.
        trainable_parameters: How many numbers were trained.
        seconds: Wall time of this call.
        stopped_early: Whether the run ended before its last step.
        stop_reason: Why it ended, in words.
        damage_on: What `damage` was looked at on, where that is neither of the two above.

    Examples:
        >>> import torch
        >>> from semu_peft import unlearn
        >>> from semu_peft.objectives import CrossEntropy
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> result = unlearn(torch.nn.Linear(4, 3), batches, CrossEntropy(), max_steps=4, progress=False)
        >>> result
        UnlearnResult(steps=4, examples_seen=32, trainable_parameters=15, seconds=..., stop_reason='all steps are done')
        >>> [entry["step"] for entry in result.history]
        [1, 2, 3, 4]
    """

    history: list[dict[str, float]] = field(repr=False)
    steps: int
    examples_seen: int
    trainable_parameters: int
    seconds: float
    stopped_early: bool = field(repr=False)
    stop_reason: str
    damage_on: str | None = field(default=None, repr=False)


def unlearn(
    model: nn.Module,
    forget: Iterable[Any],
    objective: LossFunction,
    *,
    retain: Retain | Sequence[Retain] | None = None,
    rules: Rule | Iterable[Rule] = (),
    callbacks: Any = (),
    epochs: int | None = None,
    max_steps: int | None = None,
    optimizer: NaturalGradient | OptimizerFactory | None = None,
    max_retain_kl: float | None = None,
    choose: Choose | None = None,
    learning_rate: float | None = None,
    scheduler: SchedulerFactory | None = None,
    max_grad_norm: float | None = None,
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    accelerator: Accelerator | None = None,
    output_dir: str | Path | None = None,
    log_with: str | None = None,
    checkpointing_steps: int | None = None,
    save_total_limit: int | None = None,
    resume_from_checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    adapter_name: str | None = None,
) -> UnlearnResult:
    """Minimise an objective over the model's trainable parameters, in place.

    Works on any PEFT adapter and on plain parameters with `requires_grad`. The model is in eval mode throughout, so
    that norm statistics stay and dropout is off; its modes come back as they were. It is left on the accelerator's
    device.

    Args:
        model: The model. A SEMU adapter must have been initialised.
        forget: The forget set: a DataLoader, or a list (or another iterable) of ready batches.
        objective: `(model, batch) -> scalar loss`, see [`semu_peft.objectives`].
        retain: What to keep: one [`Retain`][semu_peft.objectives.retain.Retain] or several. Each is gone through in a
            cycle, one batch a forget batch; its weighted loss is added to the objective's. Where the first batches
            share an example with the forget set, the run warns: one would undo the other.
        rules: [Rules][semu_peft.training.rules.base.Rule] that edit each step, applied in order.
        callbacks: [Callbacks][semu_peft.training.callbacks.Callback] that look on and may stop the run, such as
            [`EarlyStopping`][semu_peft.training.callbacks.EarlyStopping].
        epochs: Passes over the forget set, at most. By default as many as it takes, within 200 steps; with another
            optimiser than the natural gradient two, or more where these would be less than 100 steps.
        max_steps: Stop after this many optimiser steps. With another optimiser than the natural gradient, an iterable
            dataset without a length needs it.
        optimizer: A [`NaturalGradient`][semu_peft.training.natural.NaturalGradient] with dials of your own, or another
            optimiser as a factory `(parameters) -> Optimizer`, or `(named_parameters) -> Optimizer`, told by the
            argument's name. One that evaluates the loss itself (`torch.optim.LBFGS`) gets the same batches and random
            draws at each evaluation of a step; the history has the first. By default `NaturalGradient()` trains the
            cores of a SEMU adapter where the objectives tell what the model's outputs are, and AdamW without weight
            decay all else, or where `learning_rate` or `scheduler` is given.
        max_retain_kl: The damage that may be done: short for `NaturalGradient(max_retain_kl=...)`.
        choose: Of the points that a run by natural gradients goes through, which to leave the cores at: a function of
            the result's history, with `answer_probability` and `damage`, that returns an index of it. The last entry is
            of where the last step led, without what the history says of steps. By default the best point by the loss.
            See [`plot_tradeoff`][semu_peft.report.tradeoff.plot_tradeoff].
        learning_rate: Of AdamW. By default 3e-2, less where there are many steps.
        scheduler: A factory `(optimizer, total_steps) -> LRScheduler`, stepped after every step of AdamW or another
            optimiser with a learning rate. By default it falls linearly to zero, as in transformers' Trainer.
        max_grad_norm: Clip the gradient's norm to this, before all rules: short for `ClipGradientNorm(max_grad_norm)`.
        gradient_accumulation_steps: Batches per optimiser step.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`, as Accelerate takes it.
        accelerator: An Accelerator of your own; `mixed_precision`, `gradient_accumulation_steps` and `log_with` are
            then its affair.
        output_dir: Folder of logs and checkpoints.
        log_with: Accelerate's tracker: `"tensorboard"`, `"wandb"`, `"all"` …
        checkpointing_steps: Write `output_dir/checkpoint-{step}` every this many steps. The folder is this run's alone.
        save_total_limit: Keep this many checkpoints, the newest; all by default.
        resume_from_checkpoint: A checkpoint folder, or `"latest"`: the newest whole one in `output_dir`, and the
            beginning where there is none yet. The run ends with the weights of an uninterrupted one; a checkpoint of a
            run with other data, settings or seeds is refused.
        seed: Seed of what the DataLoaders draw from the global generators of torch, NumPy and Python: orders and
            augmentations.
        progress: Show a progress bar with the running losses.
        adapter_name: Train this adapter alone; others stay as active as they are, and frozen. By default whatever
            requires gradients is trained.

    Returns:
        History, counts and time.

    Raises:
        ValueError: There is nothing to train on or nothing to train, arguments contradict each other, or a loss is not
            finite, nor a gradient or new weight (the weights are then those of the last good step).
        TypeError: An argument is of another kind than said above.
        NotInitializedError: A SEMU adapter has not been initialised.
        FileNotFoundError: The checkpoint does not exist.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, unlearn
        >>> from semu_peft.objectives import UniformDistribution
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), SemuConfig(target_modules=["0"], r=2))
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> _ = initialize_semu_weights(model, batches, UniformDistribution(), progress=False)
        >>> result = unlearn(model, batches, UniformDistribution(), progress=False)
        >>> result.history[-1]["loss"] < result.history[0]["loss"], result.stop_reason
        (True, 'the loss no longer falls')
    """
    started = time.perf_counter()
    check_model(model)
    check_adapter_name(adapter_name, optional=True)
    if learning_rate is not None:
        check_number("learning_rate", learning_rate, low=0)
        if optimizer is not None and not is_natural(optimizer):
            warnings.warn(
                f"`learning_rate={learning_rate}` is AdamW's; what `optimizer` makes has a rate of its own. Set it "
                f"there: `optimizer=lambda cores: torch.optim.SGD(cores, lr={learning_rate})`.",
                stacklevel=2,
            )
    if accelerator is not None:
        check_kind("accelerator", accelerator, Accelerator, "an `Accelerator` or None", "Write `Accelerator()`.")
    settings = Settings(
        epochs, max_steps, gradient_accumulation_steps, mixed_precision, output_dir, log_with, checkpointing_steps,
        resume_from_checkpoint, seed, progress, save_total_limit,
    )  # fmt: skip
    loss, terms = as_objective(objective), as_retain(retain)
    rules, callbacks = as_rules(rules, max_grad_norm), as_callbacks(callbacks)
    objectives = [loss, *(as_objective(term.objective) for term in terms)]
    leave_shards_alone(model)  # a forward pass before may have put what it gathered in their places
    with only_adapter_trains(model, adapter_name):
        check_trainable(model)
        parameters = trained_parameters(model)
        precision = accelerator.mixed_precision if accelerator else mixed_precision
        natural = choose_natural(
            optimizer, model, parameters, objectives, precision, max_retain_kl,
            is_asked_for_another=learning_rate is not None or scheduler is not None, choose=choose,
        )  # fmt: skip
        loader = as_loader(forget, "forget", settings.most_batches(accelerator))
        loaders = [as_loader(term.batches, "retain", settings.most_batches(accelerator)) for term in terms]
        rate = default_learning_rate(loader, settings) if learning_rate is None else learning_rate
        other = None if natural is not None or isinstance(optimizer, NaturalGradient) else optimizer
        bare_optimizer = make_optimizer(other, parameters, rate)  # the natural gradient moves the cores itself
        with (
            empty_ones_frozen(model),
            prepared(model, bare_optimizer, loader, loaders, settings, accelerator) as everything,
            only_writer(everything.accelerator, output_dir, checkpointing_steps),
        ):
            arguments = (model, everything, loss, terms, rules, callbacks, settings)
            loop = Loop(*arguments) if natural is None else NaturalLoop(natural, choose, *arguments)
            loop.set_up(scheduler, bare_optimizer)
            # Also where a caller has switched gradients off.
            with eval_mode(model), torch.enable_grad(), _cast_anew(everything.accelerator.device.type):
                loop.train()
    return UnlearnResult(
        history=loop.progress.history,
        steps=loop.progress.step,
        examples_seen=loop.progress.examples,
        trainable_parameters=sum(parameter.numel() for parameter in loop.parameters.values()),
        seconds=time.perf_counter() - started,
        stopped_early=loop.context.control.should_stop,
        stop_reason=loop.context.control.reason if loop.context.control.should_stop else "all steps are done",
    )


@contextmanager
def _cast_anew(kind: str) -> Iterator[None]:
    """Under a caller's autocast, which would go on with its first casts of what is trained, however that moves."""
    cached = torch.is_autocast_cache_enabled()
    try:
        if torch.is_autocast_enabled(kind):
            torch.clear_autocast_cache()
            torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
