"""The report in headless Chromium: what only a browser shows.

Needs the extra `browser` and a Chromium: `playwright install chromium`, or the system's (its path
may be in CHROMIUM). Skipped without them. With SCREENSHOTS=FOLDER pictures of the pages are kept.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import HOSTILE, a_run, rows, with_ppo
from support.synthetic_runs import synthetic_run

from irl_align.evaluation.compare.runner import CompareOptions, compare
from irl_align.evaluation.report.write import write_report

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]
PHONE = {"width": 360, "height": 740}
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium."""
    actual = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as started:
        if actual is None and not Path(started.chromium.executable_path).is_file():
            pytest.skip("no Chromium: run `playwright install chromium`, or set CHROMIUM")
        browser = started.chromium.launch(executable_path=actual, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A report in a page, and all that went wrong or out of it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        complain = self.complaints.append
        self.page.on(
            "console", lambda m: complain(m.text) if m.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: complain(str(error)))
        self.page.on(
            "dialog", lambda dialog: (complain(f"dialog {dialog.message}"), dialog.dismiss())
        )
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.resolve().as_uri()
        self.page.goto(self.url)

    def picture(self, name: str) -> None:
        """Keep a screenshot of the whole page, where they are asked for."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)

    def column(self, table: Any, number: int) -> list[str]:
        """Texts of a table's column."""
        return [
            text.strip()
            for text in table.locator(f"tbody tr > :nth-child({number})").all_inner_texts()
        ]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(
            self.page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
        )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's report whose every text is hostile, with PPO's token credit."""
    return write_report(with_ppo(a_run(tmp_path_factory.mktemp("run"))))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a comparison of two methods and three seeds."""
    root = tmp_path_factory.mktemp("comparison")
    for seed in (1, 2, 3):
        for name, errors in (
            ("good", [0.3, 0.2, 0.1]),
            ("much-longer-name-of-a-method", [0.3, 0.28]),
        ):
            texts = [f"{name} says {i} of {HOSTILE}" for i in range(30)]
            by_policy = {f"policy-{k}-t1": rows(texts, k) for k in range(len(errors))}
            for row in (row for said in by_policy.values() for row in said):
                row["demonstrations"] = [f"reference {i} {HOSTILE}" for i in range(5)]
            synthetic_run(
                root,
                name,
                seed,
                [(e + seed / 100, e / 2) for e in errors],
                samples=by_policy,
            )
    folders = [str(folder) for folder in sorted(root.iterdir())]
    return write_report(compare(folders, CompareOptions((1, 2, 3), output=root / "all")).folder)


@pytest.fixture
def opened(chromium: Any, report: Path) -> Iterator[Opened]:
    opened = Opened(chromium, report)
    yield opened
    opened.context.close()


def test_it_renders_without_a_complaint_or_a_request(opened: Opened) -> None:
    assert opened.page.locator("svg.figure").count() >= 4
    first = opened.page.locator("svg.figure").first
    assert first.bounding_box()["height"] > 100
    assert opened.page.locator("#sample-table tbody tr").count() == 2
    assert opened.complaints == []
    assert set(opened.requests) <= {opened.url, "data:,"}
    opened.picture("run")


def test_a_script_in_a_sample_stays_text(opened: Opened) -> None:
    cells = opened.page.locator("#sample-table td").all_inner_texts()
    assert any("<script>alert(1)</script>" in text for text in cells)
    assert opened.page.locator("main img").count() == 0
    opened.page.fill("#search", "<script>")
    assert opened.page.locator("#found").inner_text() == "2 found, 2 shown"
    opened.page.fill("#search", "no such words")
    assert opened.page.locator("#found").inner_text() == "0 found, 0 shown"
    assert opened.complaints == []


def test_tables_sort_by_their_numbers(opened: Opened) -> None:
    table = opened.page.locator("table.sortable").first
    before = opened.column(table, 2)
    assert before == ["5.0", "30.0", "20.0"]
    head = table.locator("thead th").nth(1)
    head.locator("button").click()
    assert opened.column(table, 2) == ["5.0", "20.0", "30.0"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")  # by the keyboard, the other way round
    assert opened.column(table, 2) == ["30.0", "20.0", "5.0"]
    assert opened.column(table, 1) == ["SFT", "m 1", "demonstrations"]


def test_intervals_sort_by_their_lower_end(opened: Opened) -> None:
    cells = ["[9.5, 12.0]", "[10.1, 11.0]", "<0.001", "no number", "-3.0±1.0", "1,200"]
    keys = opened.page.evaluate("cells => cells.map(sortKey)", cells)
    assert keys == [9.5, 10.1, 0.001, None, -3.0, 1200.0]


def test_samples_without_scores_sort_by_their_words(opened: Opened) -> None:
    page, table = opened.page, opened.page.locator("#sample-table")
    page.select_option("#order", label="words, m 1")
    assert "second" in opened.column(table, 4)[0]  # one word, HOSTILE has several
    page.check("#reverse")
    assert "second" in opened.column(table, 4)[1]


def test_samples_sort_and_change_temperature(opened: Opened) -> None:
    page, table = opened.page, opened.page.locator("#sample-table")
    assert "prompt 0" in opened.column(table, 1)[0]
    page.select_option("#order", label="slot errors, m 1")
    page.check("#reverse")
    assert "prompt 1" in opened.column(table, 1)[0]
    assert "slot errors 2" in opened.column(table, 4)[0]
    page.select_option("#temperature", label="greedy")
    assert "prompt 1" in opened.column(table, 1)[0]


def test_page_shows_the_values_of_a_token_on_hover_and_by_the_keyboard(opened: Opened) -> None:
    page = opened.page
    tokens = page.locator(".token")
    tokens.nth(1).hover()
    assert page.locator("#values").text_content() == "“ <b>” credit -1.0, advantage 2.0, kl 0.1"
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "cat" in page.locator("#values").inner_text()
    assert "down" in tokens.nth(1).get_attribute("class")
    page.select_option("#shown", "advantage")
    assert "up" in tokens.nth(1).get_attribute("class").split()
    shades = [
        page.evaluate("e => getComputedStyle(e).backgroundColor", tokens.nth(i).element_handle())
        for i in (0, 1, 2)
    ]
    assert len(set(shades)) == 3


def test_columns_can_be_left_out(opened: Opened) -> None:
    page, heads = opened.page, opened.page.locator("#sample-table thead th")
    assert heads.all_inner_texts() == ["prompt", "demonstrations", "SFT", "m 1"]
    page.click("#columns summary")
    page.uncheck("#columns label:has-text('SFT') input")
    page.uncheck("#columns label:has-text('demonstrations') input")
    assert heads.all_inner_texts() == ["prompt", "m 1"]
    page.select_option("#order", label="slot errors, m 1")
    page.check("#reverse")
    assert "slot errors 2" in opened.column(page.locator("#sample-table"), 2)[0]
    page.check("#columns label:has-text('SFT') input")
    assert heads.all_inner_texts() == ["prompt", "SFT", "m 1"]
    assert opened.complaints == []


def test_marks_of_a_figure_tell_their_values(opened: Opened) -> None:
    titles = opened.page.locator("svg.figure use title").all_text_contents()
    assert any(text.startswith("m: 30 at 0") for text in titles)


def test_light_and_dark(chromium: Any, report: Path) -> None:
    actual = {}
    for scheme in ("light", "dark"):
        opened = Opened(chromium, report, color_scheme=scheme)
        colours = [
            opened.page.evaluate(
                "([e, of]) => getComputedStyle(e)[of]",
                [opened.page.locator(where).first.element_handle(), of],
            )
            for where, of in (
                ("body", "backgroundColor"),
                ("body", "color"),
                ("svg.figure text", "fill"),
            )
        ]
        actual[scheme] = colours
        assert opened.page.locator("#scheme").inner_text() != scheme
        opened.picture(f"run-{scheme}")
        opened.page.click("#scheme")
        body = opened.page.locator("body").element_handle()
        changed = opened.page.evaluate("e => getComputedStyle(e).backgroundColor", body)
        assert changed != colours[0]
        opened.context.close()
    for one, other in zip(actual["light"], actual["dark"], strict=True):
        assert one != other


def test_a_phone_shows_it_without_scrolling_sideways(chromium: Any, comparison: Path) -> None:
    opened = Opened(chromium, comparison, viewport=PHONE, device_scale_factor=2, has_touch=True)
    assert opened.overflow() == 0
    width = opened.page.locator("svg.figure").first.bounding_box()["width"]
    assert 250 < width <= PHONE["width"]
    assert opened.complaints == []
    opened.picture("comparison-phone")
    opened.context.close()


def test_a_comparison_shows_more_samples_on_demand(chromium: Any, comparison: Path) -> None:
    opened = Opened(chromium, comparison)
    lines = opened.page.locator("#sample-table tbody tr")
    assert lines.count() == 20
    opened.page.click("#more")
    assert lines.count() == 30 and not opened.page.locator("#more").is_visible()
    widths = [cell.bounding_box()["width"] for cell in lines.first.locator("th, td").all()]
    assert min(widths) > 100  # neither the prompt nor a sample is a column of letters
    opened.picture("comparison")
    cell = lines.first.locator("td").first
    assert cell.locator("p").count() == 2
    cell.locator("button").click()
    assert cell.locator("p").count() == 5 and "<script>" in cell.inner_text()
    assert opened.overflow() == 0 and opened.complaints == []
    opened.context.close()
