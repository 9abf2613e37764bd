"""How far each run had forgotten while the damage on neutral text was within a budget, from tables of `run.py`.

    python benchmarks/tofu/equal_damage.py benchmarks/results/tofu*.json

Every few steps a run looks at the forget answers and at neutral text, and its table keeps what it saw. Of these looks
the one with the least likely answers counts among those within the budget; a run that was beyond it at its first look
has none, and may have been within it before. Repairs come after the last look.

Runs that were followed to where their damage meets the budgets (`run.py --cells equal`) are in a second table, with
what was measured there, and with their carriers side by side in a third. A run that ended within a budget has its end
in them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import ADAMW, ALL, BUDGETS, LORA_8, LORA_13, NATURAL

CARRIERS = (NATURAL, ALL, LORA_8, LORA_13, ADAMW)  # in the order of the columns
PATH, REPAIR, EQUAL = " | path", ", repair", "at equal damage"


def least_likely(path: Sequence[dict[str, float]], budget: float) -> float | None:
    """The mean negative log-likelihood a token that the answers came to within a budget; None beyond it."""
    return max((look["answer_nll"] for look in path if look["neutral_kl"] <= budget), default=None)


def runs(tables: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """The looks of each run by its name; runs that differ in their repair alone are one."""
    found: dict[str, list[dict[str, float]]] = {}
    for table in tables:
        for name, row in table.items():
            if name.endswith(PATH) and EQUAL not in name:
                settings, seed = name.removesuffix(PATH).rsplit(" | ", 1)
                found.setdefault(f"{settings.partition(REPAIR)[0]} | {seed}", row["path"])
    return found


def lines(tables: Sequence[dict[str, Any]]) -> list[str]:
    """The table in Markdown, what forgot the most within the least damage first."""
    reached = {name: [least_likely(path, budget) for budget in BUDGETS] for name, path in runs(tables).items()}
    order = sorted(reached, key=lambda name: [-(nll or 0.0) for nll in reached[name]])
    heads = " | ".join(f"NLL of the answers at a neutral KL ≤ {budget}" for budget in BUDGETS)
    found = [f"| run | {heads} |", f"| --- |{' --- |' * len(BUDGETS)}"]
    for name in order:
        cells = " | ".join("–" if nll is None else f"{nll:.2f}" for nll in reached[name])
        found.append(f"| {name.replace(' | ', ', ')} | {cells} |")
    return found


def followed(tables: Sequence[dict[str, Any]]) -> list[str]:
    """What was measured at the budgets, in Markdown, what is least likely within the largest first."""
    rows, utility = _measured(tables)
    last = BUDGETS[-1]
    heads = [f"{what} at {budget}" for budget in BUDGETS for what in ("neutral KL", "P(answer)", "utility", "quality")]
    lines = [f"| run | {' | '.join(heads)} | relearnt over gold | steps |", f"| --- |{' --- |' * (len(heads) + 2)}"]
    for run in sorted(_runs(rows), key=lambda run: rows[f"{run} | KL {last}"]["probability"]):
        cells = []
        for budget in BUDGETS:
            row = rows[f"{run} | KL {budget}"]
            cells += [f"{row['neutral_kl']:.3f}", f"{row['probability']:.3f}", f"{row['model_utility'] / utility:.3f}"]
            cells.append(f"{row['forget_quality']:.2g}")
        end = rows[f"{run} | KL {last}"]
        objective, carrier, settings, seed = run.split(" | ")
        told = ", ".join([objective, carrier, settings.partition(", ")[0], seed])
        lines.append(f"| {told} | {' | '.join(cells)} | {end['relearnt_over_gold']:.1f} | {end['steps']:g} |")
    return lines


def side_by_side(tables: Sequence[dict[str, Any]]) -> list[str]:
    """The same with the carriers of an objective beside each other, a table for each kind of retain data.

    A cell has the probability of an answer within the least budget; within the last one, with the share of utility and
    how many times gold's own an attacker brings the answers back to.
    """
    rows, utility = _measured(tables)
    least, last = BUDGETS[0], BUDGETS[-1]
    cells: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for run in _runs(rows):
        objective, carrier, settings, seed = run.split(" | ")
        within, end = rows[f"{run} | KL {least}"], rows[f"{run} | KL {last}"]
        told = f"{within['probability']:.2f}; {end['probability']:.2f}, {end['model_utility'] / utility:.2f}"
        of_objective = cells.setdefault((settings.partition(", ")[0], seed), {}).setdefault(objective, {})
        of_objective[carrier] = f"{told}, {end['relearnt_over_gold']:.0f}"
    lines = []
    for (retain, seed), objectives in cells.items():
        shown = [carrier for carrier in CARRIERS if any(carrier in each for each in objectives.values())]
        lines += [f"| held: {retain}, {seed} | {' | '.join(shown)} |", f"| --- |{' --- |' * len(shown)}"]
        for objective, each in objectives.items():
            lines.append(f"| {objective} | {' | '.join(each.get(carrier, '–') for carrier in shown)} |")
        lines.append("")
    return lines[:-1]


def _measured(tables: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """The rows of runs that were followed to their budgets, and the utility before."""
    rows, utility = {}, 0.0
    for table in tables:
        found = {name: row for name, row in table.items() if EQUAL in name and not name.endswith(PATH)}
        if found:
            rows |= found
            utility = table["doing nothing"]["model_utility"]
    return rows, utility


def _runs(rows: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(" | ", 1)[0] for name in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+", help="files that `run.py` has written")
    args = parser.parse_args()
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in args.tables]
    print("\n".join([*lines(tables), "", *followed(tables), "", *side_by_side(tables)]))


if __name__ == "__main__":
    main()
