"""The report: one file, no network, every text escaped, the numbers of the runs."""

import io
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from lxml import etree, html
from PIL import Image
from support.report_runs import HOSTILE, a_run, samples, with_ppo
from support.synthetic_runs import synthetic_recipe, synthetic_run
from support.tiny_runs import irl_align, the_line

from irl_align.evaluation.report.browser import _within, sample_browser, token_texts
from irl_align.evaluation.report.curves import ppo_curves
from irl_align.evaluation.report.figures import Bars, Dots, Drawable, Plot, Point, Series
from irl_align.evaluation.report.images import png, svg
from irl_align.evaluation.report.templates import script_json
from irl_align.evaluation.report.write import write_report
from irl_align.training.run_folder import Run
from irl_align.utils.files import to_lines

SVG = "{http://www.w3.org/2000/svg}"


def page_of(source: Path) -> Any:
    return html.document_fromstring(write_report(source).read_text(encoding="utf-8"))


def test_a_run_is_one_file_without_requests(tmp_path: Path) -> None:
    run = with_ppo(a_run(tmp_path))
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 5_000_000
    for attribute in ("src", "srcset", "action", "data"):
        assert page.xpath(f"//@{attribute}") == []
    assert all(link.startswith(("#", "data:")) for link in page.xpath("//@href"))
    (policy,) = page.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none';")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|https?://", text)


def test_links_lead_somewhere_and_ids_are_unique(tmp_path: Path) -> None:
    page = page_of(with_ppo(a_run(tmp_path)))
    ids = page.xpath("//@id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.xpath("//nav//@href")} <= set(ids)
    wanted = re.findall(r'byId\("([\w-]+)"\)', page.xpath("//script")[-1].text)
    assert set(wanted) <= set(ids)
    assert set(page.xpath("//label//@id")) == {
        "search", "temperature", "order", "reverse", "shown",
    }  # fmt: skip


def test_numbers_are_the_runs_own(tmp_path: Path) -> None:
    page = page_of(a_run(tmp_path))
    table = page.xpath("//section[@id='results']//table")[0]
    cells = [[c.text_content() for c in row.xpath("./th|./td")] for row in table.xpath(".//tr")]
    assert cells[0][:3] == ["policy", "slot error rate % T=1", "slot error rate % greedy"]
    assert cells[2][:3] == ["SFT", "30.0", "20.0"]
    assert cells[3][:3] == ["m 1", "20.0", "10.0"]
    marks = page.xpath("//figure//*[local-name()='use']/*[local-name()='title']/text()")
    assert "m: 30 at 0; one seed" in marks and "m: 20 at 1; one seed" in marks
    assert "held-out pairs: 75 at 0 (65 to 85); 100 pairs of 50 prompts" in marks
    boxes = page.xpath("//figure//*[local-name()='path']/*[local-name()='title']/text()")
    assert {"m, SFT: 100 seconds", "m, policy: 10 seconds"} <= set(boxes)


def test_user_texts_stay_text(tmp_path: Path) -> None:
    """Neither a prompt, a sample, a name nor a sign can add an element or end a script."""
    recipe = synthetic_recipe(HOSTILE, 1)
    extra = {"signs/policy-1": {"signs": [HOSTILE]}}
    run = with_ppo(a_run(tmp_path, "m", recipe=recipe, extra=extra))
    page = page_of(run)
    assert page.xpath("//img") == [] and len(page.xpath("//script")) == 2
    assert page.xpath("//@onerror") == [] and page.xpath("//b") == []
    assert HOSTILE.replace("\u2028", "") in page.xpath("//dd")[1].text_content().replace(
        "\u2028", ""
    )
    (data,) = page.xpath("//script[@id='sample-data']/text()")
    stored = json.loads(data)
    assert stored["methods"] == ["SFT", f"{HOSTILE} 1"]
    assert stored["rows"][0]["p"] == f"prompt 0 {HOSTILE}"


def test_browser_holds_every_sample_with_its_scores(tmp_path: Path) -> None:
    browser = sample_browser([Run.load(a_run(tmp_path))])
    assert browser is not None
    assert browser["methods"] == ["SFT", "m 1"] and browser["temperatures"] == ["1", "0"]
    assert browser["scores"] == ["fully_right", "slot_errors"]
    assert browser["rows"][1] == {
        "p": f"prompt 1 {HOSTILE}",
        "d": [f"demo {HOSTILE}"],
        "s": [[["second", 0.0, 1.0], ["second", 0.0, 2.0]]] * 2,
    }


def test_conversations_and_missing_samples(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    first = [{"prompt": chat, "completion": "a", "demonstrations": []}]
    other = [{"prompt": "else", "completion": "b", "demonstrations": []}]
    files = {"policy-0-t1": first, "policy-1-t1": other}
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)], samples=files)
    browser = sample_browser([Run.load(run)])
    assert browser is not None
    assert browser["rows"] == [{"p": "user: hi\nassistant: yes?", "d": [], "s": [[["a"], None]]}]


def test_a_large_run_stays_small_and_fast(tmp_path: Path) -> None:
    many = [f"{i} " + "long text " * 60 for i in range(3000)]
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)], samples=samples(many))
    began = time.monotonic()
    page = page_of(run)
    assert time.monotonic() - began < 20
    assert (run / "report.html").stat().st_size < 5_000_000
    shown = re.search(r"(\d+) of 3000 prompts", page.text_content())
    assert shown and 300 < int(shown[1]) < 3000


def long_ppo(run: Path, tokens: int = 512) -> Path:
    """PPO samples of so many tokens in a run, of two updates."""
    stage = run.parent / f"store/ppo-{run.name}"
    stage.mkdir(parents=True)
    values = {n: [0.12345 * (i % 9 - 4) for i in range(tokens)] for n in ("credit", "kl")}
    sample = {"prompt": "ask", "reward": 1.5, "tokens": ["Ġ<word"] * tokens, **values}
    rows_ = [{**sample, "update": u, "advantage": values["kl"]} for u in (1, 9) for _ in range(20)]
    (stage / "samples.jsonl").write_text(to_lines(rows_), encoding="utf-8")
    stages = json.loads((run / "stages.json").read_text())
    stages["policy-1"] = {"name": "ppo", "key": "1", "path": f"../store/{stage.name}"}
    (run / "stages.json").write_text(json.dumps(stages))
    return run


def test_many_trainings_with_long_samples_stay_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples with credit share one budget, whatever the number of methods."""
    texts = [f"{i} " + "<" * 400 for i in range(600)]  # six times as long as they are written
    runs = [
        synthetic_run(tmp_path, f"m{i}", 1, [(0.3, 0.2), (0.2, 0.1)], samples=samples(texts))
        for i in range(6)
    ]
    for run in runs[:5]:
        long_ppo(run)
    long_ppo(runs[5], tokens=4)
    assert irl_align(capsys, "compare", *runs).status == 0
    page = page_of(tmp_path / "comparison")
    assert (tmp_path / "comparison/report.html").stat().st_size < 5_000_000
    text = page.text_content()
    shown = [int(n) for n in re.findall(r"(\d+) of 16 samples, or the page", text)]
    assert len(shown) == 5 and min(shown) >= 2  # and all 16 of the short one
    assert len(page.xpath("//section[@id='credit']//article")) == sum(shown) + 16
    facts = page.xpath("//section[@id='credit']//p[@class='facts']/text()")
    assert facts[0].startswith("update 1 ") and facts[1].startswith("update 9 ")
    prompts = re.search(r"(\d+) of 600 prompts", text)
    assert prompts and 20 < int(prompts[1]) < 600


def test_what_is_written_is_measured() -> None:
    items = ["x" * 10] * 5 + ["y" * 90] + ["x" * 10] * 4
    assert _within(items, 180) == items
    assert sum(map(len, _within(items, 100))) <= 100
    assert _within(items, 9) == [] == _within([], 9)
    assert _within(["<"] * 4, 12, script_json) == ["<"]  # "\\u003c" with its marks


def test_report_names_a_method_without_the_shown_seed(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 2))]
    browser = sample_browser([Run.load(run) for run in runs])
    assert browser is not None
    assert browser["seed"] == 2 and browser["without"] == ["a"]
    assert browser["methods"] == ["SFT", "b 1", "c 1"]


def test_report_names_a_run_that_lost_its_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run(tmp_path, name) for name in ("a", "b")]
    assert irl_align(capsys, "compare", *runs).status == 0
    (tmp_path / "b-seed1/summary.json").unlink()
    text = page_of(tmp_path / "comparison").text_content()
    assert "b-seed1: no longer finished; it is in the tables, but not in the figures" in text


def test_token_credit_is_drawn_on_the_text(tmp_path: Path) -> None:
    page = page_of(with_ppo(a_run(tmp_path)))
    articles = page.xpath("//section[@id='credit']//article")
    facts = [a.xpath("./p[@class='facts']")[0].text_content() for a in articles]
    assert facts == ["update 1 · reward 1.5 · truncated", "update 3 · reward 3.0 · truncated"]
    tokens = articles[0].xpath(".//span[@class='token']")
    assert [t.text_content() for t in tokens] == ["the", " <b>", " cat"]
    assert [t.get("data-credit") for t in tokens] == ["0.5", "-1.0", "0.0"]
    assert [t.get("data-advantage") for t in tokens] == ["0.25", "0.5", "-1.0"]
    assert tokens[1].get("title") == "credit -1.0, advantage 2.0, kl 0.1"
    assert [t.get("tabindex") for t in tokens] == ["0", "-1", "-1"]
    titles = page.xpath("//figure//*[local-name()='title']/text()")
    assert "PPO: KL to the reference, nats" in titles


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        (["the", "Ġcat", "<eos>"], ["the", " cat", "<eos>"]),
        (["▁the", "▁ca", "t"], [" the", " ca", "t"]),
        (["caf", "Ã©", "Ġx"], ["caf", "é", " x"]),
        (["plain", "words"], ["plain", "words"]),
    ],
)
def test_token_texts(tokens: list[str], texts: list[str]) -> None:
    assert token_texts(tokens) == texts


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path, name, seed) for seed in (1, 2) for name in ("a", "b")]
    assert irl_align(capsys, "compare", *runs).status == 0
    folder = tmp_path / "comparison"
    figures, output = tmp_path / "figures", tmp_path / "deep/r.html"
    ended = irl_align(capsys, "report", folder, "--output", output, "--figures", figures)
    assert (ended.status, ended.out) == (0, f"report: {output}\n")
    page = html.document_fromstring(output.read_text(encoding="utf-8"))
    tables = {
        section.get("id"): [d.get("aria-label") for d in section.xpath(".//div[@role='region']")]
        for section in page.xpath("//section[@id]")
    }
    assert tables["results"][:2] == ["results", "vital signs, at temperature 1"]
    assert tables["cost"][0].startswith("seconds") and len(tables["reward-health"]) == 2
    assert "20.0" in page.xpath("//section[@id='results']//table")[0].text_content()
    marks = page.xpath("//figure//*[local-name()='use']/*[local-name()='title']/text()")
    assert "a: 20 at 1; mean of 2 seeds" in marks
    assert {"SFT, greedy: 20", "b, T=1: 20"} <= set(marks)
    stored = json.loads(page.xpath("//script[@id='sample-data']/text()")[0])
    assert stored["methods"] == ["SFT", "a 1", "b 1"] and stored["seed"] == 1
    names = {path.name for path in figures.iterdir()}
    assert {
        "standing-slot_error_rate.svg",
        "curve-slot_error_rate-t1.svg",
        "frontier.svg",
        "costs.svg",
        "costs.png",
    } <= names
    for path in figures.glob("*.svg"):
        drawn = path.read_bytes()
        assert etree.fromstring(drawn).tag == f"{SVG}svg" and b"var(" not in drawn
        with Image.open(path.with_suffix(".png")) as image:
            assert image.format == "PNG" and image.width == 1222  # 440 points at 200 dpi


def test_ppos_curves_are_means_over_seeds(tmp_path: Path) -> None:
    views = []
    for seed, golds in ((1, (0.3, 0.2)), (2, (0.5, 0.3, 0.1))):
        run = with_ppo(a_run(tmp_path / str(seed), "m", seed))
        records = [{"reward": 1.0, "kl": 0.1, "gold_slot_error_rate": gold} for gold in golds]
        (run.parent / "store/ppo-1/metrics.jsonl").write_text(to_lines(records))
        views.append(Run.load(run))
    figures = {figure.key: figure for figure in ppo_curves(views, "slot_error_rate")}
    assert set(figures) == {"ppo-reward", "ppo-kl", "ppo-gold_slot_error_rate"}
    without = {figure.key for figure in ppo_curves(views, None)}  # data without gold
    assert without == {"ppo-reward", "ppo-kl"}
    gold = figures["ppo-gold_slot_error_rate"]
    assert gold.title == "PPO: rollouts' slot error rate %"
    (line,) = gold.series
    assert line.name == "m, policy-1"
    assert [(p.x, round(p.y, 6), p.note) for p in line.points] == [
        (1.0, 40.0, "mean of 2 seeds"), (2.0, 25.0, "mean of 2 seeds"), (3.0, 10.0, "one seed"),
    ]  # fmt: skip
    low = line.points[0].low
    assert low is not None and low < 0 and line.points[2].low is None


def test_long_tables_are_closed_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run(tmp_path, f"m{i}", seed) for seed in (1, 2) for i in range(7)]
    assert irl_align(capsys, "compare", *runs).status == 0
    page = page_of(tmp_path / "comparison")
    for table in page.xpath("//details//table"):
        is_open = next(table.iterancestors("details")).get("open") is not None
        assert is_open == (len(table.xpath("./tbody/tr")) <= 12)
    rewards, _ = page.xpath("//section[@id='reward-health']//details")
    assert "84 rows" in rewards.find("summary").text_content() and rewards.get("open") is None


def test_report_names_a_deleted_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path, name) for name in ("a", "b")]
    assert irl_align(capsys, "compare", *runs).status == 0
    (tmp_path / "b-seed1/recipe.yaml").unlink()
    page = page_of(tmp_path / "comparison")
    assert "b-seed1: deleted; it is in the tables, but not in the figures" in page.text_content()


def test_write_report_refuses_what_is_no_run_or_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = the_line(irl_align(capsys, "report", tmp_path))
    assert "found no comparison.json and no recipe.yaml" in line
    stopped = a_run(tmp_path, "x", finished=False)
    assert "not finished" in the_line(irl_align(capsys, "report", stopped))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "comparison.json").write_text('{"runs": []}')
    assert "comparison.json: found no " in the_line(irl_align(capsys, "report", broken))


def test_two_builds_are_the_same(tmp_path: Path) -> None:
    run = with_ppo(a_run(tmp_path))
    one = write_report(run, tmp_path / "1.html").read_bytes()
    assert write_report(run, tmp_path / "2.html").read_bytes() == one


def drawn(figure: Drawable, alone: bool = True) -> Any:
    """The figure's SVG, read; no warning while it is drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return etree.fromstring(svg(figure, alone))


def texts(root: Any) -> list[str]:
    return [text.text for text in root.iter(f"{SVG}text")]


def message(root: Any, tag: str) -> list[Any]:
    """The marks of a tag that have a text of their own."""
    return [mark for mark in root.iter(SVG + tag) if mark.find(f"{SVG}title") is not None]


def corners(path: Any) -> list[tuple[float, float]]:
    pairs = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d"))
    return [(float(x), float(y)) for x, y in pairs]


def test_a_plot_puts_points_where_they_belong() -> None:
    """Equal steps in the data are equal steps on the page, larger values higher up."""
    points = [
        Point(0.0, 10.0, 9.0, 11.0),
        Point(2.0, 30.0, float("nan"), 40.0),  # no interval
        Point(1.0, 20.0, note="seed 3"),
        Point(3.0, float("nan")),
    ]
    root = drawn(Plot("k", "t", "x", "y", [Series("s", points)]))
    marks = message(root, "use")
    assert [mark[0].text for mark in marks] == [
        "s: 10 at 0 (9 to 11)", "s: 20 at 1; seed 3", "s: 30 at 2",
    ]  # fmt: skip
    (x0, y0), (x1, y1), (x2, y2) = [(float(m.get("x")), float(m.get("y"))) for m in marks]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01) and x1 > x0
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.01) and y1 < y0
    paths = [corners(path) for path in root.iter(f"{SVG}path")]
    assert [(x0, y0), (x1, y1), (x2, y2)] in paths  # the line
    ((_, low), (_, high)) = next(p for p in paths if len(p) == 2 and p[0][0] == p[1][0] == x0
                                 and abs(p[0][1] - p[1][1]) < (y0 - y1) / 2)  # fmt: skip
    assert low - y0 == pytest.approx(y0 - high, abs=0.01)
    assert low - y0 == pytest.approx((y0 - y1) / 10, abs=0.01)  # 1 of the steps' 10


def test_intervals_at_an_iteration_lie_side_by_side() -> None:
    series = [Series(n, [Point(0.0, 1.0, 0.5, 1.5), Point(1.0, 2.0)]) for n in "abc"]
    measured, counted = (Plot("k", "t", "x", "y", series, whole_x=w) for w in (False, True))
    assert len({m.get("x") for m in message(drawn(measured), "use")}) == 2
    x = [float(m.get("x")) for m in message(drawn(counted), "use")]
    assert x[0] < x[2] < x[4] < x[1] and x[2] - x[0] == pytest.approx(x[4] - x[2], abs=0.01)


@pytest.mark.parametrize(("count", "areas"), [(12, 0), (13, 2)])
def test_many_intervals_of_a_line_are_an_area(count: int, areas: int) -> None:
    points = [Point(float(i), 2.0, 1.0, 3.0) for i in range(count)]
    root = drawn(Plot("k", "t", "x", "y", [Series(n, points) for n in "ab"], whole_x=True))
    shaded = [e for e in root.iter() if "opacity: 0.15" in (e.get("style") or "")]
    assert len(shaded) == areas
    marks = message(root, "use")
    assert len(marks) == 2 * count and marks[0][0].text == "a: 2 at 0 (1 to 3)"
    moved_aside = len({mark.get("x") for mark in marks}) == 2 * count
    assert moved_aside == (areas == 0)


@pytest.mark.parametrize(
    ("xs", "ticks"), [((0.0, 1.0), ["0", "1"]), ((2.0,), ["2"]), ((0.0, 400.0), ["0", "100"])]
)
def test_what_is_counted_has_whole_ticks(xs: tuple[float, ...], ticks: list[str]) -> None:
    points = [Point(x, 0.25) for x in xs]
    said = texts(drawn(Plot("k", "t", "x", "y", [Series("s", points)], whole_x=True)))
    before_label = said[: said.index("x")]
    assert before_label[: len(ticks)] == ticks
    assert all("." not in text for text in before_label)


def test_many_points_are_a_line_alone() -> None:
    points = [Point(float(i), float(i % 7)) for i in range(61)]
    root = drawn(Plot("k", "t", "x", "y", [Series("s", points)]))
    assert message(root, "use") == [] == message(root, "path")
    assert max(len(corners(path)) for path in root.iter(f"{SVG}path")) == 61
    assert len(message(drawn(Plot("k", "t", "x", "y", [Series("s", points[:60])])), "use")) == 60
    unjoined = Plot("k", "t", "x", "y", [Series("s", points)], joined=False)
    assert len(message(drawn(unjoined), "use")) == 61


def test_bars_are_as_long_as_their_values() -> None:
    figure = Bars("k", "t", "seconds", [("a", {"x": 1000.0, "y": 3000.0}), ("b", {"y": 2000.0})])
    root = drawn(figure)
    boxes = message(root, "path")
    assert [b[0].text for b in boxes] == [
        "a, x: 1,000 seconds", "a, y: 3,000 seconds", "b, y: 2,000 seconds",
    ]  # fmt: skip
    ends = [(min(xy)[0], max(xy)[0]) for xy in map(corners, boxes)]
    widths = [high - low for low, high in ends]
    assert [w / widths[0] for w in widths] == pytest.approx([1.0, 3.0, 2.0], rel=0.001)
    assert ends[1][0] == pytest.approx(ends[0][1], abs=0.01) and ends[2][0] == ends[0][0]
    assert boxes[1].get("style") == boxes[2].get("style") != boxes[0].get("style")
    said = texts(root)
    assert {"a: 4,000 seconds", "b: 2,000 seconds", "2,000", "seconds", "x", "y"} <= set(said)


def test_dots_lie_in_the_rows_of_their_names() -> None:
    """The value goes to the right, names go down, and no mark lies on another series' interval."""
    greedy = Series("greedy", [Point(0.0, 10.0, 8.0, 14.0), Point(1.0, 20.0)])
    sampled = Series("T=1", [Point(0.0, 10.0), Point(2.0, 40.0)])
    root = drawn(Dots("k", "t", "%", ["SFT", "IRL", "a third"], [greedy, sampled]))
    marks = message(root, "use")
    assert [mark[0].text for mark in marks] == [
        "SFT, greedy: 10 (8 to 14)", "IRL, greedy: 20", "SFT, T=1: 10", "a third, T=1: 40",
    ]  # fmt: skip
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = [(float(m.get("x")), float(m.get("y"))) for m in marks]
    assert x2 == x0 and x3 - x1 == pytest.approx(2 * (x1 - x0), abs=0.01) and x1 > x0
    assert y0 < y2 < y1 < y3 and y3 - y2 == pytest.approx(2 * (y1 - y0), abs=0.01)
    (line,) = [p for p in map(corners, root.iter(f"{SVG}path"))
               if len(p) == 2 and p[0][1] == p[1][1] == pytest.approx(y0, abs=0.01)]  # fmt: skip
    low, high = sorted(x for x, _ in line)
    assert (high - x0) / (x0 - low) == pytest.approx(2.0, abs=0.01)
    assert high - low == pytest.approx(0.6 * (x1 - x0), abs=0.02)
    assert {"SFT", "IRL", "a third", "%", "greedy", "T=1"} <= set(texts(root))


@pytest.mark.parametrize(
    "figure",
    [
        Plot("k", "t", "x", "y", []),
        Plot("k", "t", "x", "y", [Series("s", [Point(0.0, float("inf"))])]),
        Dots("k", "t", "%", [], []),
        Dots("k", "t", "%", ["a"], [Series("s", []), Series("u", [Point(0.0, float("nan"))])]),
        Bars("k", "t", "seconds", []),
        Bars("k", "t", "seconds", [("a", {"x": 0.0})]),
    ],
)
def test_figures_of_nothing_are_drawn(figure: Drawable) -> None:
    assert "t" in texts(drawn(figure))


def test_names_are_drawn_as_they_are() -> None:
    """Neither markup, formulas, marked colours, nor what XML cannot hold does anything."""
    names = ["<b>$x_{$&\"'", "_hidden", "$1 + $2", "#1c1c1c", "nul\0 \ud800", "漢字", "w" * 70]
    series = [Series(name, [Point(0.0, 1.0)]) for name in names]
    root = drawn(Plot("k", "<i>$t$", "$x$", "#ffffff", series), alone=False)
    assert root.findtext("title") == "<i>$t$"
    said = [text.text for text in root.iter("text")]
    shown = [*names[:4], "nul\ufffd \ufffd", "漢字", "w" * 60, "w" * 10]
    assert {"<i>$t$", "$x$", "#ffffff", *shown} <= set(said)
    marks = [title.text for title in root.iter("title")][1:]
    assert marks == [f"{name}: 1 at 0" for name in [*names[:4], shown[4], *names[5:]]]


def test_a_figure_in_a_page_has_the_pages_colours() -> None:
    plot = Plot("k", "t", "x", "y", [Series("s", [Point(0.0, 1.0), Point(1.0, 2.0)])])
    inside, alone = (drawn(plot, alone) for alone in (False, True))
    styles = [e.get("style") for e in inside.iter() if e.get("style")]
    assert all("fill: var(--" in s for s in (t.get("style") for t in inside.iter("text")))
    colours = {c for style in styles for c in re.findall(r"(?<!, )#\w+", style)}
    assert colours == {"#0072b2"}  # the series' own; all else is a variable
    actual = {name for style in styles for name in re.findall(r"var\((--\w+), #\w{6}\)", style)}
    assert actual == {"--text", "--quiet", "--rule", "--page"}
    assert (inside.get("width"), alone.get("width")) == (None, "440pt")
    assert all(root.get("role") == "img" and root[0].text == "t" for root in (inside, alone))
    assert not list(inside.iter("style", "metadata", "clipPath"))


def test_figures_are_the_same_whatever_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    plot = Plot("k", "t", "x", "y", [Series("s", [Point(0.0, 1.0), Point(1.0, 2.0)])])
    text, image = svg(plot), png(plot)
    with matplotlib.rc_context({"lines.linewidth": 9.0, "svg.fonttype": "path", "font.size": 30}):
        assert (svg(plot), png(plot)) == (text, image)
        assert matplotlib.rcParams["font.size"] == 30  # and the settings are left as they were
    with Image.open(io.BytesIO(image)) as drawn_image:
        assert drawn_image.getpixel((0, 0)) == (255, 255, 255, 255)
        assert "Software" not in drawn_image.info


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    line = the_line(irl_align(capsys, "report", run))
    assert "matplotlib is not installed; install irl-align[report]" in line


@pytest.mark.parametrize("value", [HOSTILE, {"a": [1, None, "</SCRIPT >"]}, "<!--"])
def test_json_in_a_script_is_the_same_json(value: Any) -> None:
    text = script_json(value)
    assert "<" not in text and "\u2028" not in text and json.loads(text) == value
