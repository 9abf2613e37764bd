"""Train what is trainable in a model on forget batches: the loop around an objective, on Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler
from tqdm.auto import tqdm

from semu_peft.gradients.gather import check_loss
from semu_peft.model_state import eval_mode, same_modes
from semu_peft.objectives.base import Objective
from semu_peft.tuner.layer import NotInitializedError, SemuLayer

from .batches import as_loader, batch_size, cycle, rest_of_epoch
from .checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

LossFunction = Callable[[nn.Module, Any], Tensor]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]

_RETAIN_SEED = 2**31  # keeps the draws of the two loaders apart


@dataclass
class UnlearnResult:
    """What a run did.

    Attributes:
        history: One entry a step: `step`, `epoch`, `loss` (the mean over all processes), with retain data `forget_loss`
            and `retain_loss`, and `metric` at the last step of an epoch where a metric was given.
        steps: Optimiser steps taken, those before a resume included.
        examples_seen: Forget examples seen, on all processes.
        trainable_parameters: How many numbers were trained.
        seconds: Wall time of this call.
        stopped_early: Whether the metric stopped the run.
    """

    history: list[dict[str, float]]
    steps: int
    examples_seen: int
    trainable_parameters: int
    seconds: float
    stopped_early: bool


def unlearn(
    model: nn.Module,
    batches: Iterable[Any],
    objective: LossFunction,
    *,
    retain_batches: Iterable[Any] | None = None,
    retain_objective: LossFunction | None = None,
    epochs: int = 2,
    max_steps: int | None = None,
    learning_rate: float = 3e-2,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    max_grad_norm: float | None = None,
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    accelerator: Accelerator | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    patience: int = 2,
    min_delta: float = 0.01,
    output_dir: str | Path | None = None,
    log_with: str | None = None,
    checkpointing_steps: int | None = None,
    resume_from_checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> UnlearnResult:
    """Minimise an objective over the model's trainable parameters, in place.

    Works on any PEFT adapter and on plain parameters with `requires_grad`. The model is in eval mode throughout, so
    that norm statistics stay and dropout is off; its modes come back as they were. It is left on the accelerator's
    device.

    Args:
        model: The model. A SEMU adapter must have been initialised.
        batches: The forget set: a DataLoader, or a list (or other finite iterable) of ready batches.
        objective: `(model, batch) -> scalar loss`, see [`semu_peft.objectives`].
        retain_batches: Optional retain data, gone through in a cycle, one batch a step.
        retain_objective: The loss on it, added to the objective's; weigh it as `0.5 * CrossEntropy()`.
        epochs: Passes over the forget set. The default suits thousands of examples; with few, aim at 100 steps or so.
        max_steps: Stop after this many optimiser steps.
        learning_rate: Of the default optimiser, AdamW without weight decay.
        optimizer: Another optimiser, as a factory `(parameters) -> Optimizer`.
        scheduler: A factory `(optimizer, total_steps) -> LRScheduler`, stepped after every optimiser step. By default
            the learning rate falls linearly to zero, as in transformers' Trainer.
        max_grad_norm: Clip the gradient's norm to this.
        gradient_accumulation_steps: Batches per optimiser step.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`, as Accelerate takes it.
        accelerator: An Accelerator of your own; `mixed_precision`, `gradient_accumulation_steps` and `log_with` are
            then its affair.
        metric: `(model) -> float`, higher is better, called after every epoch.
        patience: Stop after this many epochs in a row without a gain of `min_delta`.
        min_delta: The least gain that counts.
        output_dir: Folder of logs and checkpoints.
        log_with: Accelerate's tracker: `"tensorboard"`, `"wandb"`, `"all"` …
        checkpointing_steps: Write `output_dir/checkpoint-{step}` every this many steps.
        resume_from_checkpoint: A checkpoint folder, or `"latest"` in `output_dir`. A run with the same arguments then
            ends with the weights of an uninterrupted one.
        seed: Seed of what the DataLoaders draw from the global generators of torch, NumPy and Python: orders and
            augmentations.
        progress: Show a progress bar with the running losses.

    Raises:
        ValueError: There is nothing to train on or nothing to train, arguments contradict each other, or a loss is not
            finite (the weights are then those of the last good step).
        NotInitializedError: A SEMU adapter has not been initialised.
        FileNotFoundError: The checkpoint does not exist.
    """
    parameters = _trainable_parameters(model)
    _check_arguments(locals())
    started = time.perf_counter()
    own = accelerator is None
    if accelerator is None:
        accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps,
            mixed_precision=mixed_precision,
            log_with=log_with,
            project_config=ProjectConfiguration(project_dir=str(output_dir) if output_dir else None),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        )
    accumulation = accelerator.gradient_accumulation_steps
    # AdamW's weight decay would pull the core back to zero, that is, towards remembering.
    make = optimizer or (lambda trained: torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0))
    forget = as_loader(batches, "batches")
    retain = as_loader(retain_batches, "retain_batches") if retain_batches is not None else None
    # What Accelerate changes in things that are the caller's.
    bare_forward = model.__dict__.get("forward")
    samplers: list[tuple[Any, Any]] = [
        (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)) for loader in (forget, retain) if loader
    ]
    was_prepared = getattr(model, "_is_accelerate_prepared", False)
    bar: Any = None  # none of what follows may leave a trace when it fails
    bare_optimizer = make(parameters)
    prepared, optimizer_ = model, bare_optimizer
    try:
        prepared, optimizer_, forget = accelerator.prepare(model, optimizer_, forget)
        parameters = _trained(model)  # FSDP has put sharded ones in their places
        retain = accelerator.prepare(retain) if retain is not None else None
        steps_per_epoch = math.ceil(len(forget) / accumulation)
        total_steps = min(epochs * steps_per_epoch, max_steps or epochs * steps_per_epoch)
        schedule = (scheduler or _linear_decay)(bare_optimizer, total_steps)  # DeepSpeed's is no torch Optimizer
        objectives = [loss for loss in (objective, retain_objective) if isinstance(loss, Objective)]

        state = Progress()
        if resume_from_checkpoint is not None:
            folder = find_checkpoint(resume_from_checkpoint, output_dir)
            state = load_checkpoint(accelerator, folder, schedule, objectives)
        optimizer_.zero_grad()  # what the caller left in `.grad` is not ours
        if own and log_with:
            accelerator.init_trackers("semu_unlearn")
        bar = tqdm(
            total=total_steps, initial=state.step, desc="Unlearning",
            disable=not progress or not accelerator.is_local_main_process,
        )  # fmt: skip
        stopped = metric is not None and state.epochs_without_gain >= patience
        with eval_mode(model):
            retain_stream = cycle(retain, seed + _RETAIN_SEED, state) if retain is not None else None
            while state.step < total_steps and not stopped:
                losses: list[dict[str, float]] = []
                for batch in rest_of_epoch(forget, seed, state.epoch, state.batch):
                    state.batch += 1
                    last = state.batch % accumulation == 0 or state.batch == len(forget)
                    parts = {"forget_loss": objective(prepared, batch)}
                    if retain_stream is not None and retain_objective is not None:
                        parts["retain_loss"] = retain_objective(prepared, next(retain_stream))
                    for part in parts.values():
                        check_loss(part, f"batch {state.batch - 1} of epoch {state.epoch}")
                    loss = torch.stack([part.reshape(()) for part in parts.values()]).sum()
                    values = {"loss": loss.item(), **{key: part.item() for key, part in parts.items()}}
                    if not math.isfinite(values["loss"]):
                        raise ValueError(
                            f"The loss is {values['loss']} at step {state.step} (batch {state.batch - 1} of epoch "
                            f"{state.epoch}): {values}. Lower `learning_rate`, set `max_grad_norm` or check that batch."
                        )
                    losses.append(values)
                    state.examples += batch_size(batch) * accelerator.num_processes
                    # Accelerate divides by `accumulation`; a group cut short by the epoch's end is a mean as well.
                    first = (state.batch - 1) // accumulation * accumulation
                    loss = loss * (accumulation / min(accumulation, len(forget) - first))
                    if not last:
                        with accelerator.no_sync(prepared):
                            accelerator.backward(loss)
                        continue
                    accelerator.backward(loss)
                    if max_grad_norm is not None:
                        accelerator.clip_grad_norm_(parameters, max_grad_norm)
                    optimizer_.step()
                    optimizer_.zero_grad()
                    if not optimizer_.step_was_skipped:
                        schedule.step()
                    state.step += 1
                    entry = {key: sum(value[key] for value in losses) / len(losses) for key in values}
                    entry = _mean_over_processes(accelerator, entry)
                    losses.clear()
                    if retain_stream is None:
                        del entry["forget_loss"]
                    state.history.append({"step": state.step, "epoch": state.epoch, **entry})
                    bar.update()
                    bar.set_postfix({key: f"{value:.3g}" for key, value in entry.items()})
                    accelerator.log(entry, step=state.step)
                    if state.batch == len(forget):
                        state.epoch, state.batch = state.epoch + 1, 0
                        if metric is not None:
                            stopped = _judge(metric, model, state, patience, min_delta)
                            accelerator.log({"metric": state.history[-1]["metric"]}, step=state.step)
                    if checkpointing_steps and state.step % checkpointing_steps == 0:
                        save_checkpoint(accelerator, Path(output_dir or ""), state, schedule, objectives)
                    if state.step >= total_steps or stopped:
                        break
    finally:
        if bar is not None:
            bar.close()
        optimizer_.zero_grad()
        if not was_prepared:
            _unwrap(accelerator, model, prepared, bare_forward)
            _release(accelerator, prepared)
        _release(accelerator, optimizer_, forget, retain)
        for batch_sampler, sampler in samplers:
            if sampler is not None:
                batch_sampler.sampler = sampler
    if own:
        accelerator.end_training()
        accelerator.free_memory()
    return UnlearnResult(
        history=state.history,
        steps=state.step,
        examples_seen=state.examples,
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        seconds=time.perf_counter() - started,
        stopped_early=stopped,
    )


# ---- before the run ----


def _trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    for layer in model.modules():
        if isinstance(layer, SemuLayer):
            for adapter in layer.active_adapters:
                core = layer.semu_core.get(adapter)
                if core is not None and core.requires_grad and not layer.is_initialized(adapter):
                    raise NotInitializedError(adapter)
    parameters = _trained(model)
    if not parameters:
        raise ValueError(
            "`model` has no trainable parameter. An adapter loaded for inference is frozen: load it with "
            "`is_trainable=True`, or activate it with `set_adapter`."
        )
    return parameters


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]


def _check_arguments(given: dict[str, Any]) -> None:
    for name in ("epochs", "max_steps", "gradient_accumulation_steps", "checkpointing_steps", "patience"):
        value = given[name]
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if (given["retain_batches"] is None) != (given["retain_objective"] is None):
        raise ValueError("`retain_batches` and `retain_objective` belong together: give both or neither.")
    needs_folder = [name for name in ("checkpointing_steps", "log_with") if given[name] is not None]
    if given["output_dir"] is None and needs_folder:
        raise ValueError(f"`{needs_folder[0]}` writes files: set `output_dir` as well.")


def _linear_decay(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=total_steps)


# ---- during the run ----


def _mean_over_processes(accelerator: Accelerator, entry: dict[str, float]) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return entry
    values = torch.tensor(list(entry.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(entry, accelerator.reduce(values, reduction="mean").tolist(), strict=True))


def _judge(
    metric: Callable[[nn.Module], float], model: nn.Module, state: Progress, patience: int, min_delta: float
) -> bool:
    with torch.no_grad(), same_modes(model):
        value = float(metric(model))
    state.history[-1]["metric"] = value
    if value >= state.best_metric + min_delta:
        state.best_metric, state.epochs_without_gain = value, 0
    else:
        state.epochs_without_gain += 1
    return state.epochs_without_gain >= patience


def _release(accelerator: Accelerator, *objects: Any) -> None:
    """Take what this run prepared out of the accelerator, whose later checkpoints are of later runs."""
    for registry in (accelerator._models, accelerator._optimizers, accelerator._dataloaders):
        registry[:] = [item for item in registry if not any(item is released for released in objects)]


def _unwrap(accelerator: Accelerator, model: nn.Module, prepared: nn.Module, bare_forward: Any) -> None:
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)
    # Accelerate leaves a bound `forward` on the instance, which copies of the model would share with it.
    if bare_forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.forward = bare_forward
