"""Gold and reward of PPO's rollouts where they are equally far from the first policy."""

import json
import math
from pathlib import Path

import pytest
from support.synthetic_runs import synthetic_run, trained_run
from support.tiny_runs import irl_align, the_line

from irl_align.evaluation.compare.rollouts import levels_at_kl, smoothed_at
from irl_align.utils.statistics import estimate

KLS = [0.0, 0.1, 0.3, 0.6, 1.0, 1.7, 2.5]


def error(kl: float, start: float, alpha: float, beta: float) -> float:
    """Gao et al.'s form as printed, taken off the start's error."""
    d = math.sqrt(kl)
    return start - (d * (alpha - beta * math.log(d)) if d else 0.0)


def test_the_form_and_its_start_are_found_again() -> None:
    values = [error(kl, 0.3, 0.1, 0.05) for kl in KLS]
    for kl in (0.2, 1.0, 2.5):
        assert smoothed_at(KLS, values, kl) == pytest.approx(error(kl, 0.3, 0.1, 0.05), abs=1e-4)
    # d = 1 at KL 1, where the log is 0: 0.3 - 0.1
    assert smoothed_at(KLS, values, 1.0) == pytest.approx(0.2, abs=1e-4)


def test_an_estimate_below_zero_is_no_kl() -> None:
    kls = [-0.01, *KLS[1:]]
    values = [error(kl, 0.3, 0.1, 0.05) for kl in KLS]
    assert smoothed_at(kls, values, 1.0) == pytest.approx(0.2, abs=1e-4)


def test_levels_are_empty_beyond_the_updates_and_for_few_updates() -> None:
    values = [error(kl, 0.3, 0.1, 0.05) for kl in KLS]
    assert smoothed_at(KLS, values, 2.6) is None
    assert smoothed_at(KLS[1:], values[1:], 0.05) is None  # a second iteration starts further off
    assert smoothed_at(KLS[:4], values[:4], 0.2) is None and smoothed_at([], [], 0.2) is None
    assert smoothed_at(KLS[:5], values[:5], 0.2) is not None


def test_levels_are_by_method_kl_and_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = (0.3, 0.32)
    views = [
        trained_run(tmp_path, 1, [error(kl, starts[0], 0.1, 0.05) for kl in KLS], KLS),
        trained_run(tmp_path, 2, [error(kl, starts[1], 0.1, 0.05) for kl in KLS[:6]], KLS[:6]),
    ]
    near, far = levels_at_kl(views, [1.0, 2.0], "slot_error_rate")
    assert (near["method"], near["role"], near["kl"], far["kl"]) == ("m", "policy-1", 1.0, 2.0)
    assert near["seeds"]["1"]["gold"] == pytest.approx(0.2, abs=1e-4)
    assert near["seeds"]["2"]["gold"] == pytest.approx(0.22, abs=1e-4)
    by_hand = estimate([0.2, 0.22])
    assert near["gold"]["mean"] == pytest.approx(0.21, abs=1e-4) and near["gold"]["n"] == 2
    assert near["gold"]["high"] == pytest.approx(by_hand.high, abs=1e-3)
    assert far["seeds"]["2"] is None and far["gold"]["n"] == 1 and far["gold"]["low"] is None
    assert levels_at_kl(views, [1.0], None) == []
    bent = trained_run(tmp_path, 3, [0.2] * 6, [0.1, 0.2, 0.3, 0.4, math.nan, 0.5])
    (few, bare) = (levels_at_kl([view], [0.3], "slot_error_rate")[0] for view in (bent, views[0]))
    assert few["seeds"]["3"]["gold"] == pytest.approx(0.2) and bare["seeds"]["1"] is not None

    assert near["bleu"] is None and set(near["seeds"]["1"]) == {"gold", "reward"}

    folders = [view.folder for view in views]
    ended = irl_align(capsys, "compare", *folders, "--at-kl", 1, "--at-kl", 2, "--at-kl", 3)
    assert ended.status == 0 and "rollouts at the same KL" in ended.out
    analysis = json.loads((tmp_path / "comparison/comparison.json").read_text(encoding="utf-8"))
    assert analysis["kls"] == [1.0, 2.0, 3.0] and analysis["at_kl"][:2] == [near, far]
    table = (tmp_path / "comparison/comparison.md").read_text(encoding="utf-8")
    assert "| m, policy-1 | 1 | 2 of 2 | 21.0±12.7 |" in table
    assert "| m, policy-1 | 2 | 1 of 2 |" in table
    assert "| m, policy-1 | 3 | 0 of 2 | - | - |" in table
    assert irl_align(capsys, "report", tmp_path / "comparison").status == 0
    page = (tmp_path / "comparison/report.html").read_text(encoding="utf-8")
    assert "rollouts at the same KL" in page


def test_bleu_at_the_same_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bleus = [error(kl, 61.0, 2.0, 0.0) for kl in KLS]
    runs = [trained_run(tmp_path, seed, [0.3] * 7, KLS, bleus) for seed in (1, 2)]
    [actual] = levels_at_kl(runs, [1.0], "slot_error_rate")
    assert actual["bleu"]["mean"] == pytest.approx(59.0, abs=1e-3) and actual["bleu"]["n"] == 2
    ended = irl_align(capsys, "compare", *(run.folder for run in runs), "--at-kl", 1)
    assert ended.status == 0
    table = (tmp_path / "comparison/comparison.md").read_text(encoding="utf-8")
    assert "| m, policy-1 | 1 | 2 of 2 | 30.0 | 2.15 | 59.0 |" in table


@pytest.mark.parametrize("kl", ["nan", "inf", "0", "-1"])
def test_what_is_no_kl_is_refused_before_any_work(
    kl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(tmp_path, 1, [0.4] * 6).folder
    line = the_line(irl_align(capsys, "compare", run, f"--at-kl={kl}"))
    assert line == f"--at-kl: found {float(kl)}, expected a finite number above 0"
    assert not (tmp_path / "comparison").exists()


def test_without_ppo_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = synthetic_run(tmp_path, "m", 1, [(0.3, 0.2), (0.2, 0.1)])
    ended = irl_align(capsys, "compare", run, "--at-kl", 1)
    assert ended.status == 0 and "no values for the KL: found no PPO training" in " ".join(
        ended.out.split()
    )
