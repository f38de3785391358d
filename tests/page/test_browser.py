"""The page in a real Chromium: quiet, moved by one slider, true to the rows, usable by keyboard.

`apt-get install chromium`, or any Chromium on the path.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, sync_playwright
from playwright.sync_api import Page as Tab

from circuit.page import comparison_page

pytestmark = pytest.mark.system

Page = Any
RUN = Path("runs/tiny")
MATCH, RESCUE = "bilinear_qk_match_separation", "value_code_transfer_rescue"
READABLE, TERMS = "value_code_subspace", "bilinear_qk_rank_adam_state_attribution"
NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """The page in a tab, and everything that it said or asked for."""

    tab: Tab
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def move(self, index: int) -> None:
        """Puts the slider on one of its stops."""
        script = "(s, i) => { s.value = i; s.dispatchEvent(new Event('input')) }"
        self.tab.locator("#step").evaluate(script, index)
        self.tab.wait_for_function(
            "i => document.documentElement.dataset.step === String("
            "JSON.parse(document.getElementById('page-data').textContent).steps[i])",
            arg=index,
        )

    def tooltip(self, mark: Locator) -> dict[str, str]:
        """What the tooltip over a mark says."""
        mark.evaluate("e => e.scrollIntoView({ block: 'center' })")  # not under the sticky bar
        box = mark.bounding_box()
        assert box is not None
        self.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.tab.wait_for_selector("#vg-tooltip-element.visible")
        rows = self.tab.locator("#vg-tooltip-element tr")
        cells = [rows.nth(i).locator("td").all_inner_texts() for i in range(rows.count())]
        return {name.rstrip(":"): value for name, value in cells}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found is not None, f"none of {', '.join(NAMES)} is on the path"
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Browser, file: Path, **context: Any) -> Opened:
    tab = browser.new_page(**context)
    opened = Opened(tab)
    tab.on("console", lambda message: opened.said.append(message.text))
    tab.on("pageerror", lambda error: opened.said.append(str(error)))
    tab.on("request", lambda request: opened.requests.append(request.url))
    tab.goto(file.resolve().as_uri())
    tab.wait_for_selector("html[data-ready]", state="attached")
    return opened


@pytest.fixture
def opened(browser: Browser, told_once: Path) -> Iterator[Opened]:
    opened = open_page(
        browser, told_once / RUN / "formation.html", viewport={"width": 1280, "height": 900}
    )
    yield opened
    opened.tab.close()


def text_of(value: Any) -> str:
    """As JavaScript prints it."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def test_it_loads_in_silence_and_asks_for_nothing(opened: Opened) -> None:
    assert opened.said == []
    assert len(opened.requests) == 1
    assert opened.tab.locator("section .chart svg").count() >= 20


def test_the_slider_moves_every_chart(opened: Opened, page: Page) -> None:
    steps = page.payload["steps"]
    charts = opened.tab.locator("section .chart")
    opened.move(len(steps) - 1)
    last = [charts.nth(i).inner_html() for i in range(charts.count())]
    badges = opened.tab.locator(".at").all_inner_texts()
    opened.move(steps.index(6))
    first = [charts.nth(i).inner_html() for i in range(charts.count())]
    assert [i for i, (a, b) in enumerate(zip(last, first, strict=True)) if a == b] == []
    moved = opened.tab.locator(".at").all_inner_texts()
    assert all(a != b for a, b in zip(badges, moved, strict=True))
    assert opened.said == []


def test_a_panel_between_its_steps_shows_the_last_one_before(opened: Opened, page: Page) -> None:
    steps = page.payload["steps"]
    opened.move(steps.index(9))  # evaluations are at 0, 4, 8, 12
    assert opened.tab.locator("#learning .at").inner_text() == "at step 8"
    assert opened.tab.locator(f"#{MATCH} .at").inner_text() == "at step 9"


@pytest.mark.parametrize(
    ("panel", "data", "marks", "number"),
    [
        (MATCH, "separation", "g.mark-rect path", 5),
        (MATCH, "separation", "g.mark-rect path", 2),
        ("learning", "evaluation", "g.mark-symbol path[aria-roledescription='point']", 3),
        ("weight_svd_trace", "weights_W_QK", "g.mark-symbol path[aria-roledescription='point']", 7),
        (
            READABLE,
            "readability_prediction_answer_value",
            "g.mark-symbol path[aria-roledescription='point']",
            4,
        ),
        (TERMS, "term_sums", "g.mark-rect path[aria-roledescription='bar']", 9),
        ("lag", "lag", "g.mark-symbol path[aria-roledescription='point']", 6),
    ],
)
def test_tooltips_show_the_digits_of_the_rows(
    opened: Opened, page: Page, panel: str, data: str, marks: str, number: int
) -> None:
    mark = opened.tab.locator(f"#{panel} .chart").first.locator(marks).nth(number)
    said = opened.tooltip(mark)
    assert len(said) >= 3
    records = page.records(panel, data)
    same = [r for r in records if all(text_of(r[name]) == value for name, value in said.items())]
    assert len(same) == 1


def test_tables_show_the_rows_of_the_step(opened: Opened, page: Page) -> None:
    opened.move(page.payload["steps"].index(8))
    opened.tab.locator("#learning summary", has_text="Evaluation").click()
    rows = opened.tab.locator("#learning .tables details").first.locator("tbody tr")
    want = [r for r in page.records("learning", "evaluation") if r["step"] == 8]
    assert rows.count() == len(want)
    for i, record in enumerate(want):
        cells = rows.nth(i).locator("td")
        assert cells.nth(0).inner_text() == record["split"]
        assert cells.nth(1).get_attribute("title") == text_of(record["answer_accuracy"])


def test_columns_keep_their_order(opened: Opened, page: Page) -> None:
    for name, panel in page.payload["panels"].items():
        for i, table in enumerate(panel["tables"]):
            shown = opened.tab.locator(f"#{name} .tables details").nth(i).locator("th")
            assert shown.all_text_contents() == [heading for _, heading in table["columns"]]


def test_the_example_follows_step_head_and_read(opened: Opened, page: Page) -> None:
    example = page.payload["panels"]["example"]["example"]
    tab = opened.tab
    opened.move(page.payload["steps"].index(6))
    tab.locator("#head").select_option(example["heads"][-1])
    tab.locator("#read").select_option("0")
    read = example["reads"][0]
    at = example["steps"].index(6)
    weight = example["attention"][at][-1][0][read["support"]]
    token = tab.locator(f"#example li[data-position='{read['support']}']")
    assert token.get_attribute("title").endswith(f": {text_of(weight)}")  # type: ignore[union-attr]
    said = tab.locator("#example p[aria-live]").inner_text()
    assert example["predictions"][at][0]["token"] in said
    assert tab.locator("#example li").count() == len(example["tokens"])


def test_the_keyboard_reaches_and_moves_everything(opened: Opened, page: Page) -> None:
    tab, steps = opened.tab, page.payload["steps"]
    order = []
    for _ in range(6):
        tab.keyboard.press("Tab")
        order.append(tab.evaluate("document.activeElement.id || document.activeElement.className"))
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
    assert order[:5] == ["skip", "back", "step", "on", "theme"]
    tab.locator("#step").focus()
    tab.keyboard.press("Home")
    assert tab.locator("#shown").inner_text() == str(steps[0])
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#shown").inner_text() == str(steps[1])
    assert tab.locator("#step").get_attribute("aria-valuetext") == f"step {steps[1]}"
    tab.keyboard.press("End")
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")
    assert tab.locator("#shown").inner_text() == str(steps[-2])
    tab.locator(f"#{RESCUE} summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator(f"#{RESCUE} details").first.get_attribute("open") is not None


def test_every_control_and_chart_has_a_name(opened: Opened) -> None:
    unnamed = opened.tab.evaluate(
        """() => [...document.querySelectorAll('button, input, select')].filter(
            (e) => !(e.getAttribute('aria-label') || e.labels?.length)).length"""
    )
    assert unnamed == 0
    figures = opened.tab.locator("figure")
    assert all(figures.nth(i).locator("figcaption").inner_text() for i in range(figures.count()))


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways(browser: Browser, told: Path, other: Path, width: int) -> None:
    compared = comparison_page([told, other]).path
    for file in (told / "formation.html", compared):
        opened = open_page(browser, file, viewport={"width": width, "height": 844})
        assert opened.said == []
        opened.tab.evaluate(
            "document.querySelectorAll('details').forEach((d) => { d.open = true })"
        )
        assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
        charts = opened.tab.locator(".chart svg")
        for i in range(charts.count()):
            box = charts.nth(i).bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= width
        opened.tab.close()


CONTRAST = """() => {
  const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = (c) => rgb(c).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = getComputedStyle(document.body).backgroundColor;
  return ['body', '.question', 'nav a', 'summary'].map((name) => {
    const pair = [light(getComputedStyle(document.querySelector(name)).color), light(paper)];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_themes(browser: Browser, told_once: Path, scheme: Any) -> None:
    opened = open_page(browser, told_once / RUN / "formation.html", color_scheme=scheme)
    tab = opened.tab
    assert min(tab.evaluate(CONTRAST)) >= 4.5
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = tab.locator("#learning .chart svg text").first
    fill = ink.evaluate("e => getComputedStyle(e).fill")
    button = tab.locator("#theme")
    while button.inner_text() in ("auto", scheme):
        button.click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert ink.evaluate("e => getComputedStyle(e).fill") != fill
    assert min(tab.evaluate(CONTRAST)) >= 4.5
    tab.close()
