"""Links lead somewhere: files and headings of the repository are looked up, other hosts' addresses only for their form.

`mkdocs build --strict` looks up those of the site; README, examples and what stands outside `docs/` only this test.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pages import PAGES, ROOT, name

READ = [*PAGES, *(ROOT / path for path in ("CHANGELOG.md", "SECURITY.md", "examples/README.md"))]
_FENCED = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_BARE = re.compile(r"https?://[^\s)>\]\"'`]+")


def prose(page: Path) -> str:
    """The page without its code."""
    return _CODE.sub("`code`", _FENCED.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> set[str]:
    return {match["target"] for match in _LINK.finditer(prose(page))}


def headings(page: Path) -> set[str]:
    """The anchors that Python-Markdown gives the page's headings."""
    lines = _FENCED.sub("", page.read_text(encoding="utf-8")).splitlines()
    titles = [line.lstrip("#").encode("ascii", "ignore").decode() for line in lines if line.startswith("#")]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", READ, ids=name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{target}: no such file"
        if anchor and file.suffix == ".md" and not anchor.startswith("semu_peft."):
            assert anchor in headings(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", READ, ids=name)
def test_links_to_other_hosts_are_well_formed(page: Path) -> None:
    bare = {address.rstrip(".,;:") for address in _BARE.findall(prose(page))}
    found = bare | {link for link in links(page) if "://" in link}
    for link in found:
        parts = urlsplit(link)
        assert parts.scheme == "https", f"{link}: https, please"
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), f"{link}: no host"
        if parts.netloc == "arxiv.org":
            assert re.fullmatch(r"/abs/\d{4}\.\d{4,5}", parts.path), f"{link}: a paper's page is /abs/ and its number"
