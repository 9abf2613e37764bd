"""What is run: one cell is one run, and its name says its settings; lists of cells, by the questions they answer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

NATURAL, NATURAL_99 = "SEMU, natural gradients", "SEMU of γ 0.99, natural gradients"
NATURAL_999 = "SEMU of γ 0.999, natural gradients"
ADAMW, ADAMW_99 = "SEMU, AdamW", "SEMU of γ 0.99, AdamW"
ALL, LORA_8, LORA_13 = "all weights", "LoRA, rank 8", "LoRA, rank 13"
LORA_8_16 = "LoRA, rank 8, α 16"
BUDGETS = (0.01, 0.05)  # damage, nats a token on neutral text
REPAIR = 60  # steps, where a name says no other number
EPOCH = 7  # steps of 32 answers, of 200
MANY = 200  # rows at once: a GPU hardly notices, and each retain answer is seen eight times in 160 steps


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        objective: Of `sentences.OBJECTIVES`.
        carrier: Of `methods.EVERY_CARRIER`.
        retain: Of `methods.EVERY_RETAIN`: what is held, answers of the retain set, neutral text, both, or what the
            model itself answers about others.
        seed: Of the order.
        hold: What is minimised on retain answers, the KL to the original or cross entropy; by default the objective's.
        weight: Of what is held, of each; by default the objective's.
        neutral_weight: Of the neutral text among it, also in the repair; by default the same, and 1 in the repair.
        kl: How far a step of natural gradients may move the outputs; of several, one after the other, as many steps
            each.
        learning_rate: Of AdamW; by default the objective's or the carrier's.
        steps: At most; by default the carrier's.
        batch_size: Answers to forget, a step; by default `methods.BATCH_SIZE`.
        kept_at_once: Rows of each that is held, a step; by default `methods.RETAIN_BATCH_SIZE`.
        attackers: How many are simulated, in turn (`methods.ATTACKERS`); the run then ends when the answers are
            unlikely after an attack.
        skip: Leading directions that the subspace leaves out.
        without_shared: Whether no step goes along what all answers share, by CIR.
        equal_damage: Whether the run ends where its damage meets the last of `BUDGETS`, found between two looks.
        as_published: Whether the run takes all its steps, however unlikely the answers are, and AdamW's rate rises for
            an epoch and then falls to zero.
        repair: Steps of `methods.repair` after it.
        repair_retain: What these are on, of `methods.RETAIN`; by default `retain`.
        repair_rate: Learning rate of their AdamW; by default as it was trained before.
        repair_hold: What they minimise on retain answers; by default cross entropy.
    """

    objective: str
    carrier: str
    retain: str = "answers"
    seed: int = 0
    hold: Literal["KL", "CE"] | None = None
    weight: float | None = None
    neutral_weight: float | None = None
    kl: tuple[float, ...] = ()
    learning_rate: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    kept_at_once: int | None = None
    attackers: int = 0
    skip: int = 0
    without_shared: bool = False
    equal_damage: bool = False
    as_published: bool = False
    repair: int = 0
    repair_retain: str | None = None
    repair_rate: float | None = None
    repair_hold: Literal["KL"] | None = None

    @property
    def name(self) -> str:
        """All settings that are not the default ones; a row's name begins with it."""
        dials = " then ".join(f"{dial:g}" for dial in self.kl)
        said = {
            f"held by {self.hold}": self.hold,
            f"weight {self.weight}": self.weight,
            f"neutral {self.neutral_weight}": self.neutral_weight,
            f"steps of {dials}": self.kl,
            f"rate {self.learning_rate}": self.learning_rate,
            f"at most {self.steps}": self.steps,
            f"batches of {self.batch_size}": self.batch_size,
            f"{self.kept_at_once} at once": self.kept_at_once,
            f"{self.attackers} attackers": self.attackers or None,
            f"first {self.skip} skipped": self.skip or None,
            "CIR": self.without_shared or None,
            "at equal damage": self.equal_damage or None,
            "as published": self.as_published or None,
            f"repair of {self.repair}": None if self.repair in (0, REPAIR) else self.repair,
            f"repair on {self.repair_retain}": self.repair_retain,
            f"repair at {self.repair_rate}": self.repair_rate,
            f"repair by {self.repair_hold}": self.repair_hold,
        }
        settings = ", ".join([self.retain, *(text for text, value in said.items() if value not in (None, ()))])
        return f"{self.objective} | {self.carrier} | {settings} | seed {self.seed}"

    @property
    def forgetting(self) -> Cell:
        """The same without the repair: what several cells may have in common, and is then run once."""
        plain: dict[str, None] = dict.fromkeys(("repair_retain", "repair_rate", "repair_hold"))
        return replace(self, repair=0, **plain)

    @property
    def last(self) -> str:
        """The moment that a run ends with."""
        if self.equal_damage:
            return f"KL {BUDGETS[-1]}"
        return "repaired" if self.repair else "end"


def ahead() -> list[Cell]:
    """What may reach the goals that `goals` missed, in order of value; cells that forget alike follow one another."""
    kept, free, deep, plain = _kept_whole(), _retain_free(), _deep(), _plain()
    turns = itertools.zip_longest(kept, deep, free, plain)
    return [cell for turn in turns for group in turn if group for cell in group]


def closer() -> list[Cell]:
    """What `ahead` left open: held by more rows a step, and longer repaired; for five processes, two lists of each."""
    kept = Cell("WGA", NATURAL_999, "both", hold="KL", weight=1.0, kl=(0.5,), steps=120, kept_at_once=MANY)
    kept = replace(kept, repair=160, repair_rate=3e-4)
    deep = replace(kept.forgetting, objective="unseen answers", carrier=NATURAL_99, weight=20.0, steps=60, attackers=2)
    free = replace(deep, retain="own and neutral", weight=10.0, steps=120, attackers=0)
    wga = replace(free, objective="WGA", kept_at_once=None)
    softly = {"repair": REPAIR, "repair_rate": 3e-4}
    of_first = [[kept, replace(kept, repair_rate=1e-3)], [replace(kept, seed=1)], [deep, replace(deep, repair=20)]]
    of_first += [[free, replace(free, **softly)], [replace(deep, seed=1)]]
    light = [[replace(wga, weight=weight), replace(wga, weight=weight, **softly)] for weight in (0.3, 0.1)]
    fast = replace(kept.forgetting, carrier=NATURAL_99, kl=(2.0,), kept_at_once=None)
    then = [[fast], [replace(kept, seed=2)], *light, [replace(free, weight=3.0)]]
    return [cell for group in of_first + then for cell in group]


def longer() -> list[Cell]:
    """What `closer` left open: the best rows' repair goes on, as 128 steps see each retain answer but twice."""
    kept = Cell("WGA", NATURAL_99, "both", hold="KL", weight=1.0, kl=(0.5,), steps=120, repair=400, repair_rate=1e-3)
    wide = replace(kept, carrier=NATURAL_999, repair_rate=5e-4)
    more = [replace(kept, repair_rate=2e-3), replace(kept, repair=800), wide]
    return [kept, *more, *_of_seeds([kept, *more], 1, 2)]


def together(cells: list[Cell], most: int = 3) -> list[list[Cell]]:
    """Cells that follow one another and forget alike, of which one process runs the forgetting once."""
    found = []
    for _, group in itertools.groupby(cells, lambda cell: cell.forgetting):
        alike = list(group)
        found += [alike[start : start + most] for start in range(0, len(alike), most)]
    return found


def goals() -> list[Cell]:
    """The questions of the goals: what forgets as much as gold at the utility of before, and at which damage."""
    wga, wga_99 = (Cell("WGA", carrier, repair=REPAIR) for carrier in (ALL, ADAMW_99))
    known = [
        each
        for cell in (wga, wga_99)
        for each in (
            replace(cell, retain="both", neutral_weight=10.0),
            cell,
            replace(cell, retain="both"),
            replace(cell, repair_retain="both", neutral_weight=10.0),
        )
    ]
    first, others = _natural()
    return [
        *_of_seeds(known, 0),
        *first, *others,
        *_npo(),
        *_without_retain_answers(),
        *_of_seeds(known, 1, 2),
        *_of_seeds(first, 1, 2),
        *_of_seeds(_without_retain_answers()[:3], 1, 2),
    ]  # fmt: skip


def papers(seed: int = 0) -> list[Cell]:
    """Objectives as their papers and OpenUnlearning run them: carrier, what is held and how, epochs, batches of 32.

    Rates are ten times the published ones, which are of models of 1B to 8B: for NPO that is what was chosen here.
    """
    ten = Cell("", ALL, "answers", seed, hold="CE", weight=1.0, learning_rate=1e-4, steps=10 * EPOCH, as_published=True)
    held = replace(ten, batch_size=32, kept_at_once=32)
    alone = replace(held, retain="none", hold=None, weight=None)
    own = replace(held, hold=None, weight=None)
    return [
        replace(held, objective="NPO 0.1"),
        replace(held, objective="SimNPO", weight=8.0),
        replace(held, objective="IdkDPO"),
        replace(held, objective="gradient ascent"),
        replace(alone, objective="UNDIAL", learning_rate=1e-3),
        replace(held, objective="WGA"),
        replace(held, objective="inverted hinge", carrier=LORA_8_16, learning_rate=1e-3, steps=5 * EPOCH),
        replace(held, objective="AltPO", learning_rate=5e-4, steps=2 * EPOCH),
        replace(own, objective="PDU"),
        replace(held, objective="SatImp", weight=10.0),
        replace(own, objective="Adaptive RMU", learning_rate=5e-4),
        replace(alone, objective="CE-U"),
        replace(held, objective="TPO"),
        replace(alone, objective="FLAT", steps=5 * EPOCH),
        replace(alone, objective="DELETE"),
        replace(alone, objective="gradient ascent"),
    ]


def equal(seed: int = 0) -> list[Cell]:
    """Every objective in every carrier, held alike, each followed to where its damage meets the budgets.

    The KL to the original is held with a weight of 1, so that the budgets end a run and not the hold; two objectives
    bring their own hold, which is a part of them.
    """
    from sentences import OBJECTIVES

    carriers = ((NATURAL, ALL), (LORA_8, ADAMW), (LORA_13,))
    every = itertools.product(("both", "own and neutral"), carriers, OBJECTIVES)
    own = Cell("", "", seed=seed, steps=40, batch_size=20, kept_at_once=20, equal_damage=True)
    alike = replace(own, hold="KL", weight=1.0)
    return [
        replace(
            own if objective in ("Adaptive RMU", "PDU") else alike, objective=objective, carrier=carrier, retain=retain,
            kl=(0.5,) if carrier == NATURAL else (),
        )
        for retain, together, objective in every
        for carrier in together
    ]  # fmt: skip


def _natural() -> tuple[list[Cell], list[Cell]]:
    """Natural gradients with a softer hold and longer steps: the likeliest ways first, then what is around them."""
    wga = Cell("WGA", NATURAL, "both", hold="KL", weight=1.0, kl=(0.5,), steps=120, repair=REPAIR)
    npo, unseen = replace(wga, objective="NPO 0.03", weight=30.0), replace(wga, objective="unseen answers")
    first = [
        wga,
        replace(wga, kl=(0.5, 0.1)),
        replace(wga, repair_rate=3e-4),
        npo,
        replace(unseen, weight=10.0),
    ]
    others = [
        replace(wga, kl=(0.1,)),
        replace(wga, kl=(2.0, 0.5)),
        replace(wga, weight=0.3),
        replace(wga, weight=3.0),
        replace(wga, neutral_weight=5.0),
        replace(wga, carrier=NATURAL_99),
        replace(npo, weight=10.0),
        replace(unseen, weight=30.0, kl=()),
        Cell("WGA", ALL, "both", hold="KL", weight=10.0, repair=REPAIR),
        Cell("WGA", ADAMW_99, "both", hold="KL", weight=10.0, repair=REPAIR),
        Cell("WGA", ADAMW, "both", neutral_weight=10.0, repair=REPAIR),
    ]
    return first, others


def _npo() -> list[Cell]:
    """NPO in all weights, for the seconds until it forgets as much, beside NPO in cores."""
    base = Cell("NPO 0.03", ALL, "both")
    return [
        base,
        replace(base, learning_rate=3e-4, steps=120, repair=REPAIR),
        replace(base, hold="CE", weight=1.0, steps=120, repair=REPAIR),
        Cell("NPO 0.03", ADAMW_99, "both", repair=REPAIR),
        Cell("NPO 0.03", NATURAL, "both"),
    ]


def _without_retain_answers() -> list[Cell]:
    """With neutral text alone; a repair there is by the KL to the original."""
    base = Cell("NPO 0.03", NATURAL, "neutral")
    return [
        base,
        replace(base, objective="unseen answers"),
        replace(base, objective="WGA", weight=1.0, kl=(0.5,), steps=120),
        replace(base, objective="unseen answers", weight=100.0),
        replace(base, repair=40),
    ]


def _kept_whole() -> list[list[Cell]]:
    """Toward all of the utility: longer repairs, a stronger hold in a wider subspace, more retain answers a step."""
    best = Cell("WGA", NATURAL_99, "both", hold="KL", weight=1.0, kl=(0.5,), steps=120)
    by_adam = replace(best, repair=128, repair_rate=1e-3)
    wider = replace(best, carrier=NATURAL_999)
    many = replace(best, kept_at_once=150)
    return [
        [by_adam, replace(by_adam, repair_rate=3e-4), best],
        [replace(best, repair=200), replace(by_adam, repair_hold="KL")],
        [replace(wider, repair=128, repair_rate=1e-3), replace(wider, repair=REPAIR)],
        [replace(many, repair=128, repair_rate=1e-3), replace(many, repair=REPAIR)],
        [replace(by_adam, weight=2.0), replace(by_adam, weight=2.0, repair=REPAIR, repair_rate=None)],
        [replace(by_adam, kl=(2.0,)), replace(by_adam, kl=(2.0,), repair=0, repair_rate=None)],
    ]


def _retain_free() -> list[list[Cell]]:
    """Held by what the model itself answers about others, and neutral text."""
    own = Cell("WGA", NATURAL_99, "own and neutral", hold="KL", weight=1.0, kl=(0.5,), steps=120)
    repaired = replace(own, repair=100, repair_rate=1e-3)
    several = [own, replace(own, weight=3.0), replace(own, weight=10.0), replace(own, kept_at_once=150)]
    several += [replace(own, objective="NPO 0.03", weight=30.0), replace(own, objective="unseen answers", weight=10.0)]
    of_each = {"repair": 100, "repair_rate": 1e-3}
    return [[replace(each, **of_each), each] for each in (several[1], several[0], *several[2:])] + [
        [replace(repaired, retain="own")]
    ]


def _deep() -> list[list[Cell]]:
    """Toward what does not come back: attackers simulated, or directions left out."""
    wga = Cell("WGA", NATURAL_99, "both", hold="KL", weight=1.0, kl=(0.5,), steps=80, attackers=2)
    unseen = replace(wga, objective="unseen answers", weight=10.0)
    all_weights = Cell("WGA", ALL, "both", steps=80, attackers=2)
    plain = replace(wga, steps=120, attackers=0)
    several = [wga, unseen, all_weights, replace(wga, attackers=4), replace(wga, weight=3.0, steps=120)]
    several += [replace(plain, skip=8), replace(plain, without_shared=True), replace(wga, carrier=NATURAL_999)]
    return [[each, replace(each, repair=REPAIR)] for each in several]


def _plain() -> list[list[Cell]]:
    """All weights and LoRA, as they are used, for the seconds until they forget as much."""
    npo = Cell("NPO 0.03", ALL, "both", hold="CE", weight=1.0, steps=120)
    lora = [Cell(objective, LORA_8, "both") for objective in ("WGA", "NPO 0.03")]
    return [
        [replace(npo, learning_rate=3e-4, repair=REPAIR), replace(npo, learning_rate=3e-4)],
        [replace(lora[0], repair=REPAIR), lora[0]],
        [replace(npo, repair=REPAIR), npo],
        [replace(lora[1], repair=REPAIR), lora[1]],
        [Cell("NPO 0.03", NATURAL_99, "both", hold="KL", weight=30.0, kl=(0.5,), steps=120, repair=REPAIR)],
    ]


def _of_seeds(cells: list[Cell], *seeds: int) -> list[Cell]:
    return [replace(cell, seed=seed) for seed in seeds for cell in cells]


LISTS = {"ahead": ahead, "closer": closer, "equal": equal, "goals": goals, "longer": longer, "papers": papers}
