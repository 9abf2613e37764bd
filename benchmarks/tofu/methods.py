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

from semu_peft import Callback, Retain, SemuConfig, initialize_semu_weights, objectives, unlearn
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
    "LoRA, rank 13": Carrier(lambda: LoraConfig(r=13, lora_alpha=13, target_modules=LINEAR), 3e-3),
    "LoRA, rank 8": Carrier(lambda: LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR), 3e-3),
    "all weights": Carrier(None, 1e-4),
}
RETAIN = {"answers": ("answers",), "neutral": ("neutral",), "both": ("answers", "neutral")}

# By name, made for the original model where a copy of it is the reference, and for the answers it never learnt.
OBJECTIVES: dict[str, Callable[[nn.Module | None, Tensor], Objective]] = {
    "NPO 0.03": lambda reference, unseen: objectives.NPO(beta=0.03, reference=reference),
    "NPO 0.1": lambda reference, unseen: objectives.NPO(beta=0.1, reference=reference),
    "SimNPO": lambda reference, unseen: objectives.SimNPO(),
    "unseen answers": lambda reference, unseen: objectives.UnseenAnswer(unseen),
    "DELETE": lambda reference, unseen: objectives.DecoupledDistillation(reference=reference),
    "inverted hinge": lambda reference, unseen: objectives.InvertedHinge(),
    "gradient ascent": lambda reference, unseen: objectives.GradientAscent(),
    "uniform": lambda reference, unseen: objectives.UniformDistribution(),
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
    subject: Subject, carrier: str, objective: str, retain: str, *, weight: float = 30.0, seed: int = 0,
    steps: int | None = None, damage: Callable[[nn.Module], float],
) -> Unlearned:  # fmt: skip
    """Unlearn once.

    Args:
        subject: Models and texts.
        carrier: Of `CARRIERS`.
        objective: Of `OBJECTIVES`.
        retain: Of `RETAIN`: what is held, answers of the retain set, neutral text, or both.
        weight: Of the KL to the original on each.
        seed: Seed of the order.
        steps: At most; by default the carrier's.
        damage: Measures the damage of a model.
    """
    how, model = CARRIERS[carrier], load(subject.original)
    forget = subject.examples(subject.forget)
    texts = {"answers": subject.retain, "neutral": subject.more_neutral}
    kept = [subject.examples(texts[name]) for name in RETAIN[retain]]
    wrong = unseen_answers([as_example(row) for row in subject.forget], seed=seed)
    unseen = subject.nll(model, [(each.prompt, each.answer) for each in wrong]).float()
    reference = load(subject.original).requires_grad_(False) if how.config is None else None
    loss = OBJECTIVES[objective](reference, unseen)
    began = time.process_time()
    if how.config is not None:
        model = get_peft_model(model, how.config())
    if "SEMU" in carrier:
        initialize_semu_weights(model, forget.loader(BATCH_SIZE, shuffle=False), loss, progress=False)
    watch = Watch(damage, lambda now: float(subject.nll(now, subject.told).mean()), float(unseen.mean()))
    held = objectives.KLToOriginal(reference=reference)
    unlearn(
        model, forget.loader(BATCH_SIZE, seed=seed), loss,
        retain=[Retain(each.loader(RETAIN_BATCH_SIZE, seed=seed + at), held, weight) for at, each in enumerate(kept)],
        learning_rate=how.learning_rate, max_steps=steps or how.steps, callbacks=[watch], progress=False, seed=seed,
    )  # fmt: skip
    seconds = time.process_time() - began - watch.seconds
    count = sum(parameter.numel() for parameter in trained(model))
    return Unlearned(model, watch.moments, watch.steps, count, seconds, watch.path)
