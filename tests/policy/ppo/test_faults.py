"""The gap between two log-probs against hand numbers."""

from irl_align.policy.ppo.faults import LogProbGap


def test_beyond_rounding_by_hand() -> None:
    assert LogProbGap(0.9e-3, 0.049).beyond_rounding(bf16=False) is None
    message = LogProbGap(2e-3, 0.1).beyond_rounding(bf16=False)
    assert message == "by 0.002 per token, expected at most 0.001"
    message = LogProbGap(0.9e-3, 0.9).beyond_rounding(bf16=False)
    assert message == "by 0.9 at a token, expected at most 0.05"
    assert LogProbGap(0.049, 0.9).beyond_rounding(bf16=True) is None
    assert LogProbGap(0.049, 1.5).beyond_rounding(bf16=True) is not None
    assert LogProbGap(0.06, 0.9).beyond_rounding(bf16=True) is not None
