"""How deep answers are forgotten: what five attackers bring back of them, beside the model that never saw them.

    OMP_NUM_THREADS=1 python benchmarks/tofu/deep_forgetting.py --models MODELS --data TOFU --neutral TEXTS

Two parts. `depth`: NPO and unseen-answer matching at the weights alone, and under simulated relearning with several
weights of the retain KL. `directions`: SEMU's leading directions against what RepSelect and CIR say of them (the
leading ones skipped, made small or taken out of each step), each stopped at the same forgetting.

Every run stops once the mean answer is as unlikely as answers that the model never learnt. No attacker has a seed of
the simulation; three are of a kind that was not simulated: SGD, the last block alone, and retain answers alone. Run it
again to complete the table: each row is written when it is done. A row takes some five minutes of one CPU core, one
under simulated relearning a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from measure import damage, relearnt, write
from peft import get_peft_model
from subjects import Subject, load, read_subject
from torch import nn

from semu_peft import Callback, Retain, SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.gradients.covariance import LayerCovariance
from semu_peft.gradients.gather import gather
from semu_peft.language import unseen_answers
from semu_peft.language.shapes import as_example
from semu_peft.objectives import Attacker, SimulatedRelearning
from semu_peft.training.rules import RemoveDirections, RemoveLeading, Rule

BATCH_SIZE = 40
LINEAR = r".*\.(q|k|v|o|gate|up|down)_proj"
PROJECTIONS = [f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")]
SIMULATED = [
    Attacker("adam", 1e-4, steps=10, forget_examples=20),
    Attacker("adam", 3e-4, steps=5, forget_examples=20),
]
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
        is_deep: Under simulated relearning.
        kl_weight: Of the KL to the original on retain answers.
        gamma: Share of the gradient's energy in SEMU's subspace; None trains all weights by AdamW.
        skip: Leading directions that the subspace leaves out.
        rule: What each step may not do: `"soft"` and `"hard"` of `RemoveLeading`, or `"cir"`.
    """

    objective: Literal["npo", "unseen"] = "npo"
    is_deep: bool = False
    kl_weight: float = 100.0
    gamma: float | None = 0.5
    skip: int = 0
    rule: Literal["soft", "hard", "cir"] | None = None


DEPTH = {
    "NPO": Way(),
    "unseen answers": Way("unseen"),
    "NPO, simulated, retain KL × 100": Way(is_deep=True),
    "NPO, simulated, retain KL × 30": Way(is_deep=True, kl_weight=30.0),
    "NPO, simulated, retain KL × 30, γ 0.9": Way(is_deep=True, kl_weight=30.0, gamma=0.9),
    "unseen answers, simulated, retain KL × 100": Way("unseen", is_deep=True),
    "unseen answers, simulated, retain KL × 30": Way("unseen", is_deep=True, kl_weight=30.0),
}
DIRECTIONS = {
    "SEMU, leading directions": Way(),
    f"SEMU, the first {SHARED} skipped": Way(skip=SHARED),
    "SEMU, leading made small (soft)": Way(rule="soft"),
    "SEMU, leading removed (hard)": Way(rule="hard"),
    "SEMU, CIR": Way(rule="cir"),
    "all weights": Way(gamma=None),
    "all weights, leading made small (soft)": Way(gamma=None, rule="soft"),
    "all weights, leading removed (hard)": Way(gamma=None, rule="hard"),
    "all weights, CIR": Way(gamma=None, rule="cir"),
}
PARTS = {"depth": DEPTH, "directions": DIRECTIONS}


# ---- unlearning ----


@dataclass
class StopAt(Callback):
    """End the run once the answers are as unlikely as wanted, so that all rows have forgotten alike."""

    read: Callable[[nn.Module], float]
    level: float
    reached: float = 0.0

    def on_step_end(self, context: Any) -> None:
        self.reached = self.read(context.model)
        if self.reached >= self.level:
            context.control.stop("the answers are as unlikely as unseen ones")


def unlearned(subject: Subject, way: Way, steps: int, rate: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a row, merged, and what it cost."""
    model, started = load(subject.original), time.process_time()
    reference = load(subject.original).requires_grad_(False) if way.gamma is None else None
    wrong = unseen_answers([as_example(row) for row in subject.forget], seed=seed)
    unseen = subject.nll(model, [(each.prompt, each.answer) for each in wrong]).float()
    forget, retain = (subject.examples(rows) for rows in (subject.forget, subject.retain))
    plain: Any = objectives.NPO(beta=0.03, reference=reference)
    if way.objective == "unseen":
        plain = objectives.UnseenAnswer(unseen, reference)
    adapted: Any = model
    if way.gamma is not None:
        adapted = get_peft_model(model, SemuConfig(target_modules=LINEAR, explained_variance=way.gamma))
        batches = forget.loader(BATCH_SIZE, shuffle=False)
        initialize_semu_weights(adapted, batches, plain, skip_leading=way.skip, progress=False)
    objective = plain
    if way.is_deep:
        sources = (list(each.loader(BATCH_SIZE, shuffle=False)) for each in (forget, retain))
        objective = SimulatedRelearning(plain, *sources, SIMULATED, seed=seed)
    few, hold = subject.told[::5], objectives.KLToOriginal(reference=reference)
    stop = StopAt(lambda now: float(subject.nll(now, few).mean()), float(unseen.mean()))
    result = unlearn(
        adapted, forget.loader(BATCH_SIZE, seed=seed), objective,
        retain=Retain(retain.loader(BATCH_SIZE, seed=seed), hold, way.kl_weight),
        rules=_rules(way, adapted, forget, plain), learning_rate=rate if way.gamma is None else None,
        max_steps=steps, callbacks=[stop], progress=False, seed=seed,
    )  # fmt: skip
    cost = {
        "steps": result.steps, "trained": result.trainable_parameters, "seconds": time.process_time() - started,
        "answer_nll": stop.reached, "level": stop.level,
    }  # fmt: skip
    return (adapted.merge_and_unload() if way.gamma is not None else model), cost


def _rules(way: Way, model: nn.Module, forget: Any, objective: Any) -> list[Rule]:
    if way.rule in ("soft", "hard"):
        return [RemoveLeading(SHARED, way.rule)]
    if way.rule == "cir":
        loader = forget.loader(BATCH_SIZE, shuffle=False)
        shared = gather(model, loader, objective, targets=PROJECTIONS, statistic=LayerCovariance, progress=False)
        return [RemoveDirections.shared(shared, inputs=SHARED, outputs=SHARED)]
    return []


# ---- measuring ----


def measured(subject: Subject, original: nn.Module, model: nn.Module, attack_steps: int) -> dict[str, Any]:
    """What is left, what it cost the rest, and the curve of every attacker."""
    kept = [(row["question"], row["answer"]) for row in subject.retain[:100]]
    at = tuple(sorted({attack_steps * part // 4 for part in range(5)}))
    return {
        "probability": float(subject.nll(model, subject.told).neg().exp().mean()),
        "retain_probability": float(subject.nll(model, kept).neg().exp().mean()),
        "neutral_kl": damage(subject, original, model),
        "attacks": {each.label: asdict(relearnt(subject, model, each, at)) for each in attackers(attack_steps)},
    }


def table(rows: dict[str, Any]) -> list[str]:
    """A line a row; of each attacker what it brings back of the answers that it does not have, over gold's own."""
    gold = rows["retrained (gold)"]["attacks"]
    heads = ["P(answer)", "P(retain)", "neutral KL", *gold, f"within {ALLOWED}", "steps", "trained", "CPU s"]
    lines = [f"| way | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for name, row in rows.items():
        ratios = [row["attacks"][attack]["others"][-1] / max(gold[attack]["others"][-1], 1e-9) for attack in gold]
        cells = [f"{row[key]:.3g}" for key in ("probability", "retain_probability", "neutral_kl")]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        cells.append(f"{sum(ratio <= ALLOWED for ratio in ratios)} of {len(ratios)}")
        short = row.get("answer_nll", 0.0) < row.get("level", 0.0)
        cells.append(f"{row['steps']}{' (not there)' if short else ''}" if "steps" in row else "–")
        cells += [f"{row[key]:,.0f}" if key in row else "–" for key in ("trained", "seconds")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    args = _arguments()
    subject = read_subject(args.models, args.data, args.neutral)
    asked = {"steps": args.steps, "attack_steps": args.attack_steps, "seed": args.seed, "rate": args.learning_rate}
    document: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"asked": asked}
    if document["asked"] != asked:
        raise SystemExit(f"{args.output} was made with {document['asked']}, got {asked}. Give another `--output`.")
    document["machine"] = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    rows, original = document.setdefault("rows", {}), load(subject.original)
    ways: dict[str, Way | Path] = {"retrained (gold)": subject.gold, "original (do nothing)": subject.original}
    ways |= {f"{part}: {name}": way for part in args.parts for name, way in PARTS[part].items()}
    for name, way in ways.items():
        if name in rows or (args.only and args.only not in name and isinstance(way, Way)):
            continue
        model, cost = (
            unlearned(subject, way, args.steps, args.learning_rate, args.seed)
            if isinstance(way, Way)
            else (load(way), {})
        )
        rows[name] = {**measured(subject, original, model, args.attack_steps), **cost}
        document["table"] = table(rows)
        write(args.output, document)
        print(document["table"][-1], flush=True)
    print("\n".join(table(rows)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the decoders full and retain95")
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--neutral", type=Path, required=True, help="JSON lines with neutral text")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--only", help="only the ways whose name contains this")
    parser.add_argument("--steps", type=int, default=40, help="of unlearning, at most")
    parser.add_argument("--attack-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of AdamW, where all weights are trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/deep_forgetting_text.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
