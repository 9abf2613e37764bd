"""All attacks that fit a model, in one call: what was tried, what it brought back, and what was not tried and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_model, check_number, check_switch
from semu_peft.objectives.attackers import Attacker
from semu_peft.objectives.base import LossFunction
from semu_peft.objectives.batches import check_batches, is_encoder_decoder
from semu_peft.objectives.examples import examples_in
from semu_peft.objectives.original import original
from semu_peft.tuner.adapted import base_model
from semu_peft.tuner.keys import without_wrappers

from .attack_report import AttackReport, Compared, NotRun
from .classification import Predictions
from .knowledge import LossOfOriginal, Measure, Task, accuracy, answer_probability, task_of
from .membership_attacks import MembershipAttacks, Run
from .perturbation import flipped_inputs, noisy_inputs, stripping
from .probing import FEWEST_EXAMPLES, lens_attack, linear_probes, logit_lens
from .prompt_search import search_prompt
from .quantization import quantization
from .relearning import RelearningCurve, relearning, usual_attackers


@dataclass(frozen=True)
class _Attack:
    """An attack, with what runs it or the reason why it is not run, and whether the reference is attacked as well."""

    name: str
    run: Run | str
    has_reference: bool = True


def attack(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    *,
    reference: nn.Module | None = None,
    related: Iterable[Any] | None = None,
    forget_test: Iterable[Any] | None = None,
    learn: LossFunction | None = None,
    attackers: Attacker | Sequence[Attacker] | None = None,
    forget_examples: int | None = None,
    shadow: Sequence[tuple[Predictions, Predictions]] = (),
    further: Mapping[str, Callable[[nn.Module], Any]] | None = None,
    measure: Measure | None = None,
    tokenizer: Any = None,
    prompt_steps: int = 100,
    time_limit: float | None = None,
    dry_run: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> AttackReport:
    """Try on a model what somebody would who wants the forgotten back, as far as the data given allow.

    The model is not written. An attack that fails is named in the report with its error, and the others go on; where it
    fails on the reference alone, what it found of the model is told. Stripping, quantisation to 8 and 4 bits and
    relearning fit every model; probes layer by layer classifiers and language models, changed inputs classifiers of
    floating-point inputs, lenses language models, searched prompts text-to-image denoisers, membership classifiers and
    language models. Attacks on the text that a language model writes, and on what a pipeline draws from other seeds,
    need more than batches: give them as `further`.

    Args:
        model: The unlearned model as it is to be given away.
        forget: Batches of what was forgotten.
        retain: Batches of the rest.
        test: Batches that no model was trained on, for membership. Like the forgotten ones, best: a model that never
            knew tells a class from the others.
        reference: The model retrained without the forget set, or another that never knew it. Without one, what is found
            may be what every model gives.
        related: Batches of related data: relearning from them alone is tried as well.
        forget_test: Examples of what was forgotten that relearning is measured on; by default the forget examples that
            the attacker does not have.
        learn: What relearning minimises: by default cross entropy. Denoisers need it: `DenoisingLoss(scheduler)`.
        attackers: Who relearns, one or several; by default
            [`usual_attackers`][semu_peft.evaluation.relearning.usual_attackers], with smaller rates for language models
            and denoisers.
        forget_examples: How many of the forgotten examples each of those that are chosen by default has.
        shadow: Of each shadow model, trained without the forget set, its predictions on `forget` and on `test`, in the
            order of these batches.
        further: Attacks of your own by name, `(model) -> result`; beside those that are here, none is replaced.
        measure: `(model, batches) -> percent`; by default the accuracy of classifiers, the mean token
            probability of language models
            ([`answer_probability`][semu_peft.evaluation.knowledge.answer_probability]), and of denoisers the original's
            loss as a share of the model's, of which half is back midway from where a model starts to 100.
        tokenizer: Of a language model: makes texts of tokens, for membership by zlib.
        prompt_steps: Steps of each search for a prompt.
        time_limit: Begin no attack after so many seconds; what is left is named in the report.
        dry_run: Run nothing: the report names what would be run, with steps and examples, and what would not and why.
        seed: Seed of all draws.
        progress: Show a progress bar.

    Returns:
        All results, and what was not run and why.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: A number is out of range, or there is no batch.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import attack
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> forget, retain = ([(torch.randn(30, 2) + at, torch.full((30,), at // 4))] for at in (0, 4))
        >>> report = attack(model, forget, retain, attackers=[], progress=False)
        >>> [name for name, _, _ in report.rows][:2]
        ['stripping: the adapter switched off', 'quantisation: 8 bits a row']
        >>> report.not_run[-1]
        NotRun(attack='membership with shadow models: LiRA and RMIA', reason='`test` was not given')
    """
    check_model(model)
    if reference is not None:
        check_model(reference, "reference")
    if time_limit is not None:
        check_number("time_limit", time_limit, low=0)
    if measure is not None:
        mend = "Write `lambda model, batches: ...`."
        check_kind("measure", measure, Callable, "a function of model and batches", mend)  # type: ignore[arg-type]
    check_count("seed", seed, least=0)
    check_count("prompt_steps", prompt_steps)
    check_count("forget_examples", forget_examples, optional=True)
    check_switch("dry_run", dry_run)
    check_switch("progress", progress)
    if forget_examples is not None and attackers is not None:
        raise ValueError(
            f"`forget_examples` must be left out beside `attackers`, got {forget_examples}. Write it in each: "
            "`Attacker(forget_examples=...)`."
        )
    data = _Data.read(forget=forget, retain=retain, test=test, related=related, forget_test=forget_test)
    own = _check_further(further)
    plan = _Plan(
        model, data, learn, _check_attackers(attackers), forget_examples, _check_shadow(shadow), measure, seed,
        prompt_steps, set(own), tokenizer,
    )  # fmt: skip
    planned = plan.attacks()
    planned += [_Attack(name, _call(run, model), has_reference=False) for name, run in own.items()]
    if dry_run:
        missing = tuple(NotRun(each.name, each.run) for each in planned if isinstance(each.run, str))
        names = tuple(each.name for each in planned if not isinstance(each.run, str))
        return AttackReport(plan.task, (), missing, 0.0, reference is not None, names)
    return _carry_out(planned, plan.task, reference, time_limit, progress)


def _call(function: Callable[[nn.Module], Any], model: nn.Module) -> Run:
    return lambda _: function(model)


def _check_attackers(attackers: Any) -> list[Attacker] | None:
    if attackers is None or isinstance(attackers, Attacker):
        return None if attackers is None else [attackers]
    wanted, mend = "an `Attacker` or a list of them", "Write `[Attacker('sgd', 1e-2)]`."
    check_kind("attackers", attackers, Sequence, wanted, mend)
    for each in attackers:
        check_kind("attackers", each, Attacker, wanted, mend)
    return list(attackers)


def _check_shadow(shadow: Any) -> list[tuple[Predictions, Predictions]]:
    wanted = "a list of pairs of `Predictions`, on `forget` and on `test`"
    mend = "Write `[(predict(shadow_model, forget), predict(shadow_model, test)), ...]`."
    check_kind("shadow", shadow, Sequence, wanted, mend)
    for pair in shadow:
        check_kind("shadow", pair, (tuple, list), wanted, mend)
        if len(pair) != 2:
            raise ValueError(f"`shadow` must be {wanted}, got {len(pair)} of one model. {mend}")
        for each in pair:
            check_kind("shadow", each, Predictions, wanted, mend)
    return list(shadow)


def _check_further(further: Any) -> dict[str, Callable[[nn.Module], Any]]:
    if further is None:
        return {}
    wanted, mend = "a mapping of functions of the model", "Write `{'name': lambda model: ...}`."
    check_kind("further", further, Mapping, wanted, mend)
    for run in further.values():
        check_kind("further", run, Callable, wanted, mend)  # type: ignore[arg-type]
    return {str(name): run for name, run in further.items()}


def _carry_out(
    planned: Sequence[_Attack], task: Task, reference: nn.Module | None, time_limit: float | None, progress: bool
) -> AttackReport:
    from tqdm.auto import tqdm

    started, results, not_run = time.perf_counter(), [], []
    bar = tqdm(planned, desc="attacks", disable=not progress)
    for each in bar:
        bar.set_postfix_str(each.name)
        if isinstance(each.run, str):
            not_run.append(NotRun(each.name, each.run))
        elif time_limit is not None and time.perf_counter() - started >= time_limit:
            not_run.append(NotRun(each.name, f"the time limit of {time_limit:g} s was reached"))
        else:
            found, failed = _tried(each.name, each.run, reference if each.has_reference else None)
            results += found
            not_run += failed
    return AttackReport(task, tuple(results), tuple(not_run), time.perf_counter() - started, reference is not None)


def _tried(name: str, run: Run, reference: nn.Module | None) -> tuple[list[Any], list[NotRun]]:
    """The result if there is one, and what failed: neither another attack nor, for the reference, the model's own."""
    try:
        result = run(reference)
    except Exception as error:
        if reference is None:
            return [], [NotRun(name, f"it failed: {_in_words(error)}")]
        found, own_failed = _tried(name, run, None)
        of_it = f"it could not be attacked, and what is told is of this model alone: {_in_words(error)}"
        return found, own_failed or [NotRun(f"{name}, of the reference", of_it)]
    return [result if hasattr(result, "row") else Compared(name, result)], []


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


@dataclass(frozen=True)
class _Data:
    """The batches, each kind gone through once."""

    forget: list[Any]
    retain: list[Any] | None
    test: list[Any] | None
    related: list[Any] | None
    forget_test: list[Any] | None

    @classmethod
    def read(cls, **given: Iterable[Any] | None) -> _Data:
        lists: dict[str, Any] = {}
        for name, batches in given.items():
            if batches is not None or name == "forget":
                check_batches(batches, name)
            lists[name] = None if batches is None else list(batches)
            if lists[name] == []:
                raise ValueError(f"`{name}` must give at least one batch, got none. Give a list of batches.")
        return cls(**lists)


@dataclass
class _Plan:
    """Which attacks fit; each as what runs it, or the reason why it is not run."""

    model: nn.Module
    data: _Data
    learn: LossFunction | None
    attackers: Sequence[Attacker] | None
    forget_examples: int | None
    shadow: Sequence[tuple[Predictions, Predictions]]
    measured_by: Measure | None
    seed: int
    prompt_steps: int
    further: Collection[str]
    tokenizer: Any

    def __post_init__(self) -> None:
        self.task = task_of(self.model, self.data.forget[0], self.learn)
        self.measure = self.measured_by or self._usual_measure()

    def _usual_measure(self) -> Measure | None:
        if self.task == "classification":
            return accuracy
        if self.task == "language":
            return answer_probability
        if self.learn is None:
            return None
        before = self._original()
        return None if before is None else LossOfOriginal(self.learn, before)

    def _original(self) -> nn.Module | None:
        """The model before it forgot, where its adapter is still beside the weights."""
        try:
            with original(self.model) as before:
                return before if before is not self.model else None
        except ValueError:
            return None

    def attacks(self) -> list[_Attack]:
        """All attacks, in the order of the report."""
        planned: list[_Attack] = []
        if self.measure is None:
            missing = ["`learn`, a `DenoisingLoss`"] if self.learn is None else []
            missing += ["the model with its `adapter`"] if self._original() is None else []
            reason = (
                "a denoiser is measured by its training loss beside the original's: give "
                f"{' and '.join(missing)}, or `measure`"
            )
            planned.append(_Attack("stripping, quantisation, relearning", reason))
        else:
            planned += [*self._on_weights(self.measure), *self._on_inputs(self.measure)]
        return [*planned, *self._inside(), *self._prompts(), *(_Attack(*each) for each in self._membership().attacks())]

    def _on_weights(self, measure: Measure) -> Iterator[_Attack]:
        data = self.data
        yield _Attack("stripping", lambda _: stripping(self.model, data.forget, measure=measure), has_reference=False)
        for bits in (8, 4):
            yield _Attack(
                f"quantisation: {bits} bits",
                lambda beside, bits=bits: quantization(  # type: ignore[misc]
                    self.model, data.forget, data.retain, bits=bits, reference=beside, measure=measure
                ),
            )
        for attacker in self._attackers():
            what = f"{attacker.label}, {attacker.steps} steps"
            yield _Attack(f"relearning: {what}", self._relearning(attacker, data.forget, data.forget_test, measure))
            if data.related is not None:
                on = data.forget_test or data.forget
                run = _of_related(self._relearning(attacker, data.related, on, measure))
                yield _Attack(f"relearning from related data: {what}", run)
        if data.related is None:
            yield _Attack("relearning from related data", "`related` was not given")

    def _attackers(self) -> Sequence[Attacker]:
        if self.attackers is not None:
            return self.attackers
        if self.task == "classification":
            usual = usual_attackers(_head(self.model), images=_holds(self.data.forget[0], dims=4))
        else:
            usual = [Attacker("adam", rate, steps=50, batch_size=8) for rate in (1e-4, 1e-3)]
        if self.forget_examples is None:
            return usual
        return [replace(attacker, forget_examples=self.forget_examples) for attacker in usual]

    def _relearning(
        self, attacker: Attacker, forget: list[Any], measured_on: list[Any] | None, measure: Measure
    ) -> Run:
        return lambda beside: relearning(
            self.model, forget, self.data.retain, attacker=attacker, reference=beside, learn=self.learn,
            measure=measure, forget_test=measured_on, seed=self.seed, progress=False,
            half=None if isinstance(measure, LossOfOriginal) else 50.0,
        )  # fmt: skip

    def _on_inputs(self, measure: Measure) -> Iterator[_Attack]:
        data = self.data
        if self.task != "classification":
            yield _Attack("inputs: noise, flips", f"they are for classifiers, and this is a {self.task} model")
            return
        if not _holds(data.forget[0]):
            yield _Attack("inputs: noise, flips", "the inputs are no floating-point numbers")
            return
        for scale in (0.1, 0.3):
            yield _Attack(
                f"inputs: noise of {scale}",
                lambda beside, scale=scale: noisy_inputs(  # type: ignore[misc]
                    self.model, data.forget, scale=scale, seeds=range(self.seed, self.seed + 3), reference=beside,
                    measure=measure,
                ),
            )  # fmt: skip
        flipped: Run = lambda beside: flipped_inputs(self.model, data.forget, reference=beside, measure=measure)  # noqa: E731
        is_images = _holds(data.forget[0], dims=4)
        yield _Attack("inputs: flipped", flipped if is_images else "the inputs are no images (N, C, H, W)")

    def _inside(self) -> Iterator[_Attack]:
        model, data = self.model, self.data
        if self.task == "diffusion":
            yield _Attack("linear probes", "a denoiser's activations are of noise: none was built")
        elif data.retain is None:
            yield _Attack("linear probes", "`retain` was not given")
        elif min(examples_in(data.forget), examples_in(data.retain)) < FEWEST_EXAMPLES:
            yield _Attack("linear probes", f"they need at least {FEWEST_EXAMPLES} examples to forget and to retain")
        else:
            kept = data.retain
            yield _Attack(
                "linear probes",
                lambda beside: linear_probes(model, data.forget, kept, reference=beside, seed=self.seed),
            )
        lens: Run | str = lambda beside: logit_lens(model, data.forget, reference=beside)  # noqa: E731
        few: Run | str = lambda beside: lens_attack(model, data.forget, reference=beside)  # noqa: E731
        if self.task != "language" or is_encoder_decoder(model):
            lens = few = "it reads language models that are decoders alone"
        yield _Attack("logit lens", lens)
        yield _Attack("lens: a few tokens of each layer", few)

    def _prompts(self) -> Iterator[_Attack]:
        name, learn = "adversarial prompts", self.learn
        condition = self.data.forget[0].get("condition", {}) if isinstance(self.data.forget[0], Mapping) else {}
        if self.task != "diffusion":
            yield _Attack(name, "they are searched for text-to-image denoisers")
        elif learn is None or "encoder_hidden_states" not in condition:
            reason = "the batches have no text embedding (`encoder_hidden_states`), or no `learn` was given"
            yield _Attack(name, reason)
        else:
            seeds = range(self.seed, self.seed + 3)
            yield _Attack(
                name,
                lambda beside: search_prompt(
                    self.model, self.data.forget, learn, original=self._original(), reference=beside, seeds=seeds,
                    steps=self.prompt_steps, progress=False,
                ),
            )  # fmt: skip
        yield from self._left_to_further()

    def _membership(self) -> MembershipAttacks:
        sides = self.data.forget, self.data.retain, self.data.test
        return MembershipAttacks(self.model, self.task, *sides, self.shadow, self.tokenizer, self.seed)

    def _left_to_further(self) -> Iterator[_Attack]:
        """What needs more than a model and batches, where nobody has given it."""
        name, call = {
            "language": ("prompts", "`lambda model: prompt_attacks(model, tokenizer, questions)`"),
            "diffusion": ("other seeds", "`lambda _: seed_attack(generate, prompts, classifier, classes)`"),
        }.get(self.task, ("", ""))
        if name and name not in self.further:
            yield _Attack(name, f"it needs more than batches: give {call} as `further[{name!r}]`")


def _of_related(run: Run) -> Run:
    """The curve's row says that the attacker had related data alone."""

    def told(reference: nn.Module | None) -> RelearningCurve:
        curve = run(reference)
        return replace(curve, attacker=f"{curve.attacker}, related data")

    return told


def _head(model: nn.Module) -> str | None:
    """The name of the last linear layer."""
    names = [name for name, module in base_model(model).named_modules() if isinstance(module, nn.Linear)]
    return without_wrappers(names[-1]) if names else None


def _holds(batch: Any, dims: int | None = None) -> bool:
    """Whether a batch has floating-point inputs, of so many dimensions."""
    values = batch.values() if isinstance(batch, Mapping) else batch[:-1]
    floating = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return any(dims is None or value.dim() == dims for value in floating)
