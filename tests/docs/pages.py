"""The project's pages, and what stands in them: code blocks, pictures, links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A block stands between fences; one that readers of the rendered page need not see stands in an HTML comment as well.
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
_PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[^)\s]+)[^)]*\)")


@dataclass(frozen=True)
class Block:
    """A fenced block, with the number of the line that its code starts at."""

    language: str
    code: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the page's blocks in these languages, from the top."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["code"], text[: match.start("code")].count("\n") + 1)
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def pictures(page: Path) -> list[tuple[str, Path]]:
    """Return the alternative text and the file of each picture that lies in the repository."""
    found = _PICTURE.finditer(page.read_text(encoding="utf-8"))
    return [(match["alt"], page.parent / match["path"]) for match in found if "://" not in match["path"]]


def name(page: Path) -> str:
    """Return the page's path in the repository."""
    return str(page.relative_to(ROOT))
