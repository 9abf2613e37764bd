"""How deep answers are forgotten: what five attackers bring back of them, beside the model that never saw them.

    python benchmarks/tofu/deep_forgetting.py --models MODELS --data TOFU --neutral TEXTS --workers 4

Three parts. `depth`: NPO and unseen-answer matching at the weights alone, and under simulated relearning with several
weights of the retain KL; and weights that were partly set anew and distilled on what is kept. `directions`: SEMU's
leading directions against what RepSelect and CIR say of them (the leading ones skipped, made small or taken out of each
step), each stopped at the same forgetting. `together`: simulated relearning with what CIR says left out of each step.

A run stops once the mean answer is as unlikely as answers that the model never learnt; *until relearnt* goes on until
it is so after an attack too. No attacker has a seed of the simulation; three are of a kind that was not simulated: SGD,
the last block alone, and retain answers alone. The goal: with each of them, what comes back of the answers that it does
not have is at most 1.5 times what comes back with gold.

Rows come in the order of what they are likely to show. Run it again to complete the table: each row is written when it
is done. On a GPU a row takes some twenty seconds and several processes use it better than one; on one CPU core a row
takes some five minutes, one under simulated relearning a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from machine import DEVICE, about, clock
from measure import Relearnt, damage, write
from peft import get_peft_model
from subjects import Subject, ask_for_folders, load, read_subject
from torch import nn
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import side_by_side

from semu_peft import Callback, NaturalGradient, Retain, SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.gradients.covariance import LayerCovariance
from semu_peft.gradients.gather import gather
from semu_peft.language import TextExamples, unseen_answers
from semu_peft.language.shapes import as_example
from semu_peft.objectives import Attacker, CrossEntropy, SimulatedRelearning
from semu_peft.objectives.attackers import Relearner
from semu_peft.objectives.examples import Examples
from semu_peft.objectives.language import sequence_nll
from semu_peft.training.rules import RemoveDirections, RemoveLeading, Rule

BATCH_SIZE, AT_ONCE = 40, 100
LINEAR = r".*\.(q|k|v|o|gate|up|down)_proj"
PROJECTIONS = [f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")]
# Without retain answers, as those who attack in the end: they would hold an attacker back, and take most of the time.
SIMULATED = [
    Attacker("adam", 1e-4, steps=10, forget_examples=20, retain_examples=0),
    Attacker("adam", 3e-4, steps=5, forget_examples=20, retain_examples=0),
]
SEVERAL = [
    Attacker("adam", 1e-4, steps=20, forget_examples=20, retain_examples=0),
    Attacker("adam", 1e-3, steps=5, forget_examples=20, retain_examples=0),
    Attacker("adam", 3e-4, steps=10, forget_examples=40, retain_examples=0),
    Attacker("adam", 1e-3, steps=10, forget_examples=10, retain_examples=0),
]
LOOK_EVERY = 10  # steps: an attack to see whether to stop costs as much as a step and more
STOP_SEED, ATTACK_SEED = 500, 1_000
POOL, LONGEST = (
    400,
    96,
)  # retain answers that attackers draw from, and the tokens of the longest: one batch, little padding
SHARED = 8  # leading directions that are skipped, made small or taken out
ALLOWED = 1.5  # times gold's own probability


def attackers(steps: int) -> list[Attacker]:
    """The one of the main table, another rate, and three of kinds that are not simulated."""
    few: dict[str, Any] = {"forget_examples": 20, "steps": steps}
    return [
        Attacker("adam", 1e-4, name="Adam 1e-4", **few),
        Attacker("adam", 1e-3, name="Adam 1e-3", **few),
        Attacker("sgd", 1e-2, name="SGD 1e-2", **few),
        Attacker("adam", 1e-3, layers=r".*layers\.3\..*", name="last block, Adam 1e-3", **few),
        Attacker("adam", 1e-4, forget_examples=0, retain_examples=20, steps=steps, name="retain answers, Adam 1e-4"),
    ]


@dataclass(frozen=True)
class Way:
    """How a row's model is made.

    Attributes:
        objective: `"npo"` or `"unseen"`.
        simulated: The attackers under whom it is minimised; none are simulated by default.
        kl_weight: Of the KL to the original on retain answers.
        gamma: Share of the gradient's energy in SEMU's subspace; None trains all weights by AdamW.
        skip: Leading directions that the subspace leaves out.
        rule: What each step may not do: `"soft"` and `"hard"` of `RemoveLeading`, or `"cir"`.
        until_relearnt: Go on until the answers are unlikely after an attack too, for up to three times the steps.
        rate: Of AdamW, for cores too; by default cores are trained by natural gradients.
        length: Times the steps.
        most: Steps at most, instead.
        kl: How far a step of natural gradients may move the outputs.
        neutral: Whether the KL to the original is held on neutral text too, not that on which damage is measured.
        anew: Instead of an objective on the forget answers: this share of all weights is set anew, and the model is
            distilled from the original on the retain answers alone (UNDO, arXiv 2506.06278, whose teacher has forgotten
            first).
    """

    objective: Literal["npo", "unseen"] = "npo"
    simulated: tuple[Attacker, ...] = ()
    kl_weight: float = 100.0
    gamma: float | None = 0.5
    skip: int = 0
    rule: Literal["soft", "hard", "cir"] | None = None
    until_relearnt: bool = False
    rate: float | None = None
    length: int = 1
    most: int | None = None
    kl: float = 0.1
    neutral: bool = False
    anew: float | None = None


def simulated(objective: Literal["npo", "unseen"], kl_weight: float, gamma: float | None = 0.5) -> Way:
    """Two attackers in turn, until the answers are unlikely."""
    return Way(objective, tuple(SIMULATED), kl_weight, gamma)


def until_relearnt(objective: Literal["npo", "unseen"], kl_weight: float, gamma: float | None, **settings: Any) -> Way:
    """Four attackers in turn, until the answers are unlikely after an attack too."""
    return Way(objective, tuple(SEVERAL), kl_weight, gamma, until_relearnt=True, **settings)


def both_held(attackers: list[Attacker], kl_weight: float, gamma: float = 0.99, neutral: bool = True) -> Way:
    """Natural gradients in steps of half a nat, with retain answers and neutral text held."""
    return Way("unseen", tuple(attackers), kl_weight, gamma, until_relearnt=True, most=80, kl=0.5, neutral=neutral)


FAST: dict[str, Any] = {"rate": 3e-4, "length": 2}
DEPTH = {
    "unseen answers, two attackers, KL × 10 on retain answers and neutral text, γ 0.99": both_held(SIMULATED, 10.0),
    "unseen answers, two attackers, KL × 30 on retain answers and neutral text, γ 0.99": both_held(SIMULATED, 30.0),
    "unseen answers, four attackers, KL × 10 on retain answers and neutral text, γ 0.99": both_held(SEVERAL, 10.0),
    "unseen answers, four attackers, KL × 3 on retain answers and neutral text, γ 0.99": both_held(SEVERAL, 3.0),
    "unseen answers, two attackers, KL × 10 on retain answers, γ 0.99": both_held(SIMULATED, 10.0, neutral=False),
    "all weights, unseen answers, until relearnt, retain KL × 3, AdamW 3e-4": until_relearnt(
        "unseen", 3.0, None, **FAST
    ),
    "half of all weights anew, distilled on retain answers": Way(anew=0.5, rate=1e-3, length=30),
    "all weights, NPO, until relearnt, retain KL × 1, AdamW 3e-4": until_relearnt("npo", 1.0, None, **FAST),
    "unseen answers, until relearnt, retain KL × 10, γ 0.99, AdamW 3e-3": until_relearnt(
        "unseen", 10.0, 0.99, rate=3e-3
    ),
    "four fifths of all weights anew, distilled on retain answers": Way(anew=0.8, rate=1e-3, length=60),
    "NPO": Way(),
    "unseen answers, until relearnt, retain KL × 30, γ 0.9": until_relearnt("unseen", 30.0, 0.9),
    "NPO, until relearnt, retain KL × 30, γ 0.9": until_relearnt("npo", 30.0, 0.9),
    "unseen answers, until relearnt, retain KL × 10, γ 0.9": until_relearnt("unseen", 10.0, 0.9),
    "all weights, unseen answers, until relearnt, retain KL × 10": until_relearnt("unseen", 10.0, None),
    "all weights, NPO, until relearnt, retain KL × 10": until_relearnt("npo", 10.0, None),
    "NPO, simulated, retain KL × 30, γ 0.9": simulated("npo", 30.0, 0.9),
    "unseen answers, until relearnt, retain KL × 30": until_relearnt("unseen", 30.0, 0.5),
    "NPO, simulated, retain KL × 30": simulated("npo", 30.0),
    "unseen answers": Way("unseen"),
    "NPO, simulated, retain KL × 100": simulated("npo", 100.0),
    "unseen answers, simulated, retain KL × 30": simulated("unseen", 30.0),
    "unseen answers, simulated, retain KL × 100": simulated("unseen", 100.0),
}
# In long steps, so that all of them come to the level where they are compared.
LEADING, WEIGHTS = (
    Way("unseen", kl_weight=10.0, gamma=0.9, kl=0.5),
    Way("unseen", kl_weight=10.0, gamma=None, rate=3e-4),
)
DIRECTIONS = {
    "SEMU, leading directions": LEADING,
    "SEMU, CIR": replace(LEADING, rule="cir"),
    "SEMU, leading removed (hard)": replace(LEADING, rule="hard"),
    f"SEMU, the first {SHARED} skipped": replace(LEADING, skip=SHARED),
    "all weights": WEIGHTS,
    "all weights, CIR": replace(WEIGHTS, rule="cir"),
    "all weights, leading removed (hard)": replace(WEIGHTS, rule="hard"),
    "SEMU, leading made small (soft)": replace(LEADING, rule="soft"),
    "all weights, leading made small (soft)": replace(WEIGHTS, rule="soft"),
}
TOGETHER = {
    "unseen answers, two attackers, CIR, KL × 10 on retain answers and neutral text, γ 0.99": replace(
        both_held(SIMULATED, 10.0), rule="cir"
    ),
    "all weights, unseen answers, two attackers, CIR, KL × 10 on retain answers and neutral text, AdamW 3e-4": replace(
        both_held(SIMULATED, 10.0), rule="cir", gamma=None, rate=3e-4
    ),
}
PARTS = {"depth": DEPTH, "directions": DIRECTIONS, "together": TOGETHER}
ENDS = ("retrained (gold)", "original (do nothing)")


@dataclass(frozen=True)
class Asked:
    """What a row is made from: plain values, as another process makes it."""

    models: Path
    data: Path
    neutral: Path
    steps: int
    attack_steps: int
    rate: float
    seed: int
    is_smoke: bool = False


@dataclass(frozen=True)
class Texts:
    """The subject's texts as tokens, on the device, once a process.

    Attributes:
        forget: All answers to forget; `retain` those to keep.
        told: The former as batches to be scored.
        few: One in five of them; `kept` are the first hundred of the latter.
        pools: One batch each, that attackers draw from.
        unseen: How unlikely the original finds answers that it never learnt.
    """

    subject: Subject = field(repr=False)
    original: nn.Module
    forget: TextExamples
    retain: TextExamples
    told: list[Any]
    few: list[Any]
    kept: list[Any]
    pools: tuple[Examples, Examples]
    unseen: torch.Tensor


@lru_cache(maxsize=1)
def texts_of(asked: Asked) -> Texts:
    """Read and encode everything."""
    torch.set_num_threads(1 if DEVICE.type == "cuda" else torch.get_num_threads())
    torch.set_float32_matmul_precision("high")
    disable_progress_bar()
    subject = read_subject(asked.models, asked.data, asked.neutral)
    if asked.is_smoke:
        few = {"forget": subject.forget[:10], "retain": subject.retain[:20], "neutral": subject.neutral[:4]}
        subject = replace(subject, **few, more_neutral=subject.more_neutral[:4])
    original = load(subject.original).requires_grad_(False)
    forget, retain = (subject.examples(rows) for rows in (subject.forget, subject.retain))
    short = [row for row in range(len(retain)) if len(retain[row]["input_ids"]) <= LONGEST][:POOL]
    pools = [Examples(batches(subject, [rows[place] for place in places], len(places))) for rows, places in (
        (subject.forget, range(len(forget))), (subject.retain, short),
    )]  # fmt: skip
    wrong = unseen_answers([as_example(row) for row in subject.forget], seed=asked.seed)
    unlearnt = subject.nll(original, [(each.prompt, each.answer) for each in wrong]).float()
    return Texts(
        subject, original, forget, retain, batches(subject, subject.forget), batches(subject, subject.forget[::5]),
        batches(subject, subject.retain[:100]), (pools[0], pools[1]), unlearnt,
    )  # fmt: skip


def batches(subject: Subject, rows: list[Any], size: int = AT_ONCE) -> list[Any]:
    """Rows as batches of tokens on the device, in their order."""
    loader = subject.examples(rows).loader(size, shuffle=False)
    return [{name: value.to(DEVICE) for name, value in batch.items()} for batch in loader]


def probability(model: nn.Module, told: list[Any]) -> torch.Tensor:
    """The mean probability a token of each answer, `(N,)`."""
    return sequence_nll(model, told, progress=False).neg().exp()


# ---- unlearning ----


@dataclass
class StopAt(Callback):
    """End the run once the answers are as unlikely as wanted, so that all rows have forgotten alike.

    Attributes:
        read: How unlikely they are.
        level: How unlikely is enough.
        every: After how many steps it is looked at.
        reached: What was read last; `path` is all of it.
        steps: How many there were.
    """

    read: Callable[[nn.Module], float]
    level: float
    every: int = 1
    reached: float = 0.0
    path: list[float] = field(default_factory=list)
    steps: int = 0

    def on_step_end(self, context: Any) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        self.reached = self.read(context.model)
        self.path.append(round(self.reached, 2))
        if self.reached >= self.level:
            context.control.stop("the answers are as unlikely as unseen ones")


def unlikely(texts: Texts, model: nn.Module, attacker: Attacker | None) -> float:
    """The mean NLL of answers, or of those that an attacker does not have, once it has trained."""
    if attacker is None:
        return float(sequence_nll(model, texts.few, progress=False).mean())
    relearner = attack(texts, model, attacker, STOP_SEED)
    for _ in range(attacker.steps):
        relearner.step()
    told = sequence_nll(relearner.model, texts.told, progress=False)
    return float(told[others(texts, relearner)].mean())


def unlearned(texts: Texts, way: Way, asked: Asked) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a row, merged, and what it cost."""
    model, started = load(texts.subject.original), clock()
    if way.anew is not None:
        return model, {**distilled(texts, model, way, asked), "seconds": clock() - started}
    reference = texts.original if way.gamma is None else None
    plain: Any = objectives.NPO(beta=0.03, reference=reference)
    if way.objective == "unseen":
        plain = objectives.UnseenAnswer(texts.unseen, reference)
    adapted: Any = model
    if way.gamma is not None:
        adapted = get_peft_model(model, SemuConfig(target_modules=LINEAR, explained_variance=way.gamma))
        chosen = texts.forget.loader(BATCH_SIZE, shuffle=False)
        initialize_semu_weights(adapted, chosen, plain, skip_leading=way.skip, progress=False)
    steps = asked.steps * (1 if asked.is_smoke else way.length) * (3 if way.until_relearnt else 1)
    if way.most is not None and not asked.is_smoke:
        steps = way.most
    objective, natural = plain, None
    known = [replace(each, steps=1) if asked.is_smoke else each for each in way.simulated]
    if known:
        pools = (pool.batches for pool in texts.pools)
        objective = SimulatedRelearning(plain, *pools, known, copies=16, seed=asked.seed)
        natural = NaturalGradient(kl=way.kl, patience=steps)  # the loss rises and falls with each attack
    kept = [texts.retain, *([texts.subject.examples(texts.subject.more_neutral)] if way.neutral else [])]
    hold = [
        Retain(each.loader(BATCH_SIZE, seed=asked.seed + at), objectives.KLToOriginal(reference), way.kl_weight)
        for at, each in enumerate(kept)
    ]
    attacker = known[0] if way.until_relearnt else None
    every = LOOK_EVERY if way.until_relearnt else 1
    stop = StopAt(lambda now: unlikely(texts, now, attacker), float(texts.unseen.mean()), every)
    rate = way.rate or (asked.rate if way.gamma is None else None)
    result = unlearn(
        adapted, texts.forget.loader(BATCH_SIZE, seed=asked.seed), objective, retain=hold,
        rules=_rules(way, adapted, texts.forget, plain), learning_rate=rate,
        optimizer=natural if rate is None else None,
        max_steps=steps, callbacks=[stop], progress=False, seed=asked.seed,
    )  # fmt: skip
    cost = {
        "steps": result.steps, "trained": result.trainable_parameters, "seconds": clock() - started,
        "answer_nll": stop.reached, "level": stop.level, "until_relearnt": way.until_relearnt,
        "path": stop.path, "stop_reason": result.stop_reason,
    }  # fmt: skip
    return (adapted.merge_and_unload() if way.gamma is not None else model), cost


def distilled(texts: Texts, model: nn.Module, way: Way, asked: Asked) -> dict[str, Any]:
    """Set a share of all weights anew, and let the original teach the model what it says on retain answers."""
    assert way.anew is not None
    torch.manual_seed(asked.seed)
    fresh = type(model)(model.config).to(DEVICE)
    with torch.no_grad():
        for weight, other in zip(model.parameters(), fresh.parameters(), strict=True):
            weight.lerp_(other.to(weight), way.anew)
    result = unlearn(
        model.requires_grad_(), texts.retain.loader(BATCH_SIZE, seed=asked.seed),
        objectives.KLToOriginal(texts.original), learning_rate=way.rate,
        max_steps=asked.steps * (1 if asked.is_smoke else way.length),
        progress=False, seed=asked.seed,
    )  # fmt: skip
    return {"steps": result.steps, "trained": result.trainable_parameters, "stop_reason": result.stop_reason}


def _rules(way: Way, model: nn.Module, forget: Any, objective: Any) -> list[Rule]:
    if way.rule in ("soft", "hard"):
        return [RemoveLeading(SHARED, way.rule)]
    if way.rule == "cir":
        loader = forget.loader(BATCH_SIZE, shuffle=False)
        shared = gather(model, loader, objective, targets=PROJECTIONS, statistic=LayerCovariance, progress=False)
        return [RemoveDirections.shared(shared, inputs=SHARED, outputs=SHARED)]
    return []


# ---- measuring ----


def row(task: tuple[str, Asked]) -> dict[str, Any]:
    """A row of the table, made and measured."""
    name, asked = task
    texts = texts_of(asked)
    if name in ENDS:
        model, cost = load(texts.subject.gold if name == ENDS[0] else texts.subject.original), {}
    else:
        part, _, way = name.partition(": ")
        model, cost = unlearned(texts, PARTS[part][way], asked)
    return {**measured(texts, model, asked.attack_steps), **cost}


def measured(texts: Texts, model: nn.Module, attack_steps: int) -> dict[str, Any]:
    """What is left, what it cost the rest, and the curve of every attacker."""
    at = tuple(sorted({attack_steps * part // 4 for part in range(5)}))
    return {
        "probability": float(probability(model, texts.told).mean()),
        "retain_probability": float(probability(model, texts.kept).mean()),
        "neutral_kl": damage(texts.subject, texts.original, model),
        "attacks": {each.label: asdict(relearnt(texts, model, each, at)) for each in attackers(attack_steps)},
    }


def attack(texts: Texts, model: nn.Module, attacker: Attacker, seed: int) -> Relearner:
    """An attacker at work, with retain answers where it has no answer to forget."""
    forget, retain = texts.pools
    kept = None if attacker.forget_examples else retain
    return Relearner(model, attacker, forget, kept, CrossEntropy(), torch.Generator().manual_seed(seed))


def others(texts: Texts, relearner: Relearner) -> list[int]:
    """The answers that an attacker does not have; all, where it has none."""
    drawn = {place for _, place in relearner.rows}
    return [place for place in range(len(texts.forget)) if place not in drawn] or list(drawn)


def relearnt(texts: Texts, model: nn.Module, attacker: Attacker, at: tuple[int, ...]) -> Relearnt:
    """The mean probability of the answers while an attacker trains; the model stays as it is."""
    relearner = attack(texts, model, attacker, ATTACK_SEED)
    curve = relearner.curve(at, lambda changed: probability(changed, texts.told))
    left = others(texts, relearner)
    return Relearnt(
        at,
        tuple(round(float(each[left].mean()), 5) for each in curve),
        tuple(round(float(each.mean()), 5) for each in curve),
    )


def table(rows: dict[str, Any]) -> list[str]:
    """A line a row; of each attacker what it brings back of the answers that it does not have, over gold's own."""
    gold = rows[ENDS[0]]["attacks"]
    heads = ["P(answer)", "P(retain)", "neutral KL", *gold, f"within {ALLOWED}", "goal", "steps", "trained", "seconds"]
    lines = [f"| way | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for name, row in rows.items():
        ratios = [row["attacks"][each]["others"][-1] / max(gold[each]["others"][-1], 1e-9) for each in gold]
        within = sum(ratio <= ALLOWED for ratio in ratios)
        cells = [f"{row[key]:.3g}" for key in ("probability", "retain_probability", "neutral_kl")]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        cells += [f"{within} of {len(ratios)}", "met" if within == len(ratios) else "missed"]
        short = row.get("answer_nll", 0.0) < row.get("level", 0.0)
        cells.append(f"{row['steps']}{' (not there)' if short else ''}" if "steps" in row else "–")
        cells += [f"{row[key]:,.0f}" if key in row else "–" for key in ("trained", "seconds")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    args = _arguments()
    if args.smoke:
        args.steps, args.attack_steps = 1, 2
    settings = {"steps": args.steps, "attack_steps": args.attack_steps, "seed": args.seed, "rate": args.learning_rate}
    document: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"asked": settings}
    if document["asked"] != settings:
        raise SystemExit(f"{args.output} was made with {document['asked']}, got {settings}. Give another `--output`.")
    document |= about(args.workers)
    document["command"] = " ".join(["python benchmarks/tofu/deep_forgetting.py", *sys.argv[1:]])
    rows = document.setdefault("rows", {})
    names = [f"{part}: {way}" for part in args.parts for way in PARTS[part]]
    names = [*ENDS, *(name for name in names if not args.only or any(each in name for each in args.only))]
    where = args.models, args.data, args.neutral
    asked = Asked(*where, args.steps, args.attack_steps, args.learning_rate, args.seed, args.smoke)
    tasks = [(name, asked) for name in names if name not in rows]
    for (name, _), made, error, seconds in side_by_side(row, tasks, args.workers, args.seconds):
        if error:
            print(f"{name}: failed\n{error}", flush=True)
            continue
        rows[name] = made
        print(f"{name}: P {made['probability']:.3g}, {seconds:.0f} s", flush=True)
        known = [*ENDS, *(f"{part}: {way}" for part in PARTS for way in PARTS[part])]
        document["rows"] = rows = {each: rows[each] for each in known if each in rows}
        document["table"] = table(rows) if ENDS[0] in rows else []
        document["missing"] = [each for each in names if each not in rows]
        write(args.output, document)
    print(*document.get("table", []), sep="\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_for_folders(parser)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--only", nargs="+", help="only the ways whose name contains one of these")
    parser.add_argument(
        "--steps", type=int, default=40, help="of unlearning, at most; three times as many until relearnt"
    )
    parser.add_argument("--attack-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of AdamW, where all weights are trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that make rows side by side")
    parser.add_argument("--seconds", type=float, help="begin no row that would not be done after so long")
    parser.add_argument("--smoke", action="store_true", help="few answers and steps, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/deep_forgetting_text.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
