"""Gain against KL: coefficients found again, peaks by a fine grid, overoptimisation, swept runs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.synthetic_runs import synthetic_recipe, synthetic_run
from support.tiny_runs import RECIPE, irl_align, the_line

from irl_align.errors import UserError
from irl_align.evaluation.compare.overoptimization import Form, fit_gain, frontiers, overoptimised
from irl_align.evaluation.compare.runner import plan
from irl_align.evaluation.compare.sweep import named, parse_sweeps, settings
from irl_align.evaluation.compare.tables import gain_fits, notes
from irl_align.evaluation.report.curves import frontier
from irl_align.evaluation.report.figures import Plot
from irl_align.evaluation.report.write import write_report
from irl_align.training.run_folder import Run
from irl_align.utils.files import to_lines

KLS = [0.0, 0.5, 1.0, 2.0, 4.0, 9.0, 16.0]


def gain(form: str, kl: float, alpha: float, beta: float) -> float:
    """The forms as they are printed in the paper."""
    d = math.sqrt(kl)
    if d == 0.0:
        return 0.0
    return d * (alpha - beta * d) if form == "best_of_n" else d * (alpha - beta * math.log(d))


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.4, 0.35), (0.5, -0.1)])
def test_fits_find_the_coefficients_and_the_peak(form: Form, alpha: float, beta: float) -> None:
    fit = fit_gain(form, KLS, [gain(form, kl, alpha, beta) for kl in KLS])
    assert fit is not None
    assert (fit.alpha, fit.beta, fit.rmse) == pytest.approx((alpha, beta, 0.0), abs=1e-9)
    assert fit.at(3.0) == pytest.approx(gain(form, 3.0, alpha, beta))
    grid = np.linspace(1e-4, 400.0, 400_001)
    actual = grid[np.argmax([gain(form, kl, alpha, beta) for kl in grid[::100]]) * 100]
    if beta < 0:
        assert fit.peak_kl is None and actual == grid[-1]
    else:
        assert fit.peak_kl == pytest.approx(actual, abs=0.11)


def test_too_few_points_are_not_fitted() -> None:
    assert fit_gain("rl", [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.0, 1.0]) is None
    assert fit_gain("rl", [1.0] * 5, [0.1, 0.2, 0.3, 0.2, 0.1]) is None
    steep = fit_gain("rl", KLS, [gain("rl", kl, 1.0, 1e-4) for kl in KLS])
    assert steep is not None and steep.peak_kl is None  # beyond any number


def test_gold_that_falls_while_the_proxy_rises_is_overoptimised() -> None:
    noise = [0.0, 0.02, -0.02, 0.02, -0.02, 0.02, -0.02]

    def fit(alpha: float, beta: float) -> Any:
        values = [gain("rl", kl, alpha, beta) + e for kl, e in zip(KLS, noise, strict=True)]
        return fit_gain("rl", KLS, values)

    falling, rising = fit(0.5, 0.5), fit(1.0, 0.1)
    assert overoptimised(falling, rising, 16.0)
    assert not overoptimised(rising, rising, 16.0)
    assert not overoptimised(falling, falling, 16.0)  # the proxy falls too
    assert not overoptimised(falling, rising, 0.5)  # not as far as its peak
    assert not overoptimised(falling, None, 16.0)
    barely = fit(0.5, 0.5 / (1 + math.log(3.9)))  # its peak is just before the last point
    assert barely.peak_kl < 16.0 and not overoptimised(barely, rising, 16.0)


# ---- sweeps


def test_sweeps_are_all_combinations() -> None:
    sweeps = parse_sweeps(["policy_update.kl_coef=0.02,0.5", "irl:reward.init=cold,warm"])
    assert [(s.target, s.key) for s in sweeps] == [
        (None, "policy_update.kl_coef"),
        ("irl", "reward.init"),
    ]
    assert settings(sweeps)[1] == ("policy_update.kl_coef=0.02", "reward.init=warm")
    assert len(settings(sweeps)) == 4 and settings([]) == [()]
    assert named("m", ("a.kl_coef=0.02", "data.path=x/y z")) == "m-kl_coef-0.02-path-x-y-z"


@pytest.mark.parametrize(
    "wrong",
    ["kl", "=1,2", ":kl=1,2", "kl=1", "kl=1,1", "kl=1,,2", "seed=1,2", "a=1,2 a=3,4"],
)
def test_bad_sweeps_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"^--sweep: found .*, expected"):
        parse_sweeps(wrong.split())


def test_swept_runs_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, more in (("a", ""), ("b", "loop: {iterations: 0}\n")):
        text = RECIPE.replace("name: tiny", f"name: tiny-{name}")
        text = text.replace("loop:\n  iterations: 1\n  signs: {unfit_accuracy: 0.0}\n", more)
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    jobs = plan(["a.yaml", "b.yaml"], [1, 2], ["a:policy_update.n=2,4"])
    assert [(j.recipe.name, j.recipe.seed) for j in jobs] == [
        ("tiny-a-n-2", 1), ("tiny-a-n-2", 2), ("tiny-a-n-4", 1), ("tiny-a-n-4", 2),
        ("tiny-b", 1), ("tiny-b", 2),
    ]  # fmt: skip
    assert jobs[2].recipe.policy_update.n == 4  # type: ignore[union-attr]
    assert jobs[2].swept == {"family": "tiny-a", "value": "policy_update.n=4"}
    assert jobs[4].swept is None
    two = plan(["a.yaml"], [1], ["policy_update.n=2,4", "reward.init=warm,cold"])
    assert [job.swept for job in two] == [  # a curve over the last, for each of the others
        {"family": f"tiny-a-n-{n}", "value": f"reward.init={init}"}
        for n in (2, 4)
        for init in ("warm", "cold")
    ]
    line = the_line(irl_align(capsys, "compare", "a.yaml", "--sweep", "c:policy_update.n=2,4"))
    assert line == "c:policy_update.n=2,4: found no recipe 'c', expected one of tiny-a"
    line = the_line(irl_align(capsys, "compare", "a.yaml", "--sweep", "policy_update.m=2,4"))
    assert "policy_update.m: unknown option" in line


def swept_run(root: Path, coef: float, seed: int, gold: float, proxy: float, kl: float) -> Path:
    """A run of one iteration, of whose policy these are known."""
    name = f"m-kl_coef-{coef:g}"
    recipe = synthetic_recipe(name, seed, policy_update={"kind": "ppo", "batch_size": 4})
    metrics = {"slot_error_rate": gold}
    known = {"gold": "toy:gold", "headline": "slot_error_rate", "lower_is_better": True}
    evaluation = {"policy": 1, "temperature": 1.0, "kl": kl, "length": 9.0, **known}
    extra = {
        "vitals/1": {"reward_gain": proxy},
        "evaluation/1/t1": {**evaluation, "metrics": metrics},
    }
    errors = [(0.3, 0.2), (gold, 0.1)]
    return synthetic_run(root, name, seed, errors, recipe=recipe, extra=extra)


def test_a_sweep_is_one_frontier(tmp_path: Path) -> None:
    sweeps = {}
    views = []
    for coef, kl in ((0.2, 1.0), (0.1, 4.0), (0.05, 9.0), (0.02, 16.0), (0.01, 25.0)):
        for seed in (1, 2):
            error = 0.3 - gain("rl", kl, 0.1, 0.1)
            run = swept_run(tmp_path, coef, seed, error, gain("rl", kl, 1.0, 0.1), kl)
            views.append(Run.load(run))
            value = f"policy_update.kl_coef={coef:g}"
            sweeps[views[-1].recipe["name"]] = {"family": "m", "value": value}
    (actual,) = frontiers(views, sweeps, "slot_error_rate", {"slot_error_rate@1": True})
    assert actual["name"] == "m" and len(actual["places"]) == 10
    assert actual["gold"]["alpha"] == pytest.approx(0.1) and actual["gold"][
        "beta"
    ] == pytest.approx(0.1)
    assert actual["proxy"]["alpha"] == pytest.approx(1.0) and actual["overoptimised"]
    assert actual["places"][0]["note"] == "policy_update.kl_coef=0.2, seed 1"
    assert frontiers(views, sweeps, None, {}) == []
    (figure,) = frontier(views, {"headline": "slot_error_rate", "sweeps": sweeps})
    assert isinstance(figure, Plot)
    (series,) = figure.series
    assert series.name == "m" and series.points[-1].x == 25.0
    assert series.points[-1].note == "policy_update.kl_coef=0.01, seed 2, iteration 1"
    apart = frontier(views, {"headline": "slot_error_rate", "sweeps": {}})[0].series
    assert [one.name for one in apart] == [f"m-kl_coef-{c:g}" for c in (0.2, 0.1, 0.05, 0.02, 0.01)]
    (row,) = gain_fits({"frontiers": [actual]}).texts()
    assert row == ["m", "10", "25.00", "0.100", "0.100", "1.00", "1.000", "0.100", "beyond", "yes"]


def test_ppos_updates_are_a_frontier_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = swept_run(tmp_path, 0.1, 1, 0.2, 1.0, 2.0)
    stage = tmp_path / "store/ppo-1"
    stage.mkdir(parents=True)
    rows = [
        {"reward": 1.0 + gain("rl", kl, 1.0, 0.1), "kl": kl, "length": 20.0}
        | {"gold_slot_error_rate": 0.3 - gain("rl", kl, 0.1, 0.1)}
        for kl in (0.0, 1.0, 4.0, 9.0, 16.0, 25.0)
    ]
    (stage / "metrics.jsonl").write_text(to_lines(rows), encoding="utf-8")
    where = {"name": "ppo", "key": "k", "path": "../store/ppo-1"}
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    (run / "stages.json").write_text(json.dumps({**stages, "policy-1": where}), encoding="utf-8")
    lower = {"slot_error_rate@1": True}
    (actual,) = frontiers([Run.load(run)], {}, "slot_error_rate", lower)
    assert actual["name"] == "m-kl_coef-0.1, seed 1, policy-1" and actual["overoptimised"]
    assert [place["note"] for place in actual["places"]][-1] == "update 6"
    ended = irl_align(capsys, "compare", run)
    assert ended.status == 0 and "gain against KL" in ended.out
    analysis = json.loads((tmp_path / "comparison/comparison.json").read_text(encoding="utf-8"))
    lines = [line for line in notes(analysis) if line.startswith("overoptimised")]
    assert len(lines) == 1 and "gold falls beyond KL 1.00, while the reward still rises" in lines[0]
    for source in (run, tmp_path / "comparison"):
        page = write_report(source, figures=tmp_path / "figures").read_text(encoding="utf-8")
        assert "m-kl_coef-0.1, seed 1, policy-1: gain over the start" in page
        assert "the reward optimised on, fitted" in page
    assert (tmp_path / "figures/gain-0.png").stat().st_size > 5000
