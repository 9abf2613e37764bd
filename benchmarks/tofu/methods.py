"""What is compared: objectives, and what carries the change; all of them through one loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from subjects import Subject, load
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from semu_peft import Callback, Retain, SemuConfig, initialize_semu_weights, methods, objectives, unlearn
from semu_peft.language import unseen_answers
from semu_peft.language.shapes import as_example
from semu_peft.objectives import Objective

BATCH_SIZE, RETAIN_BATCH_SIZE = 40, 60
BUDGETS = (0.01, 0.05)  # nats a token on neutral text
EVERY = 5  # steps between two looks at the damage
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


# γ of 0.9 is the default; what is trained are 251,260 numbers of 5.1 million, as in LoRA of rank 13.
CARRIERS = {
    "SEMU, natural gradients": Carrier(lambda: SemuConfig(target_modules=LINEAR), None, 80),
    "SEMU, AdamW": Carrier(lambda: SemuConfig(target_modules=LINEAR), 1e-3),
    "SEMU of γ 0.99, AdamW": Carrier(lambda: SemuConfig(target_modules=LINEAR, explained_variance=0.99), 1e-3),
    "LoRA, rank 13": Carrier(lambda: LoraConfig(r=13, lora_alpha=13, target_modules=LINEAR), 3e-3),
    "LoRA, rank 8": Carrier(lambda: LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR), 3e-3),
    "all weights": Carrier(None, 1e-4),
}
RETAIN = {"answers": ("answers",), "neutral": ("neutral",), "both": ("answers", "neutral")}


@dataclass(frozen=True)
class Sentence:
    """An objective, and what is minimised beside it.

    Attributes:
        make: The objective, of the original model where a copy of it is the reference, and of the negative
            log-likelihoods of answers that the model never learnt.
        weight: Of what is held.
        keeps: What is minimised on retain answers; on neutral text it is the KL to the original, and so it is here by
            default.
        learning_rate: Of AdamW for all weights, where it is not the carrier's.
    """

    make: Callable[[nn.Module | None, Tensor], Objective]
    weight: float = 30.0
    keeps: Callable[[], Objective] | None = None
    learning_rate: float | None = None


OBJECTIVES = {
    "NPO 0.03": Sentence(lambda reference, unseen: objectives.NPO(beta=0.03, reference=reference)),
    "NPO 0.1": Sentence(lambda reference, unseen: objectives.NPO(beta=0.1, reference=reference)),
    "SimNPO": Sentence(lambda reference, unseen: objectives.SimNPO()),
    "WGA": Sentence(lambda reference, unseen: objectives.WGA(), 1.0, objectives.CrossEntropy, 3e-4),
    "unseen answers": Sentence(lambda reference, unseen: objectives.UnseenAnswer(unseen)),
    "DELETE": Sentence(lambda reference, unseen: objectives.DecoupledDistillation(reference=reference)),
    "inverted hinge": Sentence(lambda reference, unseen: objectives.InvertedHinge()),
    "gradient ascent": Sentence(lambda reference, unseen: objectives.GradientAscent()),
    "uniform": Sentence(lambda reference, unseen: objectives.UniformDistribution()),
}


@dataclass
class Unlearned:
    """A model, and the values that it had at several moments of its training.

    Attributes:
        model: With the last values.
        moments: Values of what was trained, by moment.
        steps: The step of each moment.
        trainable_parameters: How many numbers were trained.
        seconds: Of one processor, for initialising and training, without the looks at damage.
    """

    model: nn.Module
    moments: dict[str, list[Tensor]]
    steps: dict[str, int]
    trainable_parameters: int
    seconds: float
    path: list[dict[str, float]] = field(default_factory=list)

    @torch.no_grad()
    def go_to(self, moment: str) -> nn.Module:
        """Put the values of a moment into the model."""
        for parameter, value in zip(trained(self.model), self.moments[moment], strict=True):
            parameter.copy_(value)
        return self.model


@dataclass
class Watch(Callback):
    """Look at the damage on neutral text and at the forget answers, and keep the values at the moments that count.

    It stops the run once the mean answer is as unlikely as answers that the model never learnt: no gold is needed.
    """

    damage: Callable[[nn.Module], float]
    answers: Callable[[nn.Module], float]
    unseen: float
    moments: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    path: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def on_step_end(self, context: Any) -> None:
        step = context.progress.step
        if step % EVERY and step != context.total_steps:
            return
        began = time.process_time()
        damage, nll = self.damage(context.model), self.answers(context.model)
        self.path.append({"step": step, "neutral_kl": damage, "answer_nll": nll})
        for budget in BUDGETS:
            if damage <= budget:
                self.keep(f"KL {budget}", context.model, step)
        self.keep("end", context.model, step)
        if nll >= self.unseen:
            context.control.stop("the answers are as unlikely as unseen ones")
        self.seconds += time.process_time() - began

    def keep(self, moment: str, model: nn.Module, step: int) -> None:
        self.moments[moment] = [parameter.detach().clone() for parameter in trained(model)]
        self.steps[moment] = step


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What is trained, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def run(
    subject: Subject, carrier: str, objective: str, retain: str, *, weight: float | None = None, seed: int = 0,
    steps: int | None = None, repair: int = 0, damage: Callable[[nn.Module], float],
) -> Unlearned:  # fmt: skip
    """Unlearn once.

    Args:
        subject: Models and texts.
        carrier: Of `CARRIERS`.
        objective: Of `OBJECTIVES`.
        retain: Of `RETAIN`: what is held, answers of the retain set, neutral text, or both.
        weight: Of what is held, of each; by default the objective's.
        seed: Seed of the order.
        steps: At most; by default the carrier's.
        repair: Steps after it by `methods.repair`, which make a moment of their own.
        damage: Measures the damage of a model.
    """
    how, said, model = CARRIERS[carrier], OBJECTIVES[objective], load(subject.original)
    forget = subject.examples(subject.forget)
    wrong = unseen_answers([as_example(row) for row in subject.forget], seed=seed)
    unseen = subject.nll(model, [(each.prompt, each.answer) for each in wrong]).float()
    reference = load(subject.original).requires_grad_(False) if how.config is None else None
    loss = said.make(reference, unseen)
    kept = held(subject, retain, said, reference, said.weight if weight is None else weight, seed)
    rate = (said.learning_rate if how.config is None else None) or how.learning_rate
    began = time.process_time()
    if how.config is not None:
        model = get_peft_model(model, how.config())
    if "SEMU" in carrier:
        initialize_semu_weights(model, forget.loader(BATCH_SIZE, shuffle=False), loss, progress=False)
    watch = Watch(damage, lambda now: float(subject.nll(now, subject.told).mean()), float(unseen.mean()))
    unlearn(
        model, forget.loader(BATCH_SIZE, seed=seed), loss, retain=kept, learning_rate=rate,
        max_steps=steps or how.steps, callbacks=[watch], progress=False, seed=seed,
    )  # fmt: skip
    if repair:
        first, *others = kept
        methods.repair(
            model, forget.loader(BATCH_SIZE, seed=seed), first.batches, others=others, max_steps=repair,
            learning_rate=rate, scheduler=_to_nothing, progress=False, seed=seed,
        )  # fmt: skip
        watch.keep("repaired", model, watch.steps["end"] + repair)
    seconds = time.process_time() - began - watch.seconds
    count = sum(parameter.numel() for parameter in trained(model))
    return Unlearned(model, watch.moments, watch.steps, count, seconds, watch.path)


def held(
    subject: Subject, retain: str, said: Sentence, reference: nn.Module | None, weight: float, seed: int
) -> list[Retain]:
    """What is minimised beside the objective, on retain answers, on neutral text or on both."""
    texts = {"answers": subject.retain, "neutral": subject.more_neutral}
    kept = []
    for at, name in enumerate(RETAIN[retain]):
        as_before = said.keeps is None or name == "neutral"
        term = objectives.KLToOriginal(reference=reference) if as_before else said.keeps()
        kept.append(Retain(subject.examples(texts[name]).loader(RETAIN_BATCH_SIZE, seed=seed + at), term, weight))
    return kept


def _to_nothing(optimizer: Any, steps: int) -> Any:
    return LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
