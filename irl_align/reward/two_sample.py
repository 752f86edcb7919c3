"""Can held-out demonstrations be distinguished from a policy's samples?

A classifier two-sample test (arXiv:1610.06545) by a discriminator that is fitted for this question:
the reward that the policy was just optimised on is the worst judge of it.

The discriminator is a ridge regression on frozen features of pi_0: mean and last hidden state of
the completion, its summed and mean log-prob, and its length. It costs two forward passes and a
fraction of a second, and has no learning rate or number of steps that could hide a difference. A
pair (demonstration, sample) of one prompt is the difference of their features, so what depends on
the prompt only cancels. Differences that neither these features nor a linear function of them show
remain unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from irl_align.data.columns import column
from irl_align.data.pairs import Sample, by_prompt
from irl_align.models.packing import PackedRows, hidden_states, over_packed
from irl_align.reward.fit import SIDES
from irl_align.utils.statistics import Estimate, clustered_share

BLOCKS = 10
COMPONENTS = 256  # of the features; a block's eigenvectors take 20 ms
RIDGES = np.array([1e-3, 1e-2, 1e-1, 1.0, 10.0])  # in units of the mean eigenvalue
FIRST_RIDGE = 3  # of RIDGES, before any was tested


def fresh_pairs(
    demonstrations: Dataset, samples: Mapping[str, Sequence[Sample]], max_tokens: int
) -> Dataset:
    """Each prompt's D demonstrations against its N samples, as max(D, N) pairs.

    Nothing is left out, or a perfect policy would not be at 50%: equal texts are pairs, and a
    demonstration longer than max_tokens is cut there, as a sample would be.
    """
    names = ("prompt_key", *(name for side in SIDES for name in side), "rejected_truncated")
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for key, group in by_prompt(demonstrations).items():
        own = samples[key]
        for j in range(max(len(group), len(own))):
            row, sample = group[j % len(group)], own[j % len(own)]
            prompt = list(row["prompt_ids"])
            texts = (list(row["completion_ids"])[:max_tokens], list(sample.token_ids))
            cells = (key, prompt, texts[0], prompt, texts[1], bool(sample.truncated))
            for name, cell in zip(names, cells, strict=True):
                rows[name].append(cell)
    return Dataset.from_dict(rows)


def identical(pairs: Dataset) -> np.ndarray:
    """(B,) whether both sides of a pair are the same text, which makes it a tie."""
    sides = zip(column(pairs, "chosen_ids"), column(pairs, "rejected_ids"), strict=True)
    return np.array([list(one) == list(two) for one, two in sides])


def pooled_states(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Mean and last of a completion's last hidden states: (2H,) for each row."""
    pooled: list[np.ndarray] = [np.zeros(0)] * len(prompts)

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        hidden, places = hidden_states(model, packed), packed.places()[:, 1:]
        real = torch.arange(places.shape[1], device=places.device) < packed.length[:, None]
        states = hidden[packed.row[:, None], places].float() * real[:, :, None]
        mean = states.sum(1) / packed.length.clamp(min=1)[:, None]
        last = hidden[packed.row, packed.ends()].float()
        both = torch.cat([mean, last], 1).double().cpu().numpy()
        for number, own in zip(batch, both, strict=True):
            pooled[number] = own

    over_packed(one_batch, model, prompts, completions)
    return pooled


def text_features(states: Sequence[np.ndarray], logps: Sequence[np.ndarray]) -> np.ndarray:
    """Features of each text: (B, 2H + 3). states: of `pooled_states`; logps: (T,) of each text."""
    numbers = [[logp.sum(), logp.mean(), len(logp)] for logp in logps]
    return np.concatenate([np.stack(states), np.array(numbers, np.float64)], axis=1)


def two_sample_accuracy(differences: np.ndarray, prompts: Sequence[str]) -> Estimate | None:
    """How often a discriminator prefers the demonstration in pairs of prompts it has not seen.

    differences: (B, F) features of the demonstration minus those of the sample; prompts: (B,) keys.
    A tie counts one half. The prompts are divided into blocks at random. Each block but the first
    is judged by w = (X'X / n + ridge I)^-1 X'1 / n (Fisher's discriminant) of the blocks before it,
    with the ridge that had the lowest squared error on those (Dawid 1984, prequential). None with
    fewer than three prompts: no interval.

    Why not K folds in which every pair is judged once: the sign of w fitted without fold k and the
    outcomes in fold k share their noise. The statistic is sum_{k != l} S_k'S_l over the folds'
    sums S, each product counted twice, so its variance is twice that of independent outcomes: for a
    perfect policy 17% of the 95% intervals miss 50%. Here each block's outcomes have mean 1/2
    whatever came before (a martingale), so the interval has its nominal rate at 50%.
    """
    groups, number = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    if len(groups) < 3:
        return None
    x = _components(differences)
    order = np.random.default_rng(0).permutation(len(groups))
    blocks = [np.isin(number, part) for part in np.array_split(order, min(BLOCKS, len(groups)))]
    outcomes, errors = np.full(len(x), np.nan), np.zeros(len(RIDGES))
    past = blocks[0]
    for block in blocks[1:]:
        margin = x[block] @ _discriminants(x[past])  # (block's pairs, ridges)
        best = int(errors.argmin()) if errors.any() else FIRST_RIDGE
        outcomes[block] = 0.5 * (1.0 + np.sign(margin[:, best]))
        errors += ((1.0 - margin) ** 2).sum(0)
        past = past | block
    judged = ~np.isnan(outcomes)
    return clustered_share(outcomes[judged].tolist(), groups[number[judged]].tolist())


def _components(differences: np.ndarray) -> np.ndarray:
    """Principal components of features of equal scale. Neither depends on which side of a pair is
    the demonstration, so all pairs may be used."""
    scale = np.sqrt((differences**2).mean(0))
    scaled: np.ndarray = differences / np.where(scale > 0.0, scale, 1.0)
    if scaled.shape[1] <= COMPONENTS:
        return scaled
    _, _, axes = np.linalg.svd(scaled, full_matrices=False)
    components: np.ndarray = scaled @ axes[:COMPONENTS].T
    return components


def _discriminants(x: np.ndarray) -> np.ndarray:
    """Weights (F, R) of the ridge regression of 1 on x (B, F), for each of the R ridges."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    ridges = RIDGES * max(float(values.mean()), 1e-12)
    projected = vectors.T @ x.mean(0)
    weights: np.ndarray = vectors @ (projected[:, None] / (values.clip(0.0)[:, None] + ridges))
    return weights
