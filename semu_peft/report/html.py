"""A report as one page that asks no other host for anything: readable on a phone, on paper, in the dark, aloud."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from .document import Items, Picture, Section, Table, Text

# Nothing is loaded and nothing runs, whatever a name in the report says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?( ?%)?( \(.*\))?|–|-?inf|nan")

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d5dae0; --pale: #f4f6f8;
  --link: #0a5ca8; --note: #8a4b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3adb8; --paper: #14171b; --line: #39414a;
  --pale: #1e2329; --link: #7db8f0; --note: #f0b060; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
header, main, nav { max-width: 62rem; margin: 0 auto; padding: 0 1rem; overflow-wrap: anywhere; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; white-space: pre-line; }
.soft, figcaption, caption { color: var(--soft); }
.missing { color: var(--note); }
.lead { font-weight: 600; border-left: 4px solid var(--link); padding-left: .75rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; font-size: .95rem; }
main ul { padding-left: 1.2rem; max-width: 46rem; }
main li { margin: .25rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: .75rem 0; max-width: 36rem; break-inside: avoid; }
figure svg, figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .9rem; margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; margin: .9rem 0 1.2rem; font-size: .93rem; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; }
td.alone { width: 68%; }
table.even { table-layout: fixed; }
td.number { font-variant-numeric: tabular-nums; }
tbody th, td { white-space: pre-line; }
@media screen and (max-width: 40rem) {
  table, caption, tbody, tr, th, td { display: block; width: 100%; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  th, td, td.alone { width: 100%; border: 0; padding: .05rem 0; }
  tbody th { font-weight: 600; }
  td::before { content: attr(data-label) ": "; color: var(--soft); }
  td.alone::before { content: none; }
}
@page { margin: 16mm 15mm; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --pale: #fff; --link: #000;
    --note: #000; }
  html { font-size: 9.5pt; } header, main { max-width: none; padding: 0; } header { padding-top: 0; }
  nav { display: none; }
  p, main ul { max-width: none; orphans: 3; widows: 3; } .missing { font-style: italic; }
  h2 { margin-top: 1.6rem; } h2, caption, thead { break-after: avoid; } tr, li { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } figure { max-width: 11cm; }
}
"""


def to_html(title: str, created: str, sections: Sequence[Section]) -> str:
    """Write sections as one page.

    Examples:
        >>> from semu_peft.report.document import Section, Text
        >>> from semu_peft.report.html import to_html
        >>> page = to_html("Report", "today", [Section("limits", "Limits", (Text("None <known>."),))])
        >>> "<p>None &lt;known&gt;.</p>" in page, "http" in page.replace("http-equiv", "")
        (True, False)
    """
    contents = "".join(f'<li><a href="#{each.name}">{escape(each.title)}</a></li>' for each in sections)
    numbered = iter(range(1, 10_000))
    body = "\n".join(_section(section, numbered) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="generator" content="semu_peft">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="soft">{escape(created)}</p></header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _section(section: Section, numbered: object) -> str:
    blocks: list[str] = []
    pictures = [part for part in section.parts if isinstance(part, Picture)]
    for part in section.parts:
        if not isinstance(part, Picture):
            blocks.append(_part(part))
        elif part is pictures[0]:  # those of a section stand side by side where there is room
            figures = "\n".join(_figure(each, next(numbered)) for each in pictures)  # type: ignore[call-overload]
            blocks.append(f'<div class="figures">{figures}</div>' if len(pictures) > 1 else figures)
    heading = f'<h2 id="{section.name}-title">{escape(section.title)}</h2>'
    inside = "\n".join([heading, *blocks])
    return f'<section id="{section.name}" aria-labelledby="{section.name}-title">\n{inside}\n</section>'


def _part(part: Text | Items | Table) -> str:
    if isinstance(part, Text):
        shown = ' class="missing"' if part.missing else ' class="lead"' if part.lead else ""
        return f"<p{shown}>{escape(part.text)}</p>"
    if isinstance(part, Items):
        return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in part.items)}</ul>"
    return _table(part)


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col" role="columnheader">{escape(column)}</th>' for column in table.columns)
    alone = " alone" if len(table.columns) == 2 else ""
    even = ' class="even"' if table.even else ""
    rows = []
    for first, *others in table.rows:
        cells = "".join(
            f'<td role="cell" class="{"number" if _NUMBER.fullmatch(cell) else "text"}{alone}" '
            f'data-label="{escape(column)}">{escape(cell)}</td>'
            for column, cell in zip(table.columns[1:], others, strict=True)
        )
        rows.append(f'<tr role="row"><th scope="row" role="rowheader">{escape(first)}</th>{cells}</tr>')
    return (
        f'<table role="table"{even}><caption>{escape(table.caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def _figure(picture: Picture, number: int) -> str:
    text = escape(picture.text)
    if picture.png:
        encoded = base64.b64encode(picture.png).decode()
        shown = f'<img src="data:image/png;base64,{encoded}" alt="{text}">'
    else:
        shown = _own_names(picture.svg, number).replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    return f"<figure>{shown}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _own_names(svg: str, number: int) -> str:
    """Names inside a drawing that no other drawing of the page has."""
    named = re.sub(r'(<[^<>]*?\bid=")', rf"\1f{number}-", svg)
    return re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1f{number}-", named)
