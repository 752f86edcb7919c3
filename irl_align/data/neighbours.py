"""Which prompts are near each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from irl_align.errors import UserError


def nearest_prompts(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """For each of U prompts the numbers of the `count` others nearest by Jaccard overlap of their
    sets of token ids, nearest first; the lower number goes first among equals."""
    if len(prompts) < 2:
        raise UserError("pairs.contrast: found one prompt, a neighbour needs at least two")
    count = min(count, len(prompts) - 1)
    sets = [np.unique(np.asarray(ids, dtype=np.int64)) for ids in prompts]
    sizes = torch.tensor([len(ids) for ids in sets], dtype=torch.float64)
    owner = np.repeat(np.arange(len(sets)), [len(ids) for ids in sets])
    used, token = np.unique(np.concatenate(sets), return_inverse=True)
    has = torch.sparse_coo_tensor(  # (U, tokens in use)
        torch.from_numpy(np.stack([owner, token])),
        torch.ones(len(token), dtype=torch.float64),
        (len(sets), len(used)),
        check_invariants=False,
    ).coalesce()
    nearest: list[list[int]] = []
    for start in range(0, len(sets), 256):
        stop = min(start + 256, len(sets))
        block = torch.zeros(stop - start, len(used), dtype=torch.float64)
        within = (owner >= start) & (owner < stop)
        block[owner[within] - start, token[within]] = 1.0
        common = torch.sparse.mm(has, block.T).T  # (256, U)
        overlap = common / (sizes[start:stop, None] + sizes[None, :] - common)
        overlap[torch.arange(stop - start), torch.arange(start, stop)] = -1.0  # not itself
        nearest += _largest(overlap.numpy(), count)
    return nearest


def _largest(values: np.ndarray, count: int) -> list[list[int]]:
    """Columns of each row's `count` largest values, in descending order, then by column."""
    least = np.partition(values, -count, axis=1)[:, -count]
    chosen = []
    for row, bound in zip(values, least, strict=True):
        candidates = np.flatnonzero(row >= bound)
        order = np.lexsort((candidates, -row[candidates]))
        chosen.append([int(column) for column in candidates[order[:count]]])
    return chosen
