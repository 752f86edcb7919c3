"""Micro-batches hold every row once, with little padding."""

import torch

from irl_align.policy.ppo.micro_batches import padded_batches


def test_padded_batches_hold_every_row_once_and_little_padding() -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = 35 + 10 * torch.randn(512, generator=draw)
    completions = 28 + 9 * torch.randn(512, generator=draw)
    lengths = (prompts + completions).clamp(min=10).long().tolist()
    batches = list(padded_batches(lengths, 4096))
    assert sorted(row for batch in batches for row in batch) == list(range(512))
    slots = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert max(slots) <= 4096
    assert 1 - sum(lengths) / sum(slots) < 0.05
    assert len(batches) < 25
    assert list(padded_batches([9, 5000, 8], 4096)) == [[1], [0, 2]]
