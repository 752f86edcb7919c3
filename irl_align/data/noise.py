"""Noisy demonstrations for ablations: some have the completion of another prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from irl_align.data.rows import Completion, Demonstration, completion_text, prompt_key
from irl_align.data.splits import Division, unit_hash
from irl_align.errors import UserError


def with_noise(division: Division, share: float, seed: int) -> tuple[Division, dict[str, int]]:
    """The division with about `share` of each part's rows corrupted, and their number by part.

    A part takes completions only from itself, so no held-out text reaches training.
    """
    if share == 0.0:
        return division, {}
    sft, count = corrupt(division.sft, share, seed)
    counts, reward = {"sft": count, "reward": count}, sft
    if division.reward is not division.sft:
        reward, counts["reward"] = corrupt(division.reward, share, seed)
    held_out, counts["held_out"] = corrupt(division.held_out, share, seed)
    return replace(division, sft=sft, reward=reward, held_out=held_out), counts


def corrupt(
    rows: Sequence[Demonstration], share: float, seed: int
) -> tuple[list[Demonstration], int]:
    """The rows, about `share` of them with a completion of another prompt, and their number.

    The choice depends on the seed and the content of the rows, not on their order. The corrupted
    rows of a smaller share are a subset of those of a larger one. Raises UserError: all rows have
    the same prompt.
    """
    completions: dict[str, list[Completion]] = {}
    for row in rows:
        completions.setdefault(prompt_key(row["prompt"]), []).append(row["completion"])
    keys = sorted(completions)
    if len(keys) < 2:
        raise UserError(
            "data.noise: found one prompt, expected at least two: a noisy demonstration has the "
            "completion of another prompt"
        )
    for texts in completions.values():
        texts.sort(key=completion_text)
    out, changed = [], 0
    for row in rows:
        key = prompt_key(row["prompt"])
        content = f"{key}/{completion_text(row['completion'])}"
        if unit_hash(seed, "noise", content) >= share:
            out.append(row)
            continue
        rng = random.Random(f"{seed}/noise/{content}")
        other = rng.choice(keys)
        while other == key:
            other = rng.choice(keys)
        out.append({**row, "completion": rng.choice(completions[other])})
        changed += 1
    return out, changed
