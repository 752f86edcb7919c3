"""How soon PPO's rollouts reach a level of gold."""

import json
from pathlib import Path

import pytest
from support.synthetic_runs import synthetic_run, trained_run
from support.tiny_runs import irl_align, the_line

from irl_align.evaluation.compare.rollouts import first_reaching, learning_speeds
from irl_align.evaluation.compare.tables import learning_speed

LOWER = {"slot_error_rate@1": True}


def test_a_level_is_reached_by_the_mean_of_a_window() -> None:
    golds = [0.4, 0.1, 0.4, 0.2, 0.2, 0.1]
    assert first_reaching(golds, 0.25, True, window=1) == 2
    assert first_reaching(golds, 0.25, True, window=2) == 2  # exactly 0.25
    assert first_reaching(golds, 0.2334, True, window=3) == 4  # 0.7 / 3
    assert first_reaching(golds, 0.16, True, window=2) == 6
    assert first_reaching(golds, 0.1, True, window=2) is None
    assert first_reaching([0.1, 0.2, 0.6], 0.4, False, window=2) == 3
    assert first_reaching(golds[:4], 1.0, True) is None  # fewer updates than the window has


def test_speeds_are_by_method_level_and_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = [
        # Of one update nothing is known.
        trained_run(tmp_path, 1, [0.4, None, *[0.3] * 5, *[0.1] * 5]),
        trained_run(tmp_path, 2, [0.4, *[0.2] * 9]),
    ]
    fast, slow = learning_speeds(views, [0.3, 0.15], "slot_error_rate", LOWER)
    assert (fast["method"], fast["role"], fast["level"]) == ("m", "policy-1", 0.3)
    # seed 1: its updates 3 to 7 have 0.3; seed 2: updates 1 to 5 have 0.24 in the mean.
    assert fast["updates"] == {"1": 7, "2": 5} and fast["samples"] == {"1": 7 * 8, "2": 5 * 8}
    assert slow["updates"] == {"1": 11, "2": None} and slow["samples"] == {"1": 11 * 8, "2": None}
    assert learning_speeds(views, [0.3], None, LOWER) == []
    assert learning_speed({"speeds": [fast, slow]}).texts() == [
        ["m, policy-1", "slot error rate 30.0%", "2 of 2", "6", "48"],
        ["m, policy-1", "slot error rate 15.0%", "1 of 2", "11", "88"],
    ]
    folders = [view.folder for view in views]
    ended = irl_align(capsys, "compare", *folders, "--gold-level", 0.3, "--gold-level", 0.15)
    assert ended.status == 0 and "how soon rollouts reach" in ended.out
    analysis = json.loads((tmp_path / "comparison/comparison.json").read_text(encoding="utf-8"))
    assert analysis["levels"] == [0.3, 0.15] and analysis["speeds"] == [fast, slow]
    assert irl_align(capsys, "report", tmp_path / "comparison").status == 0
    page = (tmp_path / "comparison/report.html").read_text(encoding="utf-8")
    assert "slot error rate 15.0%" in page


@pytest.mark.parametrize("level", ["nan", "inf"])
def test_a_level_that_is_no_number_is_refused_before_any_work(
    level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(tmp_path, 1, [0.4] * 6).folder
    line = the_line(irl_align(capsys, "compare", run, "--gold-level", level))
    assert line == f"--gold-level: found {level}, expected a finite number"
    assert not (tmp_path / "comparison").exists()


def test_without_ppo_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)])
    ended = irl_align(capsys, "compare", run, "--gold-level", 0.2)
    assert ended.status == 0 and "found no PPO training whose rollouts have gold" in " ".join(
        ended.out.split()
    )
