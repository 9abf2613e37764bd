"""What Accelerate changes in things that are the caller's, and in the process, is given back when the run is over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from semu_peft.gradients.processes import processes_of_torch
from semu_peft.model_state import is_offloaded

from .parameters import leave_shards_alone
from .settings import Settings


@dataclass(frozen=True, eq=False)
class Prepared:
    """What Accelerate made of the model, the optimiser and the loaders."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    forget: DataLoader[Any]
    retain: list[DataLoader[Any]]


@contextmanager
def prepared(
    model: nn.Module,
    optimizer: Optimizer,
    forget: DataLoader[Any],
    retain: Sequence[DataLoader[Any]],
    settings: Settings,
    accelerator: Accelerator | None = None,
) -> Iterator[Prepared]:
    """Prepare everything for a run, and take it apart again on every path out.

    Given back are the model's `forward`, its mark of being prepared, gradients (None), the loaders' samplers, and the
    accelerator's lists of what it prepared. Without an accelerator the run has one of its own, with its own mixed
    precision whatever the process had; afterwards Accelerate's process-wide state is what it was.
    """
    with ExitStack() as stack:
        if accelerator is None:
            accelerator = stack.enter_context(_own_accelerator(settings))
        _check_processes(accelerator, model)
        made = stack.enter_context(_taken_apart(accelerator, model, optimizer, [forget, *retain]))
        placement = [False, None, None] if is_offloaded(model) else None
        made += accelerator.prepare(model, optimizer, forget, device_placement=placement)
        made += [accelerator.prepare(loader) for loader in retain]
        if settings.log_with and accelerator.log_with:
            accelerator.init_trackers("semu_unlearn")
        yield Prepared(accelerator, made[0], made[1], made[2], made[3:])


def _check_processes(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise where each of several processes would train a model of its own, unknown to the others."""
    processes = processes_of_torch()
    shares = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
    if processes > accelerator.num_processes and shares.isdisjoint(kind.__name__ for kind in type(model).__mro__):
        raise ValueError(
            f"`model` must be wrapped in DistributedDataParallel, got {type(model).__name__}, as this is one of "
            f"{processes} processes of torch.distributed that Accelerate does not know of: each would train a model of "
            "its own. Or start them with `torchrun` or `accelerate launch`, which tell Accelerate."
        )


@contextmanager
def _own_accelerator(settings: Settings) -> Iterator[Accelerator]:
    # Accelerate keeps one state a process, and refuses a second mixed precision in it.
    shared = (PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state)
    before = [dict(state) for state in shared]
    grouped_before = bool(before[0]) or processes_of_torch() > 0
    if settings.mixed_precision not in (None, AcceleratorState._shared_state.get("_mixed_precision")):
        AcceleratorState._shared_state.clear()
    GradientState._shared_state.clear()
    accelerator: Accelerator | None = None
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            mixed_precision=settings.mixed_precision,
            log_with=settings.log_with,
            project_config=ProjectConfiguration(project_dir=str(settings.output_dir) if settings.output_dir else None),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
        )
        yield accelerator
    finally:
        if accelerator is not None:
            _end(accelerator, with_processes=not grouped_before)
        for state, content in zip(shared, before, strict=True):
            state.clear()
            state.update(content)


def _end(accelerator: Accelerator, with_processes: bool) -> None:
    if with_processes:
        accelerator.end_training()
    else:  # the group of processes is the caller's
        for tracker in accelerator.trackers:
            tracker.finish()
    if accelerator.device.type != "cpu":
        # On a CPU nothing is cached and reference counts have freed all: a full garbage collection, which takes longer
        # than many a run, would find nothing.
        accelerator.free_memory()


@contextmanager
def _taken_apart(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loaders: Sequence[DataLoader[Any]]
) -> Iterator[list[Any]]:
    """Yield a list for what Accelerate makes of these, and undo the making afterwards, as far as it went."""
    made: list[Any] = []
    bare_forward = model.__dict__.get("forward")
    was_prepared = getattr(model, "_is_accelerate_prepared", False)
    samplers = [(each.batch_sampler, getattr(each.batch_sampler, "sampler", None)) for each in loaders]
    # In the middle of accumulating, where the caller's own loop was left, no optimiser of Accelerate takes a step.
    was_at_step, accelerator.sync_gradients = accelerator.sync_gradients, True
    try:
        yield made
    finally:
        leave_shards_alone(model)
        (made[1] if made else optimizer).zero_grad()
        if not was_prepared:
            _unwrap(accelerator, model, made[0] if made else model, bare_forward)
        _release(accelerator, [*made, *([] if was_prepared else [model])], keep=model if was_prepared else None)
        for batch_sampler, sampler in samplers:
            if sampler is not None:
                batch_sampler.sampler = sampler  # type: ignore[union-attr]
        accelerator.sync_gradients = was_at_step


def _unwrap(accelerator: Accelerator, model: nn.Module, wrapped: nn.Module, bare_forward: Any) -> None:
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)
    # Accelerate leaves a bound `forward` on the instance, which copies of the model would share with it.
    if bare_forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.forward = bare_forward


def _release(accelerator: Accelerator, objects: Sequence[Any], keep: nn.Module | None) -> None:
    """Take what this run prepared out of the accelerator, whose later checkpoints are of later runs."""
    released = [item for item in objects if item is not keep]
    for registry in (accelerator._models, accelerator._optimizers, accelerator._dataloaders):
        registry[:] = [item for item in registry if not any(item is other for other in released)]
