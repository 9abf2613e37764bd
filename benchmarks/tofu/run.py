"""Forgetting 5% of TOFU's authors: objectives and carriers at equal damage, one table.

Run it again to complete the table: rows that are in the file of results already are not run anew, and the measures of
gold and of the original are taken once. A row takes some fifteen minutes of one CPU core with decoders of 5.1M
parameters, half a minute of them for each moment that is measured; of a GPU it takes less than one minute. Without
`--models` such decoders are trained first (`pretrain.py`): some hours of two CPU cores for each, a minute of a GPU.

`--cells` takes the declared lists of `cells.py` in place of a product of objectives, carriers and retain data, the most
valuable first; of cells that differ in their repair alone the forgetting is run once. Such small models leave a GPU
idle between launches, so let several processes work side by side, each on its part of the cells and in a file of its
own, and join them (`--done` names tables of before, whose references are taken and whose rows are not run again):

    python benchmarks/tofu/run.py ... --references
    for k in 1 2 3 4; do python benchmarks/tofu/run.py ... --cells goals papers --part $k/4 --seconds 400 & done; wait
    python benchmarks/tofu/run.py ... --join

Model utility is over `--utility-rows` of each of its three sets. The attacks, relearning after 20 steps on 20 forget
answers and rounding to 4 bits, are on the model at the end of its run; `--attack-all` has them at each moment.
`--repair 60` goes on with 60 steps of `methods.repair`. `--smoke` tries everything on tiny numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import ADAMW_99, ALL, LISTS, LORA_8, LORA_8_16, NATURAL, NATURAL_99, Cell, together
from machine import DEVICE, about
from measure import ATTACKER, Judge, write
from methods import CARRIERS, EVERY_CARRIER, EVERY_RETAIN, RETAIN, Unlearned, forget, repaired
from pretrain import pretrain
from sentences import OBJECTIVES
from subjects import Subject, load, read_subject

COLUMNS = {
    "forget_quality": "forget quality", "model_utility": "utility", "probability": "P(answer)",
    "paraphrased_probability": "paraphrased", "truth_ratio": "truth ratio", "extraction_strength": "extraction",
    "privacy_leakage": "PrivLeak %", "membership min_k": "Min-K% AUC", "membership loss": "loss AUC",
    "neutral_kl": "neutral KL", "relearnt_others": "relearnt, others", "relearnt_all": "relearnt, all",
    "relearnt_over_gold": "over gold", "probability_4bit": "P at 4 bits",
    "steps": "steps", "trained_share": "trained", "seconds": "seconds",
}  # fmt: skip
REFERENCES = ("gold", "doing nothing")
OWN = Path("runs/tofu")  # models that are trained here


def main() -> None:
    args = _arguments()
    if args.join:
        return _join(args.output)
    began = time.perf_counter()
    subject = read_subject(args.models or _own(args), args.data, args.neutral, utility_rows=args.utility_rows or None)
    subject = _few(subject) if args.smoke else subject
    part, parts = args.part
    output = _part_file(args.output, part) if parts > 1 else args.output
    others = {name: row for path in [*args.done, *_files(args.output)] for name, row in _read(path).items()}
    table = {**{name: others[name] for name in ("about", *REFERENCES) if name in others}, **_read(output)}
    judge = _judge(subject, table, args)
    write(output, table)
    longest: dict[Any, float] = {}  # by what a row needs; simulated attackers take several times as long
    for alike in [] if args.references else together(_cells(args))[part - 1 :: parts]:
        forgotten: Unlearned | None = None
        for cell in alike:
            if f"{cell.name} | {cell.last}" in {**others, **table}:
                continue
            needed = forgotten is None, cell.attackers
            if args.seconds - (time.perf_counter() - began) < longest.get(needed, 0.0):
                print(f"no time left for {cell.name}", flush=True)
                break
            started = time.perf_counter()
            try:
                forgotten = forgotten or forget(subject, cell.forgetting, damage=judge.damage)
                table.update(_rows(judge, cell, repaired(subject, cell, forgotten), args))
            except Exception:  # one that fails leaves the others their time
                print(f"FAILED {cell.name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                break
            write(output, table)
            longest[needed] = max(longest.get(needed, 0.0), time.perf_counter() - started)
    if parts == 1:
        print("\n".join(lines(table)))


def _own(args: argparse.Namespace) -> Path:
    """Models of our own, trained where they are not there yet; by one process, not by each part."""
    if args.part[1] > 1 and not (OWN / "retain95").exists():
        raise SystemExit(f"{OWN} has no models yet, and parts would each train them. Run with `--references` first.")
    return pretrain(args.data, OWN)


def _rows(judge: Judge, cell: Cell, done: Unlearned, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a run at its moments, a row each; and what was seen on its way."""
    size = sum(parameter.numel() for parameter in judge.original.parameters())
    seen: dict[int, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    moments = sorted(done.steps.items(), key=lambda each: each[0] != cell.last)  # the last first, which is attacked
    for moment, step in moments[:1] if args.moments == "last" else moments:
        if step not in seen:
            seen[step] = judge.row(done.go_to(moment), attacks=args.attack_all or moment == cell.last)
        cost = {"steps": step, "seconds": round(done.seconds, 1)}
        row = {**seen[step], **cost, "trained_share": done.trainable_parameters / size}
        found[f"{cell.name} | {moment}"] = row
        print(f"{cell.name} | {moment}", {column: _value(row, column) for column in COLUMNS}, flush=True)
    found[f"{cell.name} | path"] = {"path": done.path}
    return found


def _cells(args: argparse.Namespace) -> list[Cell]:
    """The declared lists that are asked for, or the product of the options."""
    if args.smoke:
        return _smoke()
    if args.cells:
        found = [cell for name in args.cells for cell in LISTS[name]()]
        if args.only:
            chosen = [cell for cell in found if any(each in cell.name for each in args.only)]
            found = [replace(cell, seed=seed) for seed in args.seeds for cell in chosen]
        return list(dict.fromkeys(found))
    every = itertools.product(args.carriers, args.objectives, args.retain, args.seeds)
    dials = tuple(args.kl)
    return [
        Cell(
            objective, carrier, retain, seed, args.hold, args.weight, steps=args.steps, repair=args.repair,
            kl=dials if "natural" in carrier else (),
        )
        for carrier, objective, retain, seed in every
    ]  # fmt: skip


def _smoke() -> list[Cell]:
    """Each way through the code once, two steps long."""
    few = {"steps": 2, "repair": 1}
    return [
        Cell("WGA", ALL, "both", neutral_weight=10.0, **few),
        Cell("WGA", NATURAL, "both", hold="KL", weight=1.0, kl=(0.5, 0.1), **few),
        Cell("WGA", ADAMW_99, "answers", repair_retain="both", **few),
        Cell("WGA", ADAMW_99, "answers", repair_hold="KL", repair_rate=1e-4, **few),
        Cell("unseen answers", NATURAL, "neutral", **few),
        Cell("NPO 0.03", ALL, "answers", steps=2),
        Cell("uniform", LORA_8, "answers", steps=2),
        Cell("WGA", NATURAL_99, "own and neutral", hold="KL", weight=1.0, kl=(0.5,), **few),
        Cell("WGA", NATURAL, "both", hold="KL", weight=1.0, kl=(0.5,), attackers=2, kept_at_once=7, **few),
        Cell("unseen answers", ALL, "both", steps=2, attackers=1),
        *(Cell("WGA", carrier, "both", batch_size=4, steps=3, equal_damage=True) for carrier in (NATURAL, ALL)),
        Cell("WGA", NATURAL, "both", hold="KL", weight=1.0, kl=(0.5,), skip=2, without_shared=True, steps=2),
        Cell("CE-U", LORA_8_16, "none", batch_size=4, steps=9, as_published=True),
        *(Cell(objective, carrier, "both", steps=1) for objective in OBJECTIVES for carrier in (ADAMW_99, ALL)),
        *(Cell(objective, NATURAL, "neutral", steps=1) for objective in OBJECTIVES),
    ]


def _few(subject: Subject) -> Subject:
    return replace(
        subject, forget=subject.forget[:6], retain=subject.retain[:12], neutral=subject.neutral[:4],
        more_neutral=subject.more_neutral[:12], utility={name: rows[:2] for name, rows in subject.utility.items()},
        own_answers=40,
    )  # fmt: skip


def _judge(subject: Subject, table: dict[str, dict[str, Any]], args: argparse.Namespace) -> Judge:
    """The judge with gold's row, and both references in the table, from there where they are in it already."""
    asked = {"questions": len(subject.forget), "utility_rows": args.utility_rows}
    known = table.get("about", {})
    if "gold" in table and {key: known.get(key) for key in asked} != asked:
        raise SystemExit(
            f"{args.output} was made with {known}, and {asked} is asked for. Give another `--output`, or the same."
        )
    table["about"] = {**about(args.part[1]), **asked, "command": shlex.join(["benchmarks/tofu/run.py", *sys.argv[1:]])}
    attacker = replace(ATTACKER, steps=2) if args.smoke else ATTACKER
    judge = Judge(subject, load(subject.original), attacker=attacker)
    if "gold" not in table:
        table["gold"] = judge.reference(load(subject.gold))
    judge = replace(judge, gold=table["gold"])
    if "doing nothing" not in table:
        table["doing nothing"] = judge.row(judge.original)
    return judge


def _join(output: Path) -> None:
    """One table of the parts' rows and of what it holds already; the parts are then gone."""
    table: dict[str, dict[str, Any]] = {}
    for path in _files(output):
        table = {**_read(path), **table}
    write(output, table)
    for path in _files(output)[:-1]:
        path.unlink()
    print("\n".join(lines(table)))


def _files(output: Path) -> list[Path]:
    """The parts of a table, and the table itself last."""
    return [*sorted(output.parent.glob(f"{output.stem}.part*{output.suffix}")), output]


def _part_file(output: Path, part: int) -> Path:
    return output.with_name(f"{output.stem}.part{part}{output.suffix}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def lines(table: dict[str, dict[str, Any]]) -> list[str]:
    """The table in Markdown: the references, then the best forget quality first."""
    names = [name for name in table if name != "about" and not name.endswith("| path")]
    names.sort(key=lambda name: (name not in REFERENCES, -(table[name].get("forget_quality") or 0.0)))
    found = [f"| | {' | '.join(COLUMNS.values())} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name in names:
        cells = [_cell(_value(table[name], column)) for column in COLUMNS]
        found.append(f"| {name.replace(' | ', ', ')} | {' | '.join(cells)} |")
    return found


def _value(row: dict[str, Any], column: str) -> Any:
    """What a row has in a column; of two words, what the first holds under the second."""
    kind, _, part = column.partition(" ")
    return row.get(kind, {}).get(part) if part else row.get(kind)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path,
        help=f"folder with the decoders full and retain95 (default: {OWN}, where they are trained first: two CPU cores "
        "take some hours for each, a GPU a minute)",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--neutral", type=Path, required=True, help="JSON lines with neutral text")
    usual = f"benchmarks/results/tofu{'_gpu' if DEVICE.type == 'cuda' else ''}.json"
    parser.add_argument("--output", type=Path, default=Path(usual))
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=list(LISTS),
        help="lists of cells.py, not a product",
    )
    parser.add_argument(
        "--only", nargs="+", help="of these lists, cells with one of these in their name, `--seeds` each"
    )
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="tables, of which no row is run again")
    parser.add_argument("--carriers", nargs="+", default=list(CARRIERS), choices=list(EVERY_CARRIER))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--retain", nargs="+", default=list(RETAIN), choices=list(EVERY_RETAIN))
    parser.add_argument("--hold", choices=["KL", "CE"], help="on retain answers, by default the objective's")
    parser.add_argument("--weight", type=float, help="of what is held, by default the objective's")
    parser.add_argument("--kl", nargs="*", type=float, default=[], help="how far a natural step may go, one by one")
    parser.add_argument("--steps", type=int, help="at most; by default the carrier's")
    parser.add_argument("--repair", type=int, default=0, help="steps of `methods.repair` behind it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--utility-rows", type=int, default=100, help="of each set of model utility; 0 for all")
    parser.add_argument("--moments", choices=["all", "last"], default="all", help="what is measured of a run")
    parser.add_argument("--attack-all", action="store_true", help="attack the model at every moment, not the last")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row that has no time left")
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="every N-th cell, in a file by itself"
    )
    parser.add_argument("--references", action="store_true", help="measure gold and the original alone")
    parser.add_argument("--join", action="store_true", help="put the parts' rows into one table")
    parser.add_argument("--smoke", action="store_true", help="try each way on a few questions and steps")
    return parser.parse_args()


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be K/N with 1 <= K <= N, got {text}")
    return int(part), int(parts)


if __name__ == "__main__":
    main()
