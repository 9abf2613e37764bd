"""Write the zoo's tables into docs/zoo.md, from `semu_peft.methods` and what `benchmarks/zoo/run.py` has measured.

python docs/zoo.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from semu_peft.methods import METHODS, Method

ROOT = Path(__file__).parents[1]
PAGE, MEASURED = ROOT / "docs" / "zoo.md", ROOT / "benchmarks" / "results" / "zoo_digits.json"
TITLES = {
    "classification": "Classifiers",
    "language": "Language models",
    "any": "Any model with logits",
    "diffusion": "Text-to-image pipelines",
    "recommender": "Recommenders",
}


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def written(page: str) -> str:
    """The page with its generated part made anew."""
    begin, end = "<!-- methods: python docs/zoo.py -->\n", "<!-- end of methods -->"
    head, rest = page.split(begin)
    return head + begin + "\n" + "\n\n".join(sections()) + "\n\n" + end + rest.split(end)[1]


def sections() -> list[str]:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"] if MEASURED.exists() else {}
    made = []
    for kind, title in TITLES.items():
        rows = [method for method in METHODS.values() if method.kind == kind]
        lines = [
            f"## {title}\n", "| method | equation | sentence | needs | source | when | measured |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(row(method, measured) for method in rows),
        ]  # fmt: skip
        made.append("\n".join(lines))
    return made


def row(method: Method, measured: dict[str, Any]) -> str:
    needs = ", ".join(method.needs) or "–"
    cells = [method.equation.replace("|", "\\|"), method.sentence, needs, method.source, method.use]
    return f"| `{method.name}` | " + " | ".join(cells) + f" | {told(method.name, measured)} |"


def told(name: str, measured: dict[str, Any]) -> str:
    """The average gap of each row of the benchmark that is this method."""
    found = []
    for title, results in measured.items():
        cases = list(results["cases"].values())
        if title.split(",")[0].split(" (")[0] != name:
            continue
        if any("failed" in case for case in cases):
            found.append(f"fails on {sum('failed' in case for case in cases)} of {len(cases)}")
            continue
        on = title.partition(", ")[2]
        found.append(f"{on + ': ' if on else ''}{sum(case['gap'] for case in cases) / len(cases):.1f}")
    return "; ".join(found) or "–"


if __name__ == "__main__":
    main()
