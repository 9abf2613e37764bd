"""A program that runs a notebook's cells of code in order and in one namespace, as Jupyter would: `… FILE.ipynb`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def code_cells(notebook: Path) -> list[str]:
    """The notebook's cells of code, from the top."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


if __name__ == "__main__":
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(code_cells(Path(sys.argv[1]))):
        exec(compile(code, f"{sys.argv[1]}, cell of code {number}", "exec", dont_inherit=True), namespace)
