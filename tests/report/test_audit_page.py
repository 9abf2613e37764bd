"""The report's page: one file without a link to elsewhere, sound as HTML, and as a real browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from peft import get_peft_model

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.evaluation import ForgettingComparison, ForgettingMetrics, Predictions, TextRelearning
from semu_peft.objectives import UniformDistribution
from semu_peft.report import audit

VOID = {"meta", "link", "img", "br"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ALONE = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
]  # fmt: skip
# The page in a frame of some width (windows have a least one), and around it what measures: the frame's width, the
# page's, and the elements that stand out of it.
PROBE = """<!DOCTYPE html><html><body style="margin: 0"><iframe width="{width}" height="844" style="border: 0"
srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const frame = event.target.contentWindow, inside = frame.document;
  const wide = [...inside.querySelectorAll("body *")].filter(e => !e.closest("svg") && !e.closest("thead")
    && e.getBoundingClientRect().right > frame.innerWidth + 1);
  document.documentElement.dataset.probe =
    [frame.innerWidth, inside.documentElement.scrollWidth, wide.map(e => e.tagName).join("+")].join(" ");
}};
</script></body></html>"""


class Reader(HTMLParser):
    """Tags with their attributes in order, and whether all that opens closes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def page() -> str:
    """A report with something in every section, and long names."""
    torch.manual_seed(0)
    model: Any = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "fc2"], r=2))
    forget = vector_batches()
    profile = initialize_semu_weights(model, forget, UniformDistribution(), progress=False)
    result = unlearn(model, forget, UniformDistribution(), max_steps=3, progress=False)
    long = "a_model_whose_name_does_not_end_and_has_no_space_" * 3
    rows = {long: ForgettingMetrics(99.0, 98.0, 97.0, 96.0, 20, 1000), "gold": ForgettingMetrics(100, 99, 98, 97, 9, 9)}
    labels = torch.arange(12) % 4
    said = Predictions(labels, labels, torch.ones(12), 4)
    samples = {name: torch.rand(8, 3, 16, 16) for name in ("a photo of a cat on a long red sofa", "a dog")}
    return audit(
        "Forget them.\n\n" + long, model=model, data={"forget": forget, long: forget}, profile=profile, training=result,
        settings={"objective": UniformDistribution(), "note": long}, metrics=ForgettingComparison(rows, "gold"),
        attacks=TextRelearning("Adam 0.0001, 20 examples", (0, 10), (0.01, 0.06), (0.01, 0.05)),
        predictions=(said, said), forgotten=3, samples=(samples, samples),
    ).to_html()  # fmt: skip


def test_the_page_asks_no_other_host(page: str) -> None:
    """No address at all outside of namespaces: no link, no import, no font, no script."""
    assert not re.search(r"https?:|//[\w-]+\.|@import|<script|<iframe|<object", page)
    reader = Reader(page)
    loaded = [
        value or "" for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert loaded and all(value.startswith(("data:", "#")) for value in loaded)
    assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)\)", page))
    assert "default-src 'none'" in page


def test_the_page_is_sound_and_can_be_read_aloud(page: str) -> None:
    reader = Reader(page)
    assert not reader.open
    names = Counter(attributes["id"] for _, attributes in reader.tags if attributes.get("id"))
    assert max(names.values()) == 1, names.most_common(3)
    used = {value[1:] for _, attributes in reader.tags for key, value in attributes.items() if value and "href" in key}
    assert {name for name in used if not name.startswith("ata:")} <= set(names)
    assert [tag for tag, _ in reader.tags if re.fullmatch(r"h\d", tag)] == ["h1", *["h2"] * 11]
    for drawing in reader.of("svg"):
        assert drawing["role"] == "img" and len(drawing["aria-label"] or "") > 30
    assert all(len(image["alt"] or "") > 20 for image in reader.of("img"))
    assert (
        len(reader.of("svg")) + len(reader.of("img")) == len(reader.of("figure")) == len(reader.of("figcaption")) == 8
    )
    assert len(reader.of("caption")) == len(reader.of("table")) and {each["scope"] for each in reader.of("th")} == {
        "col", "row"
    }  # fmt: skip
    assert reader.of("html")[0]["lang"] == "en" and "width=device-width" in page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to look at the page with")
def test_texts_beside_each_other_leave_their_prompts_room(tmp_path: Path) -> None:
    """A long text must not press the column of prompts to the width of a letter."""
    asked = "Where does Jane Doe live, and since when?"
    texts = audit(samples=({asked: "word " * 200}, {asked: "supercalifragilistic" * 20})).to_html()
    probe = PROBE.replace(
        '[frame.innerWidth, inside.documentElement.scrollWidth, wide.map(e => e.tagName).join("+")]',
        '[...inside.querySelectorAll("#samples tbody tr > *")].map(e => Math.round(e.getBoundingClientRect().width))',
    )
    probed = tmp_path / "probed.html"
    probed.write_text(probe.format(width=1100, page=escape(texts)), encoding="utf-8")
    common = [str(BROWSER), *ALONE, f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run([*common, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="(\d+) (\d+) (\d+)"', dumped.stdout)
    assert found is not None, dumped.stderr[-2000:]
    assert min(map(int, found.groups())) > 250, found[0]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to look at the page with")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(
    page: str, width: int, tmp_path: Path
) -> None:
    as_written, probed = tmp_path / "report.html", tmp_path / "probed.html"
    as_written.write_text(page, encoding="utf-8")
    probed.write_text(PROBE.format(width=width, page=escape(page)), encoding="utf-8")
    common = [str(BROWSER), *ALONE, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},844"]
    picture = tmp_path / "page.png"
    shown = subprocess.run(
        [*common, f"--screenshot={picture}", as_written.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert picture.stat().st_size > 10_000
    assert "CONSOLE" not in shown.stderr, shown.stderr
    dumped = subprocess.run([*common, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="(\d+) (\d+) ([^"]*)"', dumped.stdout)
    assert found is not None, dumped.stderr[-2000:]
    window, document, wide = int(found[1]), int(found[2]), found[3]
    assert window == width and document <= window and not wide, found[0]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to print the page with")
def test_it_prints_on_few_sheets_with_letters_of_one_size(page: str, tmp_path: Path) -> None:
    """As a table, not as a phone's list; what stands beside text is not set larger than that."""
    as_written, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    as_written.write_text(page, encoding="utf-8")
    common = [str(BROWSER), *ALONE, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*common, "--no-pdf-header-footer", f"--print-to-pdf={printed}", as_written.as_uri()],
        capture_output=True, timeout=120,
    )  # fmt: skip
    sheets = re.findall(rb"/Count (\d+)", printed.read_bytes())
    assert sheets and 4 <= int(sheets[0]) <= 12, sheets
    # Under print's own rules, on a sheet's width between its margins: 180 mm are 680 px.
    styled = page.replace("@media print", "@media all").replace("@media screen", "@media speech")
    probe = PROBE.replace(
        '[frame.innerWidth, inside.documentElement.scrollWidth, wide.map(e => e.tagName).join("+")]',
        '["main p", "td", "main li"].map(e => parseFloat(frame.getComputedStyle(inside.querySelector(e)).fontSize))',
    )
    probed = tmp_path / "probed.html"
    probed.write_text(probe.format(width=680, page=escape(styled)), encoding="utf-8")
    dumped = subprocess.run([*common, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([\d.]+) ([\d.]+) ([\d.]+)"', dumped.stdout)
    assert found is not None, dumped.stderr[-2000:]
    text, cell, item = map(float, found.groups())
    assert 0.85 * text <= cell <= text == item <= 14
