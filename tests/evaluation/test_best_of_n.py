"""Best-of-n curves: the estimator against enumeration, and the command on a tiny run."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import html
from support.shared_runs import shared_run
from support.tiny_runs import irl_align, the_line

from irl_align.evaluation.best_of_n import LOWER_IS_BETTER, curve, expected_best
from irl_align.evaluation.tables import curve_notes, curve_table
from irl_align.training.train import Result

pytestmark = pytest.mark.timeout(240)
ROWS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-5, 5)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.data())
def test_expected_best_is_the_mean_over_all_subsets(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Of every subset of n the best by score; among equals each is as likely."""
    n = data.draw(st.integers(1, len(rows)))
    totals = []
    for subset in combinations(rows, n):
        best = max(score for score, _ in subset)
        among = [value for score, value in subset if score == best]
        totals.append(sum(among) / len(among))
    scores, values = np.array([rows], dtype=float).transpose(2, 0, 1)
    expected = sum(totals) / len(totals)
    assert expected_best(scores, values, n)[0] == pytest.approx(expected, abs=1e-9)


def test_expected_best_puts_truncated_samples_last() -> None:
    scores = np.array([[-math.inf, 0.0], [-math.inf, -math.inf]])
    values = np.array([[5.0, 1.0], [2.0, 4.0]])
    assert expected_best(scores, values, 2).tolist() == [1.0, 3.0]


def test_curve_reports_overoptimisation_where_gold_falls_while_the_reward_rises() -> None:
    """The top score of every prompt is a bad text, the next best a good one."""
    scores = np.tile(np.arange(8.0), (30, 1)) + np.linspace(0, 0.01, 30)[:, None]
    errors = np.tile([4.0, 4, 4, 4, 3, 1, 0, 9], (30, 1)) + np.arange(30)[:, None] % 3
    honest = np.tile(np.arange(8.0)[::-1], (30, 1))
    fixed = np.tile(np.arange(30.0)[:, None], (1, 8))
    golds = {"errors": errors, "honest": honest, "fixed": fixed}
    report = curve(scores, golds, dict.fromkeys(golds, True))
    assert report["n"] == [1, 2, 4, 8]
    assert report["kl"] == pytest.approx([0.0, math.log(2) - 0.5, math.log(4) - 0.75,
                                          math.log(8) - 0.875])  # fmt: skip
    assert set(report["gold"]) == {"errors", "honest"}  # what no sample changes is left out
    bad = report["gold"]["errors"]
    assert bad["overoptimised"] and bad["peak_n"] == 1
    assert bad["estimates"][-1]["mean"] == pytest.approx(9 + 1)  # 0, 1, 2 in turn, mean 1
    good = report["gold"]["honest"]
    assert not good["overoptimised"] and good["peak_n"] == 8
    assert [e["mean"] for e in good["estimates"]] == pytest.approx(
        [9 / (n + 1) - 1 for n in (1, 2, 4, 8)]  # least of n of 0 to 7, without replacement
    )
    rewards = [e["mean"] for e in report["reward"]]
    assert rewards == sorted(rewards)


def test_curve_takes_a_high_fully_right_as_good() -> None:
    right = np.array([[0.0, 1.0], [0.0, 1.0]])
    report = curve(np.array([[0.0, 1.0]] * 2), {"fully_right": right}, LOWER_IS_BETTER)
    assert report["gold"]["fully_right"]["peak_n"] == 2
    assert report["gold"]["fully_right"]["lower_is_better"] is False


def test_curve_does_not_judge_a_gold_of_unknown_direction() -> None:
    """Its values fall or rise with n; nothing says which of them is good."""
    scores = np.tile(np.arange(4.0), (20, 1)) + np.linspace(0, 0.01, 20)[:, None]
    golds = {"politeness": -scores, "words": scores}
    report = curve(scores, golds, {"politeness": False})
    words = report["gold"]["words"]
    assert {name: words[name] for name in words if name != "estimates"} == {
        "lower_is_better": None,
        "peak_n": None,
        "overoptimised": None,
        "fit": None,
    }
    assert words["estimates"][-1]["mean"] == pytest.approx(3.005)
    assert report["gold"]["politeness"]["overoptimised"]
    over, unknown = curve_notes(report)
    assert over.startswith("overoptimised: politeness is best at n = 1")
    assert unknown == (
        "best of n: not judged for overoptimisation, since the gold does not say whether high or "
        "low is good: words"
    )
    assert [row[-1] for row in curve_table(report).texts()][-1].startswith("3.005")


@pytest.fixture(scope="module")
def run() -> Result:
    return shared_run("irl")


def test_best_of_saves_the_curve_and_the_report_shows_it(
    run: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = irl_align(capsys, "evaluate", run.folder, "--best-of", 4, "--prompts", 5)
    assert ended.status == 0, ended.err
    assert "best of n by the reward" in ended.out
    stored = json.loads((run.folder / "evaluation.json").read_text())["best_of"]
    assert stored["n"] == [1, 2, 4] and stored["reward"][0]["n"] == 5
    rewards = [actual["mean"] for actual in stored["reward"]]
    assert rewards == sorted(rewards)
    store = run.folder.parent / "store"
    (stage,) = store.glob("best-of-curve-*")
    irl_align(capsys, "evaluate", run.folder, "--best-of", 4, "--prompts", 5)
    assert list(store.glob("best-of-curve-*")) == [stage]

    assert irl_align(capsys, "report", run.folder).status == 0
    page = html.document_fromstring((run.folder / "report.html").read_text(encoding="utf-8"))
    titles = page.xpath("//figure//*[local-name()='title']/text()")
    assert "best of n: reward" in titles
    assert any(title.startswith(f"{run.folder.name}: ") and "n = 4" in title for title in titles)
    headings = [text.strip() for text in page.xpath("//section[@id='evaluations']//summary/text()")]
    assert "irl-seed0: best of n by the reward: means over prompts" in headings

    # An evaluation of what the run no longer has is not shown.
    path = run.folder / "evaluation.json"
    path.write_text(path.read_text().replace(stored_reward(run), "store/other/model"))
    irl_align(capsys, "report", run.folder)
    assert "best of n" not in (run.folder / "report.html").read_text(encoding="utf-8")


def stored_reward(run: Result) -> str:
    return str(json.loads((run.folder / "summary.json").read_text())["reward"])


def test_evaluate_refuses_nothing_and_best_of_without_a_reward(
    run: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = the_line(irl_align(capsys, "evaluate", run.folder))
    assert (
        nothing == "evaluate: found none of --card, --best-of, --judge and --lm-eval, expected one"
    )
    spin = shared_run("spin")
    line = the_line(irl_align(capsys, "evaluate", spin.folder, "--best-of", 4))
    assert line.endswith("found no finished run with an explicit reward, expected one")
