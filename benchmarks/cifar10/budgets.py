"""Compare ways of choosing ranks at equal numbers of trained parameters: γ per layer, and one budget for all layers.

    python benchmarks/cifar10/budgets.py --data DIR

Random forgetting with retain data as in run.py, seed 0. The gradients are looked at once; each row takes its ranks from
the saved profile.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch
from methods import TARGET_MODULES, best_objective, loader
from peft import get_peft_model
from run import evaluate
from tasks import random_tasks

from semu_peft import (
    RankBudget,
    Retain,
    SemuConfig,
    SubspaceProfile,
    initialize_semu_weights,
    objectives,
    unlearn,
)
from semu_peft.files import written_whole

BUDGETS = (2_000, 8_000)


def gamma_for(profile: SubspaceProfile, budget: int) -> float:
    """The largest γ, to a thousandth, at which full cores of all layers stay within the budget."""

    def parameters(gamma: float) -> int:
        return sum(layer.directions.reaching(gamma).rank ** 2 for layer in profile.layers.values())

    return max(step / 1000 for step in range(500, 1000) if parameters(step / 1000) <= budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10's train.parquet and test.parquet"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/cifar10"), help="folder of the trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="train the cached models with torch.compile")
    arguments = parser.parse_args()
    (task,) = random_tasks(arguments.data, arguments.cache, [0], arguments.compile)
    gold = evaluate(task.gold, task, 0, None, "retrained (gold)")
    objective = best_objective(task)
    config = SemuConfig(target_modules=TARGET_MODULES, explained_variance=0.99)
    adapted = get_peft_model(copy.deepcopy(task.original), config)
    profile = initialize_semu_weights(adapted, loader(task.forget, task.seed), objective)
    lines = [
        "| ranks by | trained | layers | UA | RA | TA | MIA | average gap |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {}
    for budget in BUDGETS:
        gamma = gamma_for(profile, budget)
        for name, settings in (
            (f"γ = {gamma}", {"explained_variance": gamma}),
            ("budget, by layer", {"rank_budget": RankBudget(budget, "parameters", "layer")}),
            ("budget, by model", {"rank_budget": RankBudget(budget, "parameters", "model")}),
        ):
            model = copy.deepcopy(adapted)
            ranks = profile.initialize(model, **settings).ranks
            result = unlearn(
                model, loader(task.forget, task.seed), objective, epochs=arguments.epochs, learning_rate=1e-2,
                retain=Retain(loader(task.retain, task.seed), objectives.CrossEntropy(), weight=4.0),
            )  # fmt: skip
            metrics = evaluate(model, task, result.trainable_parameters, result.seconds, name)
            used = sum(rank > 0 for rank in ranks.values())
            lines.append(
                f"| {name} | {result.trainable_parameters:,} | {used} of {len(ranks)} | "
                f"{metrics.unlearning_accuracy:.1f} | {metrics.retain_accuracy:.1f} | {metrics.test_accuracy:.1f} | "
                f"{metrics.membership_inference:.1f} | {metrics.average_gap(gold):.2f} |"
            )
            rows[f"{name}, {budget}"] = dataclasses.asdict(metrics) | {"ranks": ranks}
    table = "\n".join(lines)
    print(table)
    document = {"torch": torch.__version__, "epochs": arguments.epochs, "table": table, "rows": rows}
    with written_whole(arguments.output / "cifar10_budgets.json") as file:
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
