"""Noisy demonstrations: how many, which, and by what."""

from pathlib import Path

import pytest
from support.tiny_runs import tiny_recipe

from irl_align.config.data import DataOptions
from irl_align.data.noise import corrupt, with_noise
from irl_align.data.rows import Demonstration
from irl_align.data.splits import divide
from irl_align.errors import UserError
from irl_align.training.train import train

ROWS: list[Demonstration] = [
    {"prompt": f"prompt {i // 2}", "completion": f"answer {i // 2}.{i % 2}"} for i in range(2000)
]


def changed(share: float, rows: list[Demonstration] = ROWS, seed: int = 3) -> dict[str, str]:
    """Own completion -> the one in its place."""
    out, count = corrupt(rows, share, seed)
    assert [row["prompt"] for row in out] == [row["prompt"] for row in rows]
    pairs = zip(rows, out, strict=True)
    actual = {a["completion"]: b["completion"] for a, b in pairs if a != b}
    assert len(actual) == count
    return actual


def test_corrupt_changes_a_share_of_completions() -> None:
    actual = changed(0.3)
    assert 0.27 * len(ROWS) < len(actual) < 0.33 * len(ROWS)
    texts = {row["completion"] for row in ROWS}
    for own, other in actual.items():
        assert other in texts and other.split(".")[0] != own.split(".")[0]
    assert len(set(actual.values())) > 0.8 * len(actual)  # not always the same one


def test_corrupt_nests_smaller_shares_in_any_order() -> None:
    more, less = changed(0.3), changed(0.1)
    assert 0.08 * len(ROWS) < len(less) and less.items() <= more.items()
    assert changed(0.3, ROWS[::-1]) == more
    assert changed(0.3, seed=4) != more


def test_with_noise_mixes_no_parts() -> None:
    options = DataOptions(card="c", held_out=0.3, reward_data="disjoint")
    division = divide(ROWS, options, 0)
    noisy, counts = with_noise(division, 0.5, 0)
    for part in ("sft", "reward", "held_out"):
        own = {row["completion"] for row in getattr(division, part)}
        assert {row["completion"] for row in getattr(noisy, part)} <= own
        assert 0.4 < counts[part] / len(own) < 0.6
    same = divide(ROWS, DataOptions(card="c"), 0)
    noisy, counts = with_noise(same, 0.5, 0)
    assert noisy.reward is noisy.sft and counts["reward"] == counts["sft"]
    assert with_noise(same, 0.0, 0) == (same, {})


def test_corrupt_refuses_a_single_prompt() -> None:
    with pytest.raises(UserError, match=r"^data\.noise: found one prompt, expected at least two"):
        corrupt(ROWS[:2], 0.5, 0)


def test_train_records_the_noise(tiny_folder: Path) -> None:
    overrides = ("loop.iterations=0", "sft.args.num_train_epochs=1", "evaluation.prompts=2")
    records = [
        next(r for r in train(tiny_recipe(tiny_folder, *overrides, *more)).view().metrics
             if r["key"] == "data")
        for more in ((), ("data.noise=0.3", "name=noisy"))
    ]  # fmt: skip
    assert records[0]["noisy"] == {}
    assert 30 < records[1]["noisy"]["sft"] < 65 and records[1]["noisy"]["held_out"] > 0
    sums = [record["checksums"] for record in records]
    assert sums[0]["sft"] != sums[1]["sft"] and sums[0]["evaluation"] == sums[1]["evaluation"]
