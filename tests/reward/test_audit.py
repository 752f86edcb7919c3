"""The shortcut audit against hand numbers."""

import numpy as np
import pytest
from datasets import Dataset
from support.synthetic_runs import audit_record

from irl_align.reward.audit import shortcut_audit, shortcut_warnings, within_prompts
from irl_align.utils.statistics import Estimate, clustered_share


def test_shortcut_audit_by_hand() -> None:
    pairs = Dataset.from_dict(
        {
            "chosen_ids": [[3], [3, 4], [3, 4], [3, 4]],
            "rejected_ids": [[3, 4], [3, 4, 5], [3, 4], [5]],
            "rejected_truncated": [True, False, True, True],
            "prompt_key": ["a", "a", "b", "b"],
        }
    )
    chosen = [np.array(x, np.float32) for x in ([-1.0], [-1, -1], [-2, -2], [-3, -1])]
    rejected = [np.array(x, np.float32) for x in ([-1, -1], [-1, -1, -3], [-1, -2], [-3.5])]
    audit = shortcut_audit(pairs, chosen, rejected)
    # Shorter wins, no, ... by prompt: 2 of 2 and 1/2 of 2.
    share = clustered_share([1.0, 1.0, 0.5, 0.0], ["a", "a", "b", "b"])
    intervals = audit.pop("intervals")
    assert intervals["length"] == [share.low, share.high] and share.low is not None
    assert audit == pytest.approx(
        {
            "pairs": 4,
            "prompts": 2,
            # chosen longer: no, no, tie, yes = 1.5 of 4, so shorter wins 2.5 of 4
            "length": 0.625,
            # only rejected ones are truncated: three are separated, one is a tie
            "truncation": 3.5 / 4,
            # sums -1 > -2, -2 > -5, -4 < -3, -4 < -3.5
            "logprob_sum": 0.5,
            # means -1 = -1, -1 > -5/3, -2 < -1.5, -2 > -3.5
            "logprob_mean": 2.5 / 4,
        }
    )


@pytest.mark.parametrize(
    ("audit", "accuracy", "named"),
    [
        ({"length": 0.9, "truncation": 0.5}, 0.92, ["length"]),
        ({"length": 0.9, "truncation": 0.88}, 0.92, ["length", "truncation"]),
        ({"length": 0.8, "truncation": 0.5}, 0.92, []),  # the reward is far better
        ({"length": 0.54, "truncation": 0.5}, 0.52, []),  # no better than chance
    ],
)
def test_shortcut_warnings_name_close_shortcuts(
    audit: dict[str, float], accuracy: float, named: list[str]
) -> None:
    recorded = audit_record(**audit)
    lines = shortcut_warnings(recorded, Estimate(accuracy, 0.4, 1.0, 100, 50))
    assert [line.split()[2] for line in lines] == named
    for line, name in zip(lines, named, strict=True):
        low, high = recorded["intervals"][name]
        assert f"{name} alone separates {audit[name]:.1%} [{low:.1%}, {high:.1%}] n=100/50" in line
        assert f"the reward {accuracy:.1%} [40.0%, 100.0%] n=100/50:" in line


@pytest.mark.parametrize(("own", "warns"), [(0.7, True), (0.75, False), (0.8, False)])
def test_shortcut_warnings_name_a_log_prob_that_beats_the_reward(own: float, warns: bool) -> None:
    audit = audit_record(logprob_sum=0.6, logprob_mean=0.75)
    lines = shortcut_warnings(audit, Estimate(own, 0.5, 0.9, 100, 50))
    assert len(lines) == warns
    assert all("the mean log-prob under SFT separates 75.0%" in line for line in lines)


def test_within_prompts_by_hand() -> None:
    prompts = ["a", "a", "b", "b", "b"]
    # Centred: x (-1, 1; -1, 0, 1), y (1, -1; -2, 0, 2). sum xy = -2 + 4, x.x = 4, y.y = 10.
    x, y = [1.0, 3.0, 10.0, 11.0, 12.0], [9.0, 7.0, 0.0, 2.0, 4.0]
    assert within_prompts(prompts, x, y) == pytest.approx(2 / np.sqrt(40))
    # Over all samples they go against each other, since prompt b is longer and scored lower.
    assert np.corrcoef(x, y)[0, 1] < -0.5
    assert within_prompts(["a", "b"], [1.0, 2.0], [3.0, 4.0]) is None
    assert within_prompts(["a", "a"], [1.0, 2.0], [3.0, 3.0]) is None


@pytest.mark.parametrize(
    ("leaning", "text"),
    [
        (0.2, "+0.20: it prefers longer"),
        (-0.31, "-0.31: it prefers shorter"),
        (0.1, ""),
        (None, ""),
    ],
)
def test_shortcut_warnings_name_a_correlation_with_length(leaning: float | None, text: str) -> None:
    audit = {**audit_record(), "length_correlation": leaning}
    lines = shortcut_warnings(audit, Estimate(0.9, None, None, 100, 50))
    assert len(lines) == bool(text) and all(text in line for line in lines)
