"""The loop of natural-gradient steps: each is tried, judged by what it did, and kept or taken back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.optim import Optimizer

from semu_peft.gradients.core_rows import catch_core_rows
from semu_peft.gradients.processes import mean_of_numbers, processes_of_torch, rows_elsewhere
from semu_peft.objectives.base import Evaluation
from semu_peft.objectives.distributions import probe
from semu_peft.objectives.examples import count_examples, examples_in
from semu_peft.objectives.replica import eagerly
from semu_peft.objectives.wrappers import one_step

from .batches import batches_in
from .curvature import Probe, WholeMatrix
from .curvature_choice import Refresh, curvature_and_control, is_whole_matrix, slots_of
from .ends import Ends
from .fingerprint import Fingerprint, describe
from .first_look import check_data, check_first_look, check_shards
from .flat_cores import FlatCores
from .held_batches import ENOUGH_EXAMPLES
from .looks import Looks
from .loop import Loop, Losses
from .natural import Choose, NaturalGradient, trained_cores
from .optimizers import SchedulerFactory
from .pressure import Pressure
from .proximal import Proximal
from .rules.base import Step, StepData
from .step_control import LevenbergMarquardt, Outcome
from .step_data import gradients_of_terms
from .stopping import (
    ALREADY_FORGOTTEN,
    AT_MINIMUM,
    FORGOTTEN,
    LAST_FORGOTTEN,
    NO_LONGER_IMPROVES,
    NOT_FINITE,
    Stopping,
)
from .trials import Term, Trials, Tried

_MOST_STEPS = 200  # a run ends by itself long before; this bounds one that crawls
_MOST_TRIALS = 12  # of one step
_MOST_PROBES = 4  # passes for the curvature of one batch, each with a random seed an example
_NEGLIGIBLE = 1e-3  # of the tolerance: the fall of a step that is not worth its trial


class NaturalLoop(Loop):
    """One run by natural gradients, see [`NaturalGradient`][semu_peft.training.natural.NaturalGradient].

    Args:
        natural: The dials.
        choose: Which point of the run to end at, if not the best.
        arguments: Those of `Loop`.
    """

    def __init__(self, natural: NaturalGradient, choose: Choose | None, *arguments: Any) -> None:
        self.natural = natural
        super().__init__(*arguments)
        found = trained_cores(self.model, self.parameters)
        assert found is not None  # as `why_not_natural` found nothing
        self.adapter_name, cores = found
        self.runner = extract_model_from_parallel(self.prepared.model)
        self.layers = {name: layer for name, (layer, _) in cores.items()}
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        # Also where torch alone knows of the processes, in a wrapper that the caller has made.
        self.processes = processes_of_torch() or self.accelerator.num_processes
        self.cores = FlatCores(self.model, {name: core for name, (_, core) in cores.items()}, self.processes)
        self.trials = Trials(
            self.runner, self.objectives, self.weights, self.adapter_name, limit=natural.max_retain_kl,
            measures_damage=natural.max_retain_kl is not None or choose is not None,
            # Not a method of this loop, which would then be freed by the next garbage collection only.
            mean_over_processes=partial(mean_of_numbers, processes=self.processes, device=self.cores.device),
        )  # fmt: skip
        self.rank = torch.distributed.get_rank() if processes_of_torch() else self.accelerator.process_index
        turns = math.lcm(*(objective.turns for objective in self.objectives))
        self.stopping = Stopping(natural, self.objectives[0], has_retain_data=bool(self.weights), turns=turns)
        self.looks = Looks(self.prepared, self.progress, self._seeds(), self.objectives, self.trials)
        self.refresh = Refresh()  # until a curvature is chosen
        self.pressure = Pressure(natural.max_retain_kl)
        self.best = self.cores.place()
        self.proximal = Proximal(self.best)
        self.start_values: dict[str, float] = {}  # the losses where the run began, on the held batches
        self.remembered: list[int] = []  # places of forget batches that were found so when others were not
        self.choose = choose
        self.path: list[Tensor] = []  # where each entry of the history was measured; kept for `choose` alone
        self.first_draws: list[Any] = []
        self._restored: Mapping[str, Any] | None = None

    def _length(self) -> tuple[float, int]:
        epochs, most = self.settings.epochs, self.settings.max_steps
        if epochs is None or batches_in(self.prepared.forget) is None:
            return epochs or math.inf, most or _MOST_STEPS
        return epochs, most or epochs * self._steps_of_epoch() * LevenbergMarquardt.updates_a_batch

    def set_up(self, scheduler: SchedulerFactory | None, bare_optimizer: Optimizer) -> None:
        self.first_draws = [objective.state_dict() for objective in self.objectives]
        super().set_up(None, bare_optimizer)

    def _fingerprint(self, described_optimizer: Any, begun: Mapping[str, Any]) -> Fingerprint:
        steps = self.settings.max_steps or _MOST_STEPS  # as of versions that kept to these with `epochs` too
        own = {"steps": steps, "choose": describe(self.choose)}
        return {**super()._fingerprint(describe(self.natural), begun), **own}

    def _parts(self) -> Any:
        return {**super()._parts(), "natural": [self]}

    # ---- the run ----

    def train(self) -> None:
        check_shards(batches_in(self.prepared.forget), self._mean_over_processes)
        with ExitStack() as stack:
            stack.enter_context(eagerly(self.runner))  # the curvature is made of what hooks see
            self.caught = stack.enter_context(catch_core_rows(self.runner, self.layers, self.adapter_name))
            self.slots = slots_of(self.cores.by_layer, self.caught)
            if self._restored is not None:
                self._choose_curvature(is_whole=self._restored["is_whole"])
                self.curvature.load_state_dict(self._restored["curvature"])
                self.control.load_state_dict(self._restored["control"])
            # What an objective takes as given of the model is that of the start, in a resumed run as well.
            with self.cores.at(self.proximal.start):
                self.held = self.looks.held(self.first_draws, self.stopping.turns, self.remembered)
            if self.held and not self.start_values:
                self._look_at_start(self.trials.evaluate(self.held, with_gradient=False))
            super().train()

    def _end(self) -> None:
        """Leave the best cores; say so where those are the ones that the run began with."""
        if not self.held:
            return
        self._leave_the_best()
        done_already = (ALREADY_FORGOTTEN, AT_MINIMUM[ALREADY_FORGOTTEN])
        tried = self.progress.step and self.context.control.reason not in done_already
        if self.choose is None and tried and torch.equal(self.cores.place(), self.proximal.start):
            mend = "a `learning_rate`, by which AdamW trains"
            if self.natural.max_retain_kl is not None:
                mend = "a larger `max_retain_kl`"
            elif self.natural.kl < NaturalGradient.kl:
                mend = "a larger `kl`"
            warnings.warn(
                "No step lowered the loss over the first batches of the run, so the adapter is as it was before. Give "
                f"more examples in a batch, or {mend}.",
                stacklevel=5,
            )

    def _look_at_start(self, start: Tried) -> None:
        check_first_look(start, self.objectives[0], self.natural.max_retain_kl)
        before = self.trials.damage_weight
        self.trials.weigh_damage(self.stopping.unit(start.values["forget_loss"]))
        loss = start.values["loss"] + (self.trials.damage_weight - before) * start.damage
        self.start_values = {**start.values, "loss": loss}
        self.stopping.begin(self.start_values)
        kind, mean = self.natural.curvature, self._mean_over_processes
        self._choose_curvature(is_whole=is_whole_matrix(kind, self.slots, start, mean))
        batches, enough = batches_in(self.prepared.forget), self.stopping.tolerated(start.values["loss"])
        if batches is None or not self.stopping.is_forgotten(start.values, enough):
            return  # a stream's first batch may say little of the others

        def is_left(values: Losses) -> bool:
            return not self.stopping.is_forgotten(values, enough)

        held = {id(term.batch) for term in self.held if term.is_forget}
        if len(held) >= batches or self.looks.find_forget_batch(is_left) is None:
            self._stop(ALREADY_FORGOTTEN)

    def _choose_curvature(self, *, is_whole: bool) -> None:
        # Outputs in a unit of their own may be squared errors of millions away, which no step would get anywhere near.
        kl = self.natural.kl * max(self.stopping.unit(self.stopping.start_forget_loss), 1.0)
        self.curvature, self.control = curvature_and_control(
            replace(self.natural, kl=kl),
            self.slots,
            self.cores.device,
            is_whole=is_whole,
            enough=self.stopping.enough(),
        )
        self.refresh = Refresh.of(self.natural, self._steps_of_epoch(), is_whole=is_whole)

    def _steps_of_epoch(self) -> int:
        """How many groups of batches the forget data give in one pass; 0 of a stream."""
        return math.ceil((batches_in(self.prepared.forget) or 0) / self.accumulation)

    def _train_step(self, batches: list[Any]) -> None:
        together = self._with_retained(batches)
        with one_step():
            terms = [term for pair in together for term in self.trials.terms(*pair)]
        here = self._evaluate(terms, self.progress.step)
        if not math.isfinite(here.values["loss"]):
            check_data(self._values_at(self.proximal.start, terms), self.progress.forget, len(batches))
            return self._give_up()  # an ascent has gone as far as numbers do
        if not self.held:  # a stream, of which nothing could be looked at beforehand
            self.held = terms
            if self.start_values:  # resumed, in the middle of it
                self.start_values = self._values_at(self.proximal.start)
            else:
                self._look_at_start(here)
            here = self._evaluate(terms, self.progress.step)
        remembered = self._follow(here, examples_in(batches) * self.accelerator.num_processes)
        if remembered is not None:
            self._hold(remembered)
            here = self._evaluate(terms, self.progress.step)
        updates = self.control.updates_a_batch
        for update in range(updates):
            if self.context.control.should_stop or self.progress.step >= self.context.total_steps:
                break
            last = update == updates - 1
            here = self._update_cores(terms, here, keep_graph=not last)
        self.optimizer.zero_grad()
        self.progress.forget.batch += len(batches)
        self.progress.examples += examples_in(batches) * self.accelerator.num_processes

    def _follow(self, here: Tried, examples: int) -> int | None:
        """Keep the best cores by the running loss, and stop where it has come to its end, or falls no more.

        Batches may come in an order, so that a few of them say nothing of others: where one is found that is still
        remembered, its place is returned, and the run goes on.
        """
        place = self.cores.place()
        if self.stopping.follow(here.values["loss"] + self.proximal.at(place)):
            self.best = place
        batches = batches_in(self.prepared.forget)
        patience = self.stopping.patience(examples, batches, is_exact=isinstance(self.curvature, WholeMatrix))
        in_a_row, is_endless = min(2, batches or 2), self.objectives[0].minimum is None
        if batches is None and not is_endless:  # the rest of a stream cannot be looked at
            in_a_row = math.ceil(ENOUGH_EXAMPLES / examples)
        stretch = self.control.patience
        found = self.stopping.reason(here.values, patience=patience, forgotten_in_a_row=in_a_row, stretch=stretch)
        if found is None:
            return None
        remembered = self._find_remembered(found, batches or 0)
        if remembered is None:
            self._stop(found)
        elif is_endless:  # it would go on and on with what is forgotten
            self._stop(LAST_FORGOTTEN)
        else:
            return remembered
        return None

    def _find_remembered(self, reason: str, batches: int) -> int | None:
        """Look for a batch that is still remembered where a run would end by batches that say nothing of it."""
        is_of_few = reason == FORGOTTEN and self.stopping.forgotten_batches < batches
        if reason == NO_LONGER_IMPROVES:
            is_of_few = not self.progress.forget.epoch and self.stopping.has_fallen()
        if not is_of_few or not batches:
            return None
        found = self.looks.find_forget_batch(self.stopping.is_remembered)
        if found is not None and reason == FORGOTTEN and not self.remembered:
            warnings.warn(
                f"The last batches are forgotten, and batch {found} of the forget data is not. Shuffle them, or take "
                "larger ones, so that each is like the others: what one takes away may come back with the next.",
                stacklevel=8,
            )
        return found

    def _hold(self, place: int) -> None:
        """Compare the cores on this batch as well from here on, and go on for one more pass at least."""
        self.remembered = sorted({*self.remembered, place})
        with self.cores.at(self.proximal.start):
            self.held = self.looks.held(self.first_draws, self.stopping.turns, self.remembered)
        self.start_values = self._values_at(self.proximal.start)
        self.stopping.wait(self._steps_of_epoch())

    def _give_up(self) -> None:
        self.cores.move_to(self.best)
        self._stop(NOT_FINITE)

    def _stop(self, reason: str) -> None:
        if reason == FORGOTTEN and torch.equal(self.cores.place(), self.proximal.start):
            reason = ALREADY_FORGOTTEN
        if not self.objectives[0].forgets:
            reason = AT_MINIMUM.get(reason, reason)
        self.context.control.stop(reason)

    def _leave_the_best(self) -> None:
        """End with the best cores seen, by the loss on the batches that the start was measured on; or at the choice."""
        last = self.cores.place()
        ends = Ends(self.proximal, self.start_values, self._values_at, self.natural.max_retain_kl)
        if self.choose is None:
            end, values = ends.best([self.best, last])
        else:  # the last place was measured nowhere yet
            history = [*self.progress.history, self._entry(self._values_at(last))]
            end, values = ends.chosen(self.choose, [*self.path, last], history)
        self.cores.move_to(end)
        self._enter_into_history(values)

    def _values_at(self, place: Tensor, terms: list[Term] | None = None) -> Losses:
        """What the model does there with the held batches, or others."""
        with self.cores.at(place):
            return self.trials.evaluate(self.held if terms is None else terms, with_gradient=False).values

    # ---- one step ----

    def _update_cores(self, terms: list[Term], here: Tried, *, keep_graph: bool) -> Tried:
        """Try steps from here until one is good, and go there; where none is, stay."""
        step = self._start_step(self._data_at(terms))
        start = self.cores.place()
        is_due = self.refresh.is_due(self.progress.step)
        # FSDP's graph cannot be gone through twice.
        loss = here.loss + self._pressed() * here.spent if self._pressed() else here.loss
        gradient = self.cores.mean_over_processes(
            self.cores.gradient_of(loss, retain_graph=is_due and not self.cores.is_sharded)
        )
        probes = self._probes(here) if is_due else []
        if not self._all_finite([gradient, *(probe.gradient for probe in probes)]):
            # Attention's gradient may overflow where its outputs do not.
            if not self.progress.step:
                raise ValueError(self._not_finite("a gradient"))
            self._give_up()
            return here
        if is_due:
            self.curvature.observe(probes)
            if isinstance(self.curvature, WholeMatrix) and not self.retained:
                self.proximal.strengthen(self.natural.proximal_under(self.objectives[0]) * self.curvature.scale)
                if self._is_too_far(start):
                    return self._start_again(terms, keep_graph=keep_graph)
        gradient = self._under_rules(step, gradient) + self.proximal.gradient(start)
        tried, kl = self._first_good(step, here, terms, start, gradient, keep_graph=keep_graph)
        self.progress.step += 1
        if self.choose is not None:
            self.path.append(start)
        self._record({**here.values, "kl": kl, **self.control.told()})
        return tried

    def _first_good(
        self, step: Step, here: Tried, terms: list[Term], start: Tensor, gradient: Tensor, *, keep_graph: bool
    ) -> tuple[Tried, float]:
        """Go to the first good place that is proposed, or stay; with how far the outputs moved."""
        before, was_refused = self.control.state_dict(), False
        with self.cores.back_if_interrupted(start):
            for _ in range(_MOST_TRIALS):
                direction, predicted = self.control.propose(self.curvature, gradient)
                if predicted < _NEGLIGIBLE * self.stopping.enough():
                    break
                self.cores.move_to(start + direction)
                self._apply(step, "update")
                tried = self._evaluate(terms, self.progress.step + 1, with_gradient=keep_graph)
                relief = self.proximal.at(start) - self.proximal.at(self.cores.place())
                outcome = self._outcome(here, tried, predicted, relief)
                if self.control.is_good(outcome):
                    self.stopping.failures = 0
                    self._follow_budget(tried.damage, was_refused)
                    return tried, outcome.kl
                was_refused |= outcome.is_over_budget and not self.control.is_too_long(outcome)
        self.cores.move_to(start)
        self._follow_budget(here.damage, was_refused)
        self.stopping.failures += 1
        self.control.load_state_dict(before)
        # The graph of `here` has been gone through, so the next step from here needs one of its own.
        return (self._evaluate(terms, self.progress.step + 1) if keep_graph else here), 0.0

    def _evaluate(self, terms: list[Term], step: int, *, with_gradient: bool = True) -> Tried:
        """Evaluate where the cores are, such that a step can begin there, the run's `step`-th."""
        self.caught.watching = self.refresh.is_due(step)
        return self.trials.evaluate(terms, with_gradient=with_gradient)

    def _is_too_far(self, place: Tensor) -> bool:
        """Whether it costs more to be there than all that there is to win: first steps went where no curvature was."""
        minimum = self.objectives[0].minimum
        return minimum is not None and self.proximal.at(place) > self.stopping.start_loss - minimum

    def _start_again(self, terms: list[Term], *, keep_graph: bool) -> Tried:
        """Go back to the start, and from there on with the pull that is known now."""
        self.cores.move_to(self.proximal.start)
        self.best = self.proximal.start
        self.stopping.begin_again()
        return self._evaluate(terms, self.progress.step, with_gradient=keep_graph)

    def _outcome(self, here: Tried, tried: Tried, predicted: float, relief: float) -> Outcome:
        limit = self.natural.max_retain_kl
        fall = here.values["loss"] - tried.values["loss"] + self._pressed() * (here.damage - tried.damage) + relief
        # A batch of its own may be above it where the step begins: that may be mended step by step.
        is_over_budget = limit is not None and tried.damage > limit and tried.damage >= here.damage
        return Outcome(fall, predicted, *self.trials.moved(here, tried), is_over_budget)

    def _follow_budget(self, damage: float, was_refused: bool) -> None:
        self.stopping.budget_was_hit |= was_refused
        self.pressure.follow(damage, was_refused=was_refused)

    def _pressed(self) -> float:
        """What the damage weighs beyond its weight in the loss."""
        return self.pressure.times * self.trials.damage_weight

    def _start_step(self, data: StepData | None) -> Step:
        # The optimiser that Accelerate was given moves nothing here.
        return replace(super()._start_step(data), optimizer=None, natural=self._natural)

    def _natural(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.cores.split(self.curvature.solve(self.cores.join(gradient), self.control.damping))

    def _data_at(self, terms: list[Term]) -> StepData | None:
        if not self.rules:
            return None
        return gradients_of_terms(self.parameters, self.trials, terms, self.cores.mean_over_processes)

    def _under_rules(self, step: Step, gradient: Tensor) -> Tensor:
        if not self.rules:
            return gradient
        self.cores.write_gradient(gradient)
        self._apply(step, "gradients")
        return self.cores.take_gradient()

    def _probes(self, here: Tried) -> list[Probe]:
        probes = []
        batches = sum(term.is_forget for term, _ in here.terms)  # the loss is their mean
        for term, evaluation in here.terms:
            if not (term.weight or self._damage_weighs(term)) or not evaluation.outputs:
                continue
            examples = count_examples(term.batch) or 1
            everywhere = examples * self.processes
            number = min(max(round(self.curvature.wanted_seeds / everywhere), 1), _MOST_PROBES)
            for _ in range(number):
                if self.cores.is_sharded:  # its graph cannot be gone through twice
                    evaluation = term.objective.evaluate(self.runner, term.batch, term.prepared)
                seed = self._seed(term, evaluation) / math.sqrt(number * batches)
                self.caught.catching = True
                try:
                    gradient = self.cores.gradient_of(seed, retain_graph=not self.cores.is_sharded)
                finally:
                    self.caught.catching = False
                probes.append(Probe(self.caught.take(), gradient, examples))
        return probes

    def _seed(self, term: Term, evaluation: Evaluation) -> Tensor:
        distribution = term.objective.distribution
        assert distribution is not None
        seeds = []
        for output in evaluation.outputs:
            before, after = rows_elsewhere(output.values, self.rank, self.processes)
            scale = math.sqrt(abs(term.weight * output.weight) + self._damage_weighs(term))
            seeds.append(scale * probe(distribution, output.values, self.generator, before=before, after=after))
        return torch.stack(seeds).sum()

    def _damage_weighs(self, term: Term) -> float:
        """What the damage weighs on each output: it is a mean over the retain sets, whatever their losses weigh."""
        outputs = len(term.original) * max(len(self.weights), 1)
        return (self.trials.damage_weight + self._pressed()) / outputs if outputs else 0.0

    def _mean_over_processes(self, losses: Losses) -> Losses:
        return mean_of_numbers(losses, self.processes, self.cores.device)

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        return {
            "is_whole": isinstance(self.curvature, WholeMatrix),
            "curvature": self.curvature.state_dict(),
            "control": self.control.state_dict(),
            "generator": self.generator.get_state(),
            "first_draws": self.first_draws,
            "start": self.proximal.start,
            "pull": self.proximal.pull,
            "best": self.best,
            "start_values": self.start_values,
            "path": self.path,
            "remembered": self.remembered,
            "pressure": self.pressure.times,
            **self.stopping.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._restored = state
        self.generator.set_state(state["generator"])
        self.first_draws, self.best = state["first_draws"], state["best"]
        self.proximal = Proximal(state["start"], state["pull"])
        self.path, self.start_values = list(state["path"]), dict(state["start_values"])
        self.remembered = list(state.get("remembered", []))  # of a version that looked at the first batches alone
        self.pressure.times = state.get("pressure", 0.0)  # of a version that had none
        if self.start_values:
            self.stopping.begin(self.start_values)
            self.trials.weigh_damage(self.stopping.unit(self.start_values["forget_loss"]))
        self.stopping.load_state_dict(state)
