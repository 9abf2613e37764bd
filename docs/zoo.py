"""Write the zoo's tables into docs/zoo.md, from `semu_peft.methods` and what `benchmarks/zoo/run.py` has measured.

python docs/zoo.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from semu_peft.methods import METHODS, Method

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "zoo.md", ROOT / "benchmarks" / "results"
TITLES = {
    "classification": "Classifiers",
    "language": "Language models",
    "any": "Any model with logits",
    "diffusion": "Text-to-image pipelines",
    "recommender": "Recommenders",
}
MEASURED = {"classification": ["digits", "CIFAR-10"], "language": ["text"], "any": ["digits", "CIFAR-10", "text"]}


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def written(page: str) -> str:
    """The page with its generated part made anew."""
    begin, end = "<!-- methods: python docs/zoo.py -->\n", "<!-- end of methods -->"
    head, rest = page.split(begin)
    return head + begin + "\n" + "\n\n".join(sections()) + "\n\n" + end + rest.split(end)[1]


def sections() -> list[str]:
    made = []
    for kind, title in TITLES.items():
        measured = {name: results(name) for name in MEASURED.get(kind, [])}
        rows = [method for method in METHODS.values() if method.kind == kind]
        lines = [
            f"## {title}\n", "| method | equation | sentence | needs | source | when | measured |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(row(method, measured) for method in rows),
        ]  # fmt: skip
        made.append("\n".join(lines))
    return made


def results(name: str) -> dict[str, Any]:
    """The rows of one table of the benchmark by their titles, and those of later runs, which had models of their own.

    A row that was not run on all cases is left out.
    """
    rows: dict[str, Any] = {}
    for kind in ("", "_second", "_gpu", "_gpu_second"):
        path = RESULTS / f"zoo_{name.lower().replace('-', '')}{kind}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))["rows"]
            cases = max(len(row["cases"]) for row in found.values())
            rows = {title: row for title, row in found.items() if len(row["cases"]) == cases} | rows
    return rows


def row(method: Method, measured: dict[str, dict[str, Any]]) -> str:
    needs = ", ".join(method.needs) or "–"
    cells = [method.equation.replace("|", "\\|"), method.sentence, needs, method.source, method.use]
    found = {name: told(method.name, rows) for name, rows in measured.items()}
    found = {name: each for name, each in found.items() if each}
    named = len(measured) > 1
    figures = "; ".join(f"on {name}: {each}" if named else each for name, each in found.items()) or "–"
    return f"| `{method.name}` | " + " | ".join(cells) + f" | {figures} |"


def told(name: str, rows: dict[str, Any]) -> str:
    """The average gap of each row of the benchmark that is this method."""
    found = []
    for title, measured in rows.items():
        cases, (said, _, carrier) = list(measured["cases"].values()), title.partition(", ")
        if said.split()[0] != name:
            continue
        if any("failed" in case for case in cases):
            found.append(f"fails on {sum('failed' in case for case in cases)} of {len(cases)}")
            continue
        how = said.removeprefix(name).strip()
        on = ", ".join(part for part in (carrier, how if not how.startswith("(") else "") if part)
        found.append(f"{on + ': ' if on else ''}{sum(case['gap'] for case in cases) / len(cases):.1f}")
    return "; ".join(found)


if __name__ == "__main__":
    main()
