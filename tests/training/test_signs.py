"""Warning signs of rewards and policies, each bound separately."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.synthetic_runs import accuracy_record, audit_record
from support.tiny_runs import tiny_recipe

from irl_align.config.loop import SignOptions
from irl_align.training.signs import (
    find_signs,
    judge_fit,
    judge_fresh,
    judge_policy,
    judge_reward,
)

START = {
    "entropy": 2.0,
    "length": 20.0,
    "truncated": 0.01,
    "kl": 0.0,
    "demonstration_logp": -30.0,
}
BOUNDS = SignOptions()


def share_record(mean: float, half: float, prompts: int) -> dict[str, Any]:
    """An accuracy over two pairs of each prompt."""
    interval = [mean - half, mean + half]
    counts = {"pairs": 2 * prompts, "prompts": prompts}
    return {"accuracy": mean, "accuracy_interval": interval, **counts}


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({}, None),
        # entropy: 0.75 to 1.25 of the first policy's
        ({"entropy": 1.5}, None),
        ({"entropy": 1.48}, "entropy: 0.74 of the first policy's, outside 0.75 to 1.25"),
        ({"entropy": 2.5}, None),
        ({"entropy": 2.52}, "entropy: 1.26 of the first policy's, outside 0.75 to 1.25"),
        ({"entropy": math.nan}, "entropy: nan of"),
        # kl: 3 nats
        ({"kl": 3.0}, None),
        ({"kl": 3.5}, "kl: 3.50 nats, above 3"),
        ({"kl": math.nan}, "kl: nan nats"),
        # length: a quarter either way
        ({"length": 25.0}, None),
        ({"length": 15.0}, None),
        ({"length": 26.0}, "length: +30% against the first policy, beyond 25%"),
        ({"length": 14.0}, "length: -30% against"),
        # samples without EOS: two points more; fewer is no fault
        ({"truncated": 0.025}, None),
        ({"truncated": 0.0}, None),
        ({"truncated": 0.05}, "missing_eos: +4.0% samples without EOS, above 2.0%"),
        # log-prob of the demonstrations: a fall of 5 nats; a rise is no fault
        ({"demonstration_logp": -35.0}, None),
        ({"demonstration_logp": -20.0}, None),
        ({"demonstration_logp": -36.0}, "demonstration_log_prob: fell by 6.00 nats, more than 5"),
        ({"demonstration_logp": math.nan}, "demonstration_log_prob: fell by nan"),
    ],
)
def test_find_signs_names_the_passed_bound(change: dict[str, float], sign: str | None) -> None:
    signs = find_signs(BOUNDS, {**START, **change}, START)
    if sign is None:
        assert signs == []
    else:
        assert len(signs) == 1
        assert signs[0].startswith(sign)


def test_find_signs_uses_the_recipes_bounds() -> None:
    wide = SignOptions(
        entropy_low=0.1,
        entropy_high=9.0,
        kl=99.0,
        length_change=9.0,
        missing_eos=0.9,
        demonstration_log_prob=99.0,
    )
    bad = {
        "entropy": 1.0,
        "length": 40.0,
        "truncated": 0.5,
        "kl": 9.0,
        "demonstration_logp": -50.0,
    }
    assert find_signs(wide, bad, START) == []
    names = [sign.split(":")[0] for sign in find_signs(BOUNDS, bad, START)]
    assert names == ["entropy", "kl", "length", "missing_eos", "demonstration_log_prob"]


def test_find_signs_skips_what_is_not_measured() -> None:
    assert find_signs(BOUNDS, {"length": 20.0, "truncated": 0.01}, START) == []


def test_judge_policy_and_judge_reward_report_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """A record holds null for them; they neither pass as good nor break the judging."""
    logged: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda key, record: logged.update({key: record["signs"]}))
    context: Any = SimpleNamespace(recipe=tiny_recipe(tmp_path, "loop.signs.action=stop"), run=run)
    good = {"length": 9.0, "truncated": 0.0, "entropy": 1.0, "kl": 0.0}
    assert judge_policy(context, 0, good, good) is None
    stop = judge_policy(context, 0, {**good, "kl": None, "entropy": None}, good)
    assert stop == "iteration 0: entropy: not finite; policy 0 is kept"
    assert logged["signs/policy-1"] == ["entropy: not finite", "kl: not finite"]
    assert judge_policy(context, 0, good, {**good, "entropy": None}) is None

    held_out = accuracy_record(0.0, loss=None)
    fit = {"held_out": held_out, "audit": audit_record(), "older": {}}
    assert judge_reward(context, 0, fit) == "iteration 0: the reward is unfit"
    assert logged["signs/reward-0"][0].startswith("held-out pair loss is not finite")


@pytest.mark.parametrize(
    ("mean", "half", "prompts", "unfit", "sign"),
    [
        (0.78, 0.05, 500, False, None),  # whatever its calibration
        (0.55, 0.06, 500, True, "held-out accuracy is 55.0% [49.0%, 61.0%] n=1000/500, not above"),
        (0.48, 0.02, 500, True, "held-out accuracy is 48.0%"),
        (0.60, 0.20, 12, False, "held-out accuracy is 60.0% [40.0%, 80.0%] n=24/12: too few"),
        (0.50, 0.30, 12, True, "held-out accuracy is 50.0%"),
        (0.80, 0.20, 12, False, None),
    ],
)
def test_judge_reward_judges_the_ranking_with_its_interval(
    mean: float, half: float, prompts: int, unfit: bool, sign: str | None, tmp_path: Path
) -> None:
    logged: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda key, record: logged.update({key: record["signs"]}))
    recipe = tiny_recipe(tmp_path, "loop.signs.unfit_accuracy=0.5")
    context: Any = SimpleNamespace(recipe=recipe, run=run)
    held_out = share_record(mean, half, prompts) | {"loss": 3.0}
    fit = {"held_out": held_out, "audit": audit_record(), "older": {}}
    assert judge_reward(context, 0, fit) == ("iteration 0: the reward is unfit" if unfit else None)
    signs = logged["signs/reward-0"]
    assert len(signs) == (sign is not None) and all(s.startswith(str(sign)) for s in signs)


@pytest.mark.parametrize("action", ["warn", "stop"])
@pytest.mark.parametrize(
    ("two_sample", "fresh", "signs"),
    [
        ((0.50, 0.04), (0.52, 0.04), ["nothing is left to learn"]),
        ((0.53, 0.01), (0.52, 0.04), ["nothing is left to learn"]),  # surely a small difference
        ((0.50, 0.12), (0.52, 0.04), ["more held-out prompts are needed"]),
        ((0.62, 0.04), (0.50, 0.04), []),
        ((0.62, 0.04), (0.40, 0.04), ["overshoot: the reward prefers demonstrations"]),
        ((0.50, 0.04), (0.40, 0.04), ["nothing is left to learn", "overshoot"]),
    ],
)
def test_judge_fresh_asks_the_discriminator_and_reports_overshoot(
    two_sample: tuple[float, float],
    fresh: tuple[float, float],
    signs: list[str],
    action: str,
    tmp_path: Path,
) -> None:
    logged: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda key, record: logged.update({key: record["signs"]}))
    recipe = tiny_recipe(tmp_path, f"loop.signs.action={action}")
    context: Any = SimpleNamespace(recipe=recipe, run=run)
    vitals = {"two_sample": share_record(*two_sample, 500), "fresh": share_record(*fresh, 500)}
    stop = judge_fresh(context, 0, vitals)
    told = logged.get("signs/fresh-1", [])
    assert len(told) == len(signs) and all(s in t for s, t in zip(signs, told, strict=True))
    done = bool(signs) and signs[0].startswith("nothing")
    assert (stop is not None) == (done and action == "stop")


def test_judge_fresh_does_not_judge_what_is_missing(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(recipe=tiny_recipe(tmp_path), run=None)
    assert judge_fresh(context, 0, {}) is None
    assert judge_fresh(context, 0, {"two_sample": {"identical": 0, "truncated": 0}}) is None


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_judge_reward_reports_a_reward_that_forgets(action: str, tmp_path: Path) -> None:
    logged: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda key, record: logged.update({key: record["signs"]}))
    recipe = tiny_recipe(tmp_path, f"loop.signs.action={action}")
    context: Any = SimpleNamespace(recipe=recipe, run=run)
    fit = {
        "held_out": accuracy_record(0.8),
        "audit": audit_record(),
        "older": {"0": accuracy_record(0.66)},
        "older_before": {"0": accuracy_record(0.7)},
    }
    assert judge_reward(context, 1, fit) is None and logged["signs/reward-1"] == []
    stop = judge_reward(context, 1, {**fit, "older": {"0": accuracy_record(0.64)}})
    [sign] = logged["signs/reward-1"]
    fell = "fell by 6.0% to 64.0% [54.0%, 74.0%] n=100/50, more than 5.0%"
    assert sign.startswith(f"older pairs: accuracy on iteration 0 {fell}")
    assert stop == (f"iteration 1: {sign}" if action == "stop" else None)


def test_judge_reward_uses_the_pairs_that_reject_policy_samples(tmp_path: Path) -> None:
    """Contrast pairs, which are easy, hide neither a shortcut nor a reward that learned nothing."""
    logged: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda key, record: logged.update({key: record["signs"]}))
    context: Any = SimpleNamespace(
        recipe=tiny_recipe(tmp_path, "loop.signs.unfit_accuracy=0.5"), run=run
    )
    own = accuracy_record(0.71, loss=0.6)
    fit = {
        "held_out": accuracy_record(0.81),
        "by_source": {"demonstration/policy": own},
        "audit": audit_record(length=0.70),
        "older": {},
    }
    assert judge_reward(context, 0, fit) is None
    [sign] = logged["signs/reward-0"]
    assert "length alone separates 70.0% [60.0%, 80.0%] n=100/50 of the held-out" in sign
    assert "the reward 71.0% [61.0%, 81.0%] n=100/50" in sign
    own.update(accuracy=0.5, accuracy_interval=[0.4, 0.6])
    fit["audit"] = audit_record()
    assert judge_reward(context, 0, fit) is None
    [sign] = logged["signs/reward-0"]
    assert sign.startswith(
        "held-out accuracy is 50.0% [40.0%, 60.0%] n=100/50 on pairs that reject policy samples"
    )


def test_judge_reward_does_not_judge_the_ranking_of_a_log_ratio_without_a_fit(
    tmp_path: Path,
) -> None:
    """It was not fitted to rank these pairs."""
    ratio = ("reward={kind: implicit, numerator: initial, reference: start}", "loop.iterations=1")
    logged: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda key, record: logged.update({key: record["signs"]}))
    context: Any = SimpleNamespace(recipe=tiny_recipe(tmp_path, *ratio), run=run)
    own = accuracy_record(0.4, loss=9.0)
    fit = {"held_out": own, "by_source": {}, "audit": audit_record(), "older": {}}
    assert judge_reward(context, 0, fit) is None
    assert logged["signs/reward-0"] == []


@pytest.mark.parametrize(
    ("accuracies", "bound", "sign"),
    [
        (
            [0.6, 0.96, 0.97, 0.99],
            0.95,
            "saturated: training accuracy reached 95% at step 20",
        ),
        ([0.6, 0.8, 0.96, 0.97], 0.95, None),  # in the second half of the fit
        ([0.6, 0.96, 0.97, 0.99], 1.0, None),
    ],
)
def test_judge_fit_reports_a_reward_that_separates_its_pairs_early(
    accuracies: list[float], bound: float, sign: str | None, tmp_path: Path
) -> None:
    logged: dict[str, list[str]] = {}
    run = SimpleNamespace(log=lambda key, record: logged.update({key: record["signs"]}))
    recipe = tiny_recipe(tmp_path, f"loop.signs.saturated_accuracy={bound}")
    context: Any = SimpleNamespace(recipe=recipe, run=run)
    history = [{"step": 10 * (i + 1), "accuracy": a} for i, a in enumerate(accuracies)]
    judge_fit(context, 1, {"steps": 40, "history": [*history, {"step": 40, "loss": 0.1}]})
    signs = logged.get("signs/reward-fit-1", [])
    assert [text[: len(sign or "")] for text in signs] == ([sign] if sign else [])


def test_judge_reward_is_not_unfit_below_the_loss_that_it_must_have(tmp_path: Path) -> None:
    run = SimpleNamespace(log=lambda key, record: None)
    fit = {
        "older": {},
        "audit": audit_record(),
        "held_out": {**share_record(0.5, 0.05, 60), "loss": 0.7},
        "by_source": {},
    }
    for bound, stops in ((0.0, True), (0.6, True), (100.0, False)):
        options = (f"loop.signs.unfit_loss={bound}", "loop.signs.unfit_accuracy=0.5")
        context: Any = SimpleNamespace(recipe=tiny_recipe(tmp_path, *options), run=run)
        assert (judge_reward(context, 0, fit) is not None) == stops


def test_judge_fit_does_not_judge_a_stage_that_is_missing(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(recipe=tiny_recipe(tmp_path), run=None)
    judge_fit(context, 0, {})
