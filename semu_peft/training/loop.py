"""The loop of an unlearning run: epochs of steps, each of them losses, gradients, rules and an update."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.gradients.gather import check_loss
from semu_peft.model_state import same_modes
from semu_peft.objectives.base import Objective, as_objective
from semu_peft.objectives.distributions import answer_probability
from semu_peft.objectives.examples import examples_in
from semu_peft.objectives.original import remember_start
from semu_peft.objectives.retain import Retain
from semu_peft.objectives.wrappers import one_step

from .accelerate_state import Prepared
from .batches import batches_in, cycle, first_batches, in_steps, rest_of_epoch, retain_seed
from .callbacks import Event, TrainingContext
from .checkpoint import (
    Parts,
    check_folder,
    check_run,
    find_checkpoint,
    load_checkpoint,
    load_states,
    save_checkpoint,
)
from .fingerprint import Fingerprint, describe, describe_optimizer
from .held_batches import Pair
from .optimizers import SchedulerFactory, default_epochs, make_schedule, needs_closure
from .overlap import Overlap
from .parameters import trained_parameters
from .progress import Position, Progress
from .rules.base import Rule, Step, StepData, check_sharded
from .settings import Settings
from .step_data import gradients_of_batches

_RISE_THAT_COUNTS = 0.05  # of the loss at the start
_EXPLOSION = 1.0  # times the first loss above it: batches do not differ as much by chance

Losses = dict[str, float]


class Loop:
    """One run over prepared things; `train` reads from top to bottom.

    Args:
        model: The bare model, for callbacks.
        prepared: What Accelerate made of model, optimiser and loaders.
        objective: The loss on forget batches.
        retain: What is added to it.
        rules: What edits each step.
        callbacks: What looks on.
        settings: The rest.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: Prepared,
        objective: Objective,
        retain: Sequence[Retain],
        rules: Sequence[Rule],
        callbacks: Sequence[Any],
        settings: Settings,
    ) -> None:
        self.model, self.prepared, self.settings = model, prepared, settings
        self.accelerator, self.optimizer = prepared.accelerator, prepared.optimizer
        self.objectives = [objective, *(as_objective(term.objective) for term in retain)]
        self.weights = [term.weight for term in retain]
        self.rules, self.callbacks = rules, callbacks
        self.accumulation = self.accelerator.gradient_accumulation_steps
        self.parameters = trained_parameters(model)  # FSDP has put sharded ones in their places
        check_sharded(rules, self.parameters)
        self.progress = Progress(retain=[Position() for _ in retain])
        self.overlap = Overlap()
        self.without_gradient: list[str] | None = None  # what the first backward pass did not reach
        self.epochs, total_steps = self._length()
        self.context = TrainingContext(model, self.progress, total_steps, track=self.accelerator.log)

    def _length(self) -> tuple[float, int]:
        """How many epochs there are at most, and how many steps."""
        batches, most = batches_in(self.prepared.forget), self.settings.max_steps
        if batches is not None:
            epochs = self.settings.epochs or default_epochs(batches, self.accumulation)
            steps = epochs * math.ceil(batches / self.accumulation)
            return epochs, min(steps, most or steps)
        if most is None:
            raise ValueError("`forget` is an iterable dataset without a length: say in `max_steps` how long to train.")
        return self.settings.epochs or math.inf, most

    def set_up(self, scheduler: SchedulerFactory | None, bare_optimizer: torch.optim.Optimizer) -> None:
        """Make the schedule, and go to where a checkpoint left off where there is one to resume from.

        Raises:
            ValueError: The checkpoint does not fit, or an optimiser with a closure is to run in fp16.
            FileNotFoundError: There is no such checkpoint.
        """
        self.evaluates_again = needs_closure(bare_optimizer)
        if self.evaluates_again and self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                f"`mixed_precision` must be 'no' or 'bf16' with {type(bare_optimizer).__name__}, got 'fp16'. It takes "
                "several evaluations a step, which loss scaling does not allow: use 'bf16'."
            )
        described = describe_optimizer(bare_optimizer)  # before a schedule changes its learning rate
        # DeepSpeed's optimiser is no torch Optimizer.
        self.schedule = make_schedule(scheduler, bare_optimizer, self.context.total_steps)
        remember_start(self.model)  # before it is trained: the original of an adapter whose start splits the weight
        self._resume(described)
        self.saved = self.progress.step  # the last step that a checkpoint is of
        self.optimizer.zero_grad()  # what the caller left in `.grad` is not ours

    def _resume(self, described_optimizer: Any) -> None:
        """Go to where a checkpoint of this run left off; one of another run is refused before anything is loaded."""
        given, folder = self.settings.resume_from_checkpoint, self.settings.output_dir
        checkpoint = None if given is None else find_checkpoint(given, folder)
        if checkpoint is None and self.settings.checkpointing_steps is None:
            return
        begun = load_states(checkpoint)["progress"][0] if checkpoint else self.progress.state_dict()
        self.run = self._fingerprint(described_optimizer, begun)
        if self.accelerator.is_main_process:  # the others have other first batches
            if checkpoint is not None:
                check_run(checkpoint, self.run)
            if self.settings.checkpointing_steps is not None and folder is not None:
                check_folder(folder, self.run)
        if checkpoint is not None:
            load_checkpoint(self.accelerator, checkpoint, self._parts())

    def _fingerprint(self, described_optimizer: Any, begun: Mapping[str, Any]) -> Fingerprint:
        loaders = [self.prepared.forget, *self.prepared.retain]
        starts = zip(loaders, self._seeds(), [begun["forget"], *begun["retain"]], strict=False)
        firsts = []
        for loader, seed, at in starts:
            with first_batches(loader, seed, at["first_generators"]) as batches:
                firsts.append(next(batches, None))
        forget, *retain = firsts
        return {
            "seed": self.settings.seed,
            "steps": self.context.total_steps,
            "gradient_accumulation_steps": self.accumulation,
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "objective": describe(self.objectives[0]),
            "retain": describe(list(zip(self.weights, self.objectives[1:], strict=True))),
            "rules": describe(list(self.rules)),
            "optimizer": described_optimizer,
            "schedule": type(self.schedule).__qualname__,
            "batches": [batches_in(loader) for loader in loaders],
            "first batch of forget": describe(forget),
            "first batch of retain": describe(retain),
        }

    def _seeds(self) -> list[int]:
        """The seeds of the loaders: of the forget batches, then of each retain loader."""
        seed = self.settings.seed
        return [seed, *(retain_seed(seed, index) for index in range(len(self.prepared.retain)))]

    def _parts(self) -> Parts:
        return {
            "progress": [self.progress],
            "schedules": [self.schedule],
            "objectives": self.objectives,
            "rules": self.rules,
            "callbacks": self.callbacks,
        }

    # ---- the run ----

    def train(self) -> None:
        """Take all steps that are left.

        Raises:
            ValueError: A loss is no finite scalar with a gradient, or there are no batches any more.
        """
        self._call("on_train_begin")
        with self._progress_bar() as self.bar, ExitStack() as streams:
            self.retained = [streams.enter_context(closing(stream)) for stream in self._retain_streams()]
            while not self._is_over():
                self._train_epoch()
        self._end()
        self._call("on_train_end")  # so that a callback has the last word

    def _end(self) -> None:
        """Say so where an optimiser with a rate did not do what it was for."""
        losses = [entry["loss"] for entry in self.progress.history]
        if not losses:
            return  # a callback had it stop before the first step
        few = max(1, len(losses) // 10)
        start, end = sum(losses[:few]) / few, sum(losses[-few:]) / few
        if end > losses[0] + _EXPLOSION * abs(losses[0]):  # which the mean of the first steps may be a part of
            start = losses[0]
        steady = all(objective.is_steady for objective in self.objectives)
        if steady and len(losses) > 1 and end > start + _RISE_THAT_COUNTS * abs(start):
            warnings.warn(
                f"The loss ended at {end:.4g}, above its start of {start:.4g}. Lower `learning_rate`, or train cores "
                "without one, by `optimizer=NaturalGradient()`, which keeps no step that raises the loss.",
                stacklevel=4,
            )
        if self.without_gradient:
            warnings.warn(
                f"{self.without_gradient[:3]} ({len(self.without_gradient)} in all) had no gradient and stayed as they "
                "were: the loss does not depend on them. Leave these layers out of the adapter.",
                stacklevel=4,
            )

    def _retain_streams(self) -> list[Generator[Any, None, None]]:
        loaders = zip(self.prepared.retain, self._seeds()[1:], self.progress.retain, strict=True)
        return [cycle(loader, seed, at) for loader, seed, at in loaders]

    def _is_over(self) -> bool:
        over = self.progress.step >= self.context.total_steps or self.progress.forget.epoch >= self.epochs
        return over or self.context.control.should_stop

    def _train_epoch(self) -> None:
        at, before = self.progress.forget, self.progress.step
        with closing(rest_of_epoch(self.prepared.forget, self.settings.seed, at)) as batches:
            for group, is_last in in_steps(batches, self.accumulation):
                self._train_step(group)
                self._call("on_step_end")
                if is_last:
                    at.next_epoch()
                    self._call("on_epoch_end")
                self._save()
                if self._is_over():
                    return
        if self.progress.step == before:
            raise ValueError(
                f"`forget` gave no batch in epoch {at.epoch} after the {at.batch} seen before. Check that it gives its "
                "batches anew for each epoch, and resume with the data of the interrupted run."
            )

    def _train_step(self, batches: list[Any]) -> None:
        together = self._with_retained(batches)
        step = self._start_step(self._data_of(together))
        update = self._update_again_and_again if self.evaluates_again else self._update
        with one_step():
            losses = update(step, together)
            if not self.optimizer.step_was_skipped:
                self._apply(step, "update")
        if not self.optimizer.step_was_skipped:
            self._check_weights(step)
            self.schedule.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.forget.batch += len(batches)
        self.progress.examples += examples_in(batches) * self.accelerator.num_processes
        self._record(losses)

    def _with_retained(self, batches: list[Any]) -> list[Pair]:
        """The forget batches of a step, each with the next batch of each retain set."""
        together = [(batch, [next(stream) for stream in self.retained]) for batch in batches]
        self.overlap.look(together)
        return together

    def _start_step(self, data: StepData | None) -> Step:
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return Step(self.progress.step, self.model, self.parameters, before, self.optimizer, data)

    def _data_of(self, batches: list[tuple[Any, list[Any]]]) -> StepData | None:
        """What rules may ask of these batches; nothing is worked out before they do."""
        if not self.rules:
            return None
        count, first = len(batches), self.progress.forget.batch

        def losses() -> Iterator[Tensor]:
            for number, (batch, retained) in enumerate(batches):
                yield torch.stack(list(self._losses(batch, retained, first + number).values())).sum() / count

        drawn = [objective.state_dict() for objective in self.objectives]
        return gradients_of_batches(
            self.parameters, self.prepared.model, self.objectives, self.weights, drawn, batches, losses
        )

    def _update(self, step: Step, batches: list[tuple[Any, list[Any]]]) -> Losses:
        losses = self._backward(step, batches)
        self.optimizer.step()
        return losses

    def _update_again_and_again(self, step: Step, batches: list[tuple[Any, list[Any]]]) -> Losses:
        """A step of an optimiser that evaluates the loss itself, always with the same batches and random draws."""
        evaluations: list[Losses] = []
        drawn = [objective.state_dict() for objective in self.objectives]

        def evaluate() -> Tensor:
            for objective, state in zip(self.objectives, drawn, strict=True):
                objective.load_state_dict(state)
            self.optimizer.zero_grad()
            evaluations.append(self._backward(step, batches))
            return torch.tensor(self._mean_over_processes(evaluations[-1])["loss"])

        try:
            self.optimizer.step(evaluate)
        except BaseException:
            _set(self.parameters, step.before)  # it fails between two evaluations, where no good step ends
            raise
        return evaluations[0]

    # ---- one step ----

    def _backward(self, step: Step, batches: list[tuple[Any, list[Any]]]) -> Losses:
        """Leave the gradient of the mean loss over the batches of a step in `.grad`, and return the mean losses."""
        losses = []
        for number, (batch, retained) in enumerate(batches):
            parts, told = self._measure(batch, retained, self.progress.forget.batch + number)
            loss = torch.stack(list(parts.values())).sum()
            losses.append(self._checked(loss, {**parts, **told}, self.progress.forget.batch + number))
            # Accelerate divides by `accumulation`; a group cut short by the epoch's end is a mean as well.
            loss = loss * (self.accumulation / len(batches))
            if number < len(batches) - 1:
                with self.accelerator.no_sync(self.prepared.model):
                    self.accelerator.backward(loss)
            else:
                self.accelerator.backward(loss)
        if self.without_gradient is None:
            self.without_gradient = [name for name, each in self.parameters.items() if each.grad is None]
        self._check_gradients(step)
        self._apply(step, "gradients")
        return {key: sum(each[key] for each in losses) / len(losses) for key in losses[0]}

    def _losses(self, batch: Any, retained: list[Any], number: int) -> dict[str, Tensor]:
        return self._measure(batch, retained, number)[0]

    def _measure(self, batch: Any, retained: list[Any], number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses that add up to that of the step; and where the damage is known, that beside the forgetting."""
        model, where = self.prepared.model, f"batch {number} of epoch {self.progress.forget.epoch}"
        objective, *keep = self.objectives
        if batch is None:
            raise TypeError(f"`forget` must give batches, got None as {where}. Leave out what a `collate_fn` dropped.")
        forget = objective.measure(model, batch)
        parts, told = {"forget_loss": _scalar(forget.loss, where)}, [forget]
        if retained:
            pairs = zip(self.weights, keep, retained, strict=True)
            # What weighs nothing is there for rules alone.
            kept = [(weight, objective.measure(model, each)) for weight, objective, each in pairs if weight]
            terms = [weight * _scalar(each.loss, f"the retain data beside {where}") for weight, each in kept]
            parts["retain_loss"] = torch.stack(terms).sum() if terms else torch.zeros_like(parts["forget_loss"])
            told = [each for _, each in kept]
        damages = [each.damage for each in told if each.damage is not None]
        if not damages:
            return parts, {}
        answer = answer_probability(forget.outputs)
        return parts, {"damage": torch.stack(damages).mean()} | (
            {} if answer is None else {"answer_probability": answer}
        )

    def _checked(self, loss: Tensor, parts: dict[str, Tensor], number: int) -> Losses:
        values = {"loss": loss.item(), **{key: part.item() for key, part in parts.items()}}
        self._check_finite(values, number)
        return values

    def _check_finite(self, values: Losses, number: int) -> None:
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"The loss is {values['loss']} at step {self.progress.step} (batch {number} of epoch "
                f"{self.progress.forget.epoch}): {values}. Lower `learning_rate`, set `max_grad_norm` or check that "
                "batch."
            )

    def _check_gradients(self, step: Step) -> None:
        # In fp16 Accelerate scales the loss, and passes over the steps whose scaled gradient overflows.
        if getattr(self.accelerator, "scaler", None) is None and not self._all_finite(step.gradients.values()):
            raise ValueError(self._not_finite("a gradient"))

    def _check_weights(self, step: Step) -> None:
        if not self._all_finite(self.parameters.values()):
            _set(self.parameters, step.before)
            raise ValueError(self._not_finite("a weight that the optimiser or a rule made"))

    def _not_finite(self, what: str) -> str:
        at = self.progress.forget
        return (
            f"{what.capitalize()} is not finite at step {self.progress.step} (batch {at.batch} of epoch {at.epoch}), "
            "though the loss is. The weights are those before that step. Lower `learning_rate`, set `max_grad_norm`, "
            "or look for a root, quotient or logarithm in `objective` whose derivative is infinite there."
        )

    def _all_finite(self, tensors: Iterable[Tensor]) -> bool:
        found = [torch.isfinite(_local(tensor)).all().to(self.accelerator.device) for tensor in tensors]
        wrong = (~torch.stack(found)).any().float() if found else torch.zeros((), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:  # each may hold a part of its own
            wrong = self.accelerator.reduce(wrong, reduction="sum")
        return not wrong.item()

    def _apply(self, step: Step, method: str) -> None:
        if self.rules and method == "gradients":
            self.accelerator.unscale_gradients()
        with torch.no_grad():
            for rule in self.rules:
                getattr(rule, method)(step)

    # ---- what is told about it ----

    def _record(self, losses: Losses) -> None:
        entry = self._mean_over_processes(losses)
        if not self.weights:
            del entry["forget_loss"]
        self._enter_into_history(entry)
        self.bar.update()
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in entry.items()})
        self.accelerator.log(entry, step=self.progress.step)

    def _enter_into_history(self, values: Losses) -> None:
        self.progress.history.append(self._entry(values))

    def _entry(self, values: Losses) -> Losses:
        return {"step": self.progress.step, "epoch": self.progress.forget.epoch, **values}

    def _mean_over_processes(self, losses: Losses) -> Losses:
        if self.accelerator.num_processes == 1:
            return dict(losses)
        values = torch.tensor(list(losses.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(losses, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))

    def _progress_bar(self) -> Any:
        return tqdm(
            total=self.context.total_steps, initial=self.progress.step, desc="Unlearning",
            disable=not self.settings.progress or not self.accelerator.is_local_main_process,
        )  # fmt: skip

    def _call(self, event: Event) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                with torch.no_grad(), same_modes(self.model):
                    method(self.context)

    def _save(self) -> None:
        every, folder = self.settings.checkpointing_steps, self.settings.output_dir
        if every and folder is not None and self.progress.step // every > self.saved // every:
            self.saved = self.progress.step
            keep = self.settings.save_total_limit
            save_checkpoint(self.accelerator, folder, self.progress.step, self._parts(), self.run, keep)


@torch.no_grad()
def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _local(tensor: Any) -> Tensor:
    values = tensor.detach()
    values = values.to_local() if hasattr(values, "to_local") else values
    return values.coalesce().values() if values.is_sparse else values


def _scalar(loss: Any, where: str) -> Tensor:
    check_loss(loss, where)
    return loss.reshape(())
