"""Offsets of a cumulative reward against hand-computed numbers."""

import pytest
import torch
from datasets import Dataset

from irl_align.reward.offset import OffsetShape, pair_offsets

PAIRS = Dataset.from_dict(
    {
        "chosen_ids": [[5, 6, 7, 2], [5, 2], [5, 2]],
        "rejected_ids": [[5, 2], [8, 2], [8, 2]],
        "source": ["demonstration/policy", "demonstration/policy", "demonstration/contrast"],
    }
)
VALUES = torch.tensor([[2.0, 1.0, 9.0], [1.0, -3.0, 4.0]])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (OffsetShape(), [1.0, 4.0]),
        (OffsetShape(coef=0.5), [0.5, 2.0]),
        (OffsetShape(clip=1.5), [0.5, 2.5]),
        (OffsetShape(coef=0.5, clip=1.0), [0.5, 1.5]),
        (OffsetShape(per_token=True), [0.5 - 0.5, 0.5 + 1.5]),
        (OffsetShape(coef=0.0), [0.0, 0.0]),
    ],
    ids=str,
)
def test_pair_offsets_are_differences_of_shaped_values(
    shape: OffsetShape, expected: list[float]
) -> None:
    """The contrast pair has no sampler and no offset."""
    assert pair_offsets(PAIRS, VALUES, shape).tolist() == [*expected, 0.0]
