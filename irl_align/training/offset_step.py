"""The loop's offsets: what pi_k already has of the reward, for every pair, as a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from irl_align.config.schema import Recipe
from irl_align.data.pairs import load_pairs
from irl_align.policy import Offset, Reward
from irl_align.policy.roles import Role
from irl_align.reward.distributed import spread
from irl_align.reward.fit import side_rewards
from irl_align.reward.implicit import reference_logps
from irl_align.reward.offset import OffsetShape, pair_offsets
from irl_align.training.context import RunContext
from irl_align.training.iteration import Iteration
from irl_align.training.store import Stage
from irl_align.utils import distributed


def sampler_offset(recipe: Recipe, iteration: Iteration) -> Offset | None:
    """The offset o_k of pi_k's samples, which accounts for what earlier iterations learned.

    None where it is 0: in iteration 0, or if the recipe asks for none.
    """
    options, initial, policy = recipe.reward, iteration.initial, iteration.policy
    if recipe.offset == "none" or iteration.reward is None:
        return None
    of = iteration.reward
    if recipe.offset == "log_ratio":
        of = Reward("implicit", policy.path, policy.key, references=((1.0, initial.path),))
    shape = OffsetShape(options.offset_coef, options.offset_clip, options.offset_per_token)
    return Offset(of, shape)


def pair_offset_stage(context: RunContext, iteration: Iteration, pairs: Stage) -> Stage | None:
    """Offsets (B,) of the pairs of iteration k, in train.npy and held_out.npy of a stage."""
    offset = iteration.offset
    if offset is None:
        return None

    def build(work: Path) -> dict[str, Any]:
        metrics = {}
        for part in ("train", "held_out"):
            rows = load_pairs(pairs.path / f"{part}.parquet")
            values = _both_sides(context, iteration, offset.of, rows)
            offsets = pair_offsets(rows, values, offset.shape).numpy()
            if distributed.is_main():
                np.save(work / f"{part}.npy", offsets)
            metrics[part] = {"mean": float(offsets.mean()), "std": float(offsets.std())}
        return metrics

    inputs = {"pairs": pairs.key, "of": offset.of.key, "initial": iteration.initial.key}
    settings = {"shape": vars(offset.shape), "beta": offset.of.logit_beta, "kind": offset.of.kind}
    stage = context.stage(Role.offsets(iteration.k), "offsets", settings, inputs, build)
    context.log(Role.offsets(iteration.k), stage.metrics)
    return stage


def _both_sides(context: RunContext, iteration: Iteration, of: Reward, pairs: Dataset) -> Tensor:
    """Log-ratios or logits of both sides of pairs: (2, B), the preferred side first."""
    models = context.models
    if of.kind == "explicit":
        return torch.stack(side_rewards(spread(models.load_reward(of)), pairs)) / of.logit_beta
    policy, initial = iteration.policy, iteration.initial
    own = reference_logps([(1.0, models.load_policy(policy.path))], pairs, policy.identity)
    start = reference_logps([(1.0, models.load_policy(initial.path))], pairs)
    return torch.from_numpy(own - start)
