"""What is compared: objectives, and what carries the change; all of them through one loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cells import ADAMW, ADAMW_99, ALL, EPOCH, LORA_8, LORA_8_16, LORA_13, NATURAL, NATURAL_99, NATURAL_999, Cell
from machine import clock
from measure import ATTACKER, one_batch, others_of
from peft import LoraConfig, get_peft_model
from sentences import OBJECTIVES, Given
from subjects import TEMPLATE, Subject, load
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR
from watch import Values, Watch, WatchToBudgets, put, values_of

from semu_peft import Retain, SemuConfig, initialize_semu_weights, methods, objectives, unlearn
from semu_peft.gradients.covariance import LayerCovariance
from semu_peft.gradients.gather import gather
from semu_peft.language import TextExamples, answers_about_others, unseen_answers
from semu_peft.language.shapes import as_example
from semu_peft.objectives import Attacker, Objective, SimulatedRelearning
from semu_peft.objectives.attackers import Relearner
from semu_peft.objectives.examples import Examples
from semu_peft.training.natural import NaturalGradient
from semu_peft.training.rules import RemoveDirections, Rule

BATCH_SIZE, RETAIN_BATCH_SIZE = 40, 60
LINEAR = r".*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Carrier:
    """What is trained, and how.

    Attributes:
        config: The adapter; None trains all weights.
        learning_rate: Of AdamW, chosen on seed 0 by the forget quality at the end; None for natural gradients.
        steps: At most.
    """

    config: Callable[[], Any] | None
    learning_rate: float | None
    steps: int = 60


def _semu(gamma: float) -> Callable[[], SemuConfig]:
    return lambda: SemuConfig(target_modules=LINEAR, explained_variance=gamma)


# γ of 0.9 is the default; what is trained are 251,260 numbers of 5.1 million, as in LoRA of rank 13.
CARRIERS = {
    ALL: Carrier(None, 1e-4),
    LORA_8: Carrier(lambda: LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR), 3e-3),
    NATURAL: Carrier(_semu(0.9), None, 80),
    ADAMW: Carrier(_semu(0.9), 1e-3),
    LORA_13: Carrier(lambda: LoraConfig(r=13, lora_alpha=13, target_modules=LINEAR), 3e-3),
    ADAMW_99: Carrier(_semu(0.99), 1e-3),
}
RETAIN = {"both": ("answers", "neutral"), "neutral": ("neutral",), "answers": ("answers",)}
# Also those that are no default of `run.py`.
EVERY_CARRIER = {
    **CARRIERS,
    LORA_8_16: Carrier(lambda: LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR), 1e-3),
    NATURAL_99: Carrier(_semu(0.99), None, 80),
    NATURAL_999: Carrier(_semu(0.999), None, 80),
}
# Also nothing, and what the model itself says.
EVERY_RETAIN = {**RETAIN, "none": (), "own": ("own",), "own and neutral": ("own", "neutral")}
# Simulated in turn, the first so many: none has the examples of the one that judges, nor so many steps as it.
ATTACKERS = [
    Attacker("adam", 1e-4, steps=10, forget_examples=20),
    Attacker("adam", 3e-4, steps=5, forget_examples=20),
    Attacker("adam", 1e-4, steps=10, forget_examples=40),
    Attacker("adam", 1e-3, steps=5, forget_examples=20),
]
STOP_SEED = 500  # of the attack that is looked at
SHARED = 8  # directions of either side that CIR leaves out
PROJECTIONS = [f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")]


@dataclass
class Unlearned:
    """A model, and the values that it had at several moments of its training.

    Attributes:
        model: With the last values.
        moments: Values of what was trained, by moment.
        steps: The step of each moment.
        trainable_parameters: How many numbers were trained.
        seconds: For initialising and training, without the looks at damage.
        path: What was seen at each look.
    """

    model: nn.Module
    moments: dict[str, Values]
    steps: dict[str, float]
    trainable_parameters: int
    seconds: float
    path: list[dict[str, float]] = field(default_factory=list)

    def go_to(self, moment: str) -> nn.Module:
        """Put the values of a moment into the model."""
        put(self.model, self.moments[moment])
        return self.model


def repaired(subject: Subject, cell: Cell, done: Unlearned) -> Unlearned:
    """Go on from where forgetting has led, with the cell's repair if it has one; `done` can be gone on from again."""
    if not cell.repair:
        return done
    model = done.go_to("end")
    began = clock()
    made = _repair(subject, cell, model)
    seconds = done.seconds + clock() - began
    moments = {**done.moments, "repaired": values_of(model)}
    steps = {**done.steps, "repaired": done.steps["end"] + made}
    return replace(done, moments=moments, steps=steps, seconds=seconds)


def forget(subject: Subject, cell: Cell, *, damage: Callable[[nn.Module], float]) -> Unlearned:
    """Unlearn once, without the repair.

    Args:
        subject: Models and texts.
        cell: The settings.
        damage: Measures the damage of a model.
    """
    how, said = EVERY_CARRIER[cell.carrier], OBJECTIVES[cell.objective]
    model = load(subject.original)
    wrong = unseen_answers([as_example(row) for row in subject.forget], seed=cell.seed)
    unseen = subject.nll(model, [(each.prompt, each.answer) for each in wrong]).float()
    reference = _reference(subject, how)
    given = Given(subject, model, reference, wrong, unseen)
    answers, loss, size = said.examples(given), said.make(given), cell.batch_size or BATCH_SIZE
    kept = held(subject, cell.retain, cell, reference, said.keeps(given) if said.keeps else None)
    watch = _watch(subject, cell, damage, model, wrong, unseen)
    began = clock()
    if how.config is not None:
        model = get_peft_model(model, how.config())
    if "SEMU" in cell.carrier:
        initialize_semu_weights(
            model, answers.loader(BATCH_SIZE, shuffle=False), loss, skip_leading=cell.skip, progress=False
        )
    rules = _rules(model, answers, loss) if cell.without_shared else []
    steps, dials = cell.steps or how.steps, ({"learning_rate": _rate(cell)},)
    if cell.as_published:
        dials[0]["scheduler"] = _up_and_down
    if cell.attackers:
        pool = one_batch(subject, subject.forget)
        loss = SimulatedRelearning(loss, pool, attackers=ATTACKERS[: cell.attackers], copies=16, seed=cell.seed)
    if cell.kl:
        # The loss under attackers rises and falls with each of them.
        patience = {"patience": steps} if cell.attackers else {}
        dials = tuple({"optimizer": NaturalGradient(kl=kl, **patience)} for kl in cell.kl)
    for dial in dials:
        result = unlearn(
            model, answers.loader(size, seed=cell.seed), loss, retain=kept, callbacks=[watch], progress=False,
            rules=rules, max_steps=steps // len(dials), epochs=steps, seed=cell.seed, **dial,
        )  # fmt: skip
        watch.before += result.steps
        watch.look(model, watch.before)  # natural gradients end with the best cores, not with the last
        if watch.is_over:
            break
    seconds = clock() - began - watch.seconds
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Unlearned(model, watch.moments, watch.steps, count, seconds, list(watch.looks.values()))


def _watch(
    subject: Subject,
    cell: Cell,
    damage: Callable[[nn.Module], float],
    original: nn.Module,
    wrong: list[Any],
    nll: Tensor,
) -> Watch:
    """Look for the moment when the answers are as unlikely as unseen ones; under attackers, when both are attacked."""
    if not cell.attackers:
        kind, told = (WatchToBudgets, subject.told[::4]) if cell.equal_damage else (Watch, subject.told)
        level = math.inf if cell.as_published else float(nll.mean())
        return kind(damage, lambda now: float(subject.nll(now, told).mean()), level)
    unseen = [{"question": each.prompt, "answer": each.answer} for each in wrong]
    level = _nll_when_attacked(subject, original, unseen)
    return Watch(damage, lambda now: _nll_when_attacked(subject, now, subject.forget), level)


def _nll_when_attacked(subject: Subject, model: nn.Module, rows: list[dict[str, Any]]) -> float:
    """How unlikely answers are that an attacker does not have, when it has trained on some of them."""
    known = Examples(one_batch(subject, rows))
    learn, draw = objectives.CrossEntropy(), torch.Generator().manual_seed(STOP_SEED)
    relearner = Relearner(model, ATTACKER, known, None, learn, draw)
    for _ in range(ATTACKER.steps):
        relearner.step()
    pairs = [(rows[place]["question"], rows[place]["answer"]) for place in others_of(relearner, len(rows))]
    return float(subject.nll(relearner.model, pairs).mean())


def _rules(model: nn.Module, answers: TextExamples, loss: Objective) -> list[Rule]:
    """CIR: no step moves what the forget answers have in common."""
    loader = answers.loader(BATCH_SIZE, shuffle=False)
    shared = gather(model, loader, loss, targets=PROJECTIONS, statistic=LayerCovariance, progress=False)
    return [RemoveDirections.shared(shared, inputs=SHARED, outputs=SHARED)]


def _rate(cell: Cell) -> float | None:
    """The learning rate of AdamW; None for natural gradients."""
    how = EVERY_CARRIER[cell.carrier]
    own = OBJECTIVES[cell.objective].learning_rate if how.config is None else None
    return cell.learning_rate or own or how.learning_rate


def _repair(subject: Subject, cell: Cell, model: nn.Module) -> int:
    """Repair in place; how many steps it took, as natural gradients end by themselves."""
    how = EVERY_CARRIER[cell.carrier]
    names, neutral = cell.repair_retain or cell.retain, cell.neutral_weight or 1.0
    as_held = replace(cell, weight=1.0, neutral_weight=neutral, hold="KL")
    first, *others = held(subject, names, as_held, _reference(subject, how))
    by_kl = cell.repair_hold == "KL" or "answers" not in EVERY_RETAIN[names]  # which were learnt
    rate = cell.repair_rate or _rate(cell)
    dial: dict[str, Any] = {} if rate is None else {"learning_rate": rate, "scheduler": _to_nothing}
    return methods.repair(
        model, subject.examples(subject.forget).loader(BATCH_SIZE, seed=cell.seed), first.batches, others=others,
        objective=first.objective if by_kl else None,
        max_steps=cell.repair, epochs=cell.repair, progress=False, seed=cell.seed, **dial,
    ).steps  # fmt: skip


def _reference(subject: Subject, how: Carrier) -> nn.Module | None:
    """A frozen original where all weights are trained."""
    return load(subject.original).requires_grad_(False) if how.config is None else None


def held(
    subject: Subject, retain: str, cell: Cell, reference: nn.Module | None, own: Objective | None = None
) -> list[Retain]:
    """What is minimised beside the objective, on each that is held; `own` is the objective's on retain answers."""
    said, size = OBJECTIVES[cell.objective], cell.kept_at_once or RETAIN_BATCH_SIZE
    weight = said.weight if cell.weight is None else cell.weight
    neutral = weight if cell.neutral_weight is None else cell.neutral_weight
    on_answers = {None: own, "KL": None, "CE": objectives.CrossEntropy()}[cell.hold]
    kept = []
    for at, name in enumerate(EVERY_RETAIN[retain]):
        term = (name == "answers" and on_answers) or objectives.KLToOriginal(reference=reference)
        loader = _texts(subject, name).loader(size, seed=cell.seed + at)
        kept.append(Retain(loader, term, neutral if name == "neutral" else weight))
    return kept


def _texts(subject: Subject, name: str) -> TextExamples:
    """What can be held: retain answers, neutral text, or what the model itself answers."""
    if name != "own":
        return subject.examples(subject.retain if name == "answers" else subject.more_neutral)
    where = subject.original, subject.own_answers
    if where not in _OWN:
        _OWN[where] = answers_about_others(
            load(subject.original), subject.tokenizer, subject.told, template=TEMPLATE, number=subject.own_answers,
            max_new_tokens=60, batch_size=500,
        )  # fmt: skip
    return _OWN[where]


_OWN: dict[tuple[Path, int], TextExamples] = {}  # made once a process


def _up_and_down(optimizer: Any, steps: int) -> Any:
    return LambdaLR(optimizer, lambda step: min((step + 1) / EPOCH, (steps - step) / (steps - EPOCH)))


def _to_nothing(optimizer: Any, steps: int) -> Any:
    return LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
