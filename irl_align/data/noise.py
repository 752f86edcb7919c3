"""Noisy demonstrations, for ablations: some are answered with another prompt's completion."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from irl_align.data.loading import Demonstration, Division, prompt_key, unit_hash
from irl_align.errors import UserError


def with_noise(division: Division, share: float, seed: int) -> tuple[Division, dict[str, int]]:
    """The division with about `share` of each part's rows corrupted, and how many by part.

    Parts keep to themselves, so that no held-out text reaches training. See :func:`corrupt`.
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
    """Rows of which about `share` have a completion of another prompt, and how many they are.

    Which ones, and by what, depends on the seed and the rows' content, not on their order; those of
    a smaller share are among those of a larger one. Raises UserError where all prompts are one.
    """
    completions: dict[str, list[str]] = {}
    for row in rows:
        completions.setdefault(prompt_key(row["prompt"]), []).append(row["completion"])
    keys = sorted(completions)
    if len(keys) < 2:
        raise UserError(
            "data.noise: found one prompt, expected at least two: a noisy demonstration is another "
            "prompt's"
        )
    for texts in completions.values():
        texts.sort()
    out, changed = [], 0
    for row in rows:
        key = prompt_key(row["prompt"])
        content = f"{key}/{row['completion']}"
        if unit_hash(seed, "noise", content) >= share:
            out.append(row)
            continue
        rng = random.Random(f"{seed}/noise/{content}")
        other = rng.choice(keys)
        while other == key:
            other = rng.choice(keys)
        out.append({"prompt": row["prompt"], "completion": rng.choice(completions[other])})
        changed += 1
    return out, changed
