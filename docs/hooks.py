"""Pages of the site that stand elsewhere in the repository, in one copy. `mkdocs.yml` names this file.

A link is written as it is right where the file stands, so that it works in a checkout too. In the site it leads to the
same file's page; a link to a file that the site does not have stays as its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# path in the repository -> path in the site
OUTSIDE = {f"{name.upper()}.md": f"{name}.md" for name in ("contributing", "changelog", "security")}
OUTSIDE |= {f"notebooks/{path.name}": f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add what stands outside the folder of the pages."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between the pages and what stands outside into links of the site."""
    here = page.file.src_uri
    source = next((path for path, uri in OUTSIDE.items() if uri == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        if not (ROOT / target).is_file():
            return match[0]
        uri = OUTSIDE.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if uri is None:
            return match["text"][1:-1]
        return f"{match['text']}({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{match['anchor'] or ''})"

    return _LINK.sub(link, markdown)
