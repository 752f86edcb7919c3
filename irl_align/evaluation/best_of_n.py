"""What best-of-n selection by a reward gains in gold, for n = 1, 2, 4, ..., N, from one set of
samples: reward against gold over KL (Gao et al., arXiv:2210.10760), and where it overoptimises.

Legend of shapes: M prompts, N samples per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from irl_align.config.generation import GenerationOptions
from irl_align.config.schema import Recipe
from irl_align.data.cards import import_object, load_card
from irl_align.data.columns import column
from irl_align.data.encoding import decode_batch
from irl_align.data.loading import choose_prompts
from irl_align.errors import UserError
from irl_align.models.generation.backends import resolve_backend, sampling_of
from irl_align.models.generation.offline import saved_sampler, with_backend
from irl_align.models.generation.protocol import Sampling
from irl_align.models.generation.samples import SampleSet, read_samples, write_samples
from irl_align.models.loading import load_tokenizer, pick_device
from irl_align.models.logprobs import best_of_n_kl_bound
from irl_align.reward.model import RewardModel
from irl_align.reward.ranking import rank_samples, sample_rewards
from irl_align.tasks.gold import GoldMetric, SlotErrorRate
from irl_align.training.context import derive_seed
from irl_align.training.run_folder import Run, RunView
from irl_align.training.store import Store
from irl_align.utils.statistics import clustered_difference, estimate

SIGNIFICANT = 0.05
LOWER_IS_BETTER = {
    **dict.fromkeys(("slot_errors", "missing", "wrong", "hallucinated"), True),
    "fully_right": False,
}
"""Fields of SlotErrorRate's rows. Of another gold only its headline says which is better."""


def expected_best(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected value of the best of n by score, for each prompt: (M,).

    scores, values: (M, N). Unbiased, over all subsets of n of the N samples: with samples in the
    order of their scores, sum_i C(i-1, n-1) / C(N, n) value_(i). Equal scores share their weight.
    """
    count = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    out = np.empty(len(scores))
    for row, (score, value) in enumerate(zip(scores, values, strict=True)):
        _, group, size = np.unique(score, return_inverse=True, return_counts=True)
        shared = np.bincount(group, weights=weights[np.argsort(np.argsort(score))]) / size
        out[row] = float((shared[group] * value).sum())
    return out


def curve(
    scores: np.ndarray, golds: Mapping[str, np.ndarray], lower_is_better: Mapping[str, bool]
) -> dict[str, Any]:
    """Reward and gold of best-of-n over n, with Gao et al.'s fit and the n where gold peaks.

    scores and every gold: (M, N). Means are over prompts, with t intervals. lower_is_better: by
    name of a gold; of one that it lacks there are means alone.
    """
    count = scores.shape[1]
    ns = [2**i for i in range(count.bit_length()) if 2**i <= count]
    finite = np.where(np.isfinite(scores), scores, np.nan)
    rewards = np.where(np.isnan(finite), np.nanmin(finite, axis=None), finite)
    report: dict[str, Any] = {
        "n": ns,
        "kl": [best_of_n_kl_bound(n) for n in ns],
        "reward": _over_prompts([expected_best(scores, rewards, n) for n in ns]),
        "gold": {},
    }
    for name, values in golds.items():
        if not np.ptp(values, axis=1).any():
            continue  # of the prompt alone, as its number of slots
        by_n = [expected_best(scores, values, n) for n in ns]
        report["gold"][name] = {
            "lower_is_better": lower_is_better.get(name),
            "estimates": _over_prompts(by_n),
            **_judged(by_n, ns, lower_is_better.get(name)),
        }
    return report


def _judged(
    by_n: Sequence[np.ndarray], ns: Sequence[int], lower_is_better: bool | None
) -> dict[str, Any]:
    """Where a gold, (M,) for each of ns, is best, whether it falls after that, and its fit; None
    for all where it is not known which values are good."""
    if lower_is_better is None:
        return {"peak_n": None, "overoptimised": None, "fit": None}
    sign = -1.0 if lower_is_better else 1.0
    means = [sign * float(values.mean()) for values in by_n]
    peak = int(np.argmax(means))
    fall = clustered_difference(
        (sign * (by_n[-1] - by_n[peak])).tolist(), [str(i) for i in range(len(by_n[0]))]
    )
    over = peak < len(ns) - 1 and fall.p_t is not None and fall.p_t < SIGNIFICANT
    return {
        "peak_n": ns[peak],
        "overoptimised": bool(over and fall.mean < 0.0),
        "fit": gao_fit([best_of_n_kl_bound(n) for n in ns], means),
    }


def gao_fit(kls: Sequence[float], values: Sequence[float]) -> dict[str, float] | None:
    """alpha and beta of value(d) - value(0) = d (alpha - beta d), d = sqrt(KL), by least squares.

    The form of best-of-n in arXiv:2210.10760, section 1. values: higher is better. None for fewer
    than three points.
    """
    if len(kls) < 3:
        return None
    d = np.sqrt(np.asarray(kls, dtype=np.float64))
    gain = np.asarray(values, dtype=np.float64) - values[0]
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * d], 1), gain, rcond=None)
    return {"alpha": float(alpha), "beta": float(beta)}


def _over_prompts(by_n: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    return [asdict(estimate(values.tolist())) for values in by_n]


def best_of_curve(
    source: Path,
    count: int,
    prompts: int | None = None,
    device: str = "auto",
    backend: str | None = None,
) -> dict[str, Any]:
    """The curve of a run's reward on samples of the policy it started from; a stage of its store.

    count: N samples for each of `prompts` evaluation prompts (None is all); backend: what samples,
    by default the run's. Raises UserError: no finished run with an explicit reward, or a card
    without gold.
    """
    view = Run.load(source)
    if view.summary is None or view.summary["reward"] is None:
        raise UserError(
            f"{source}: --best-of: found no finished run with an explicit reward, expected one"
        )
    recipe = Recipe.model_validate(view.recipe)
    gold_path = load_card(recipe.data.card).gold
    if gold_path is None:
        raise UserError(f"{source}: --best-of: card {recipe.data.card} names no gold metric")
    role = "sft" if "sft" in view.stages else "start"
    options = with_backend(recipe.generation, backend)
    resolved = resolve_backend(options, pick_device(device))
    seed = derive_seed(recipe.seed, "best-of curve") % 2**63
    sampling = replace(sampling_of(options, resolved, count, 1.0), seed=seed)

    def build(work: Path) -> dict[str, Any]:
        return _build(work, view, role, sampling, options, resolved, prompts, gold_path, device)

    reward = Path(str(view.summary["reward"])).parent.name
    return (
        Store(source.parent / "store")
        .stage(
            "best-of-curve",
            {
                "seed": recipe.seed,
                "sampling": vars(sampling),
                "prompts": prompts,
                **_own_headline(gold_path),
            },
            {
                "policy": view.stages[role]["key"],
                "data": view.stages["data"]["key"],
                "reward": reward,
                "gold": gold_path,
            },
            build,
        )
        .metrics
    )


def _build(
    work: Path,
    view: RunView,
    role: str,
    sampling: Sampling,
    options: GenerationOptions,
    backend: str,
    prompts: int | None,
    gold_path: str,
    device: str,
) -> dict[str, Any]:
    """Sample, score and judge in a stage's folder; the curve."""
    where = pick_device(device)
    rows = Dataset.from_parquet(
        str(view.folder / view.stages["data"]["path"] / "evaluation.parquet"), keep_in_memory=True
    )
    keys = choose_prompts(column(rows, "prompt_key"), prompts, view.recipe["seed"])
    by_key = {
        key: (list(ids), text)
        for key, ids, text in zip(
            *(column(rows, name) for name in ("prompt_key", "prompt_ids", "prompt")), strict=True
        )
        if key in keys
    }
    ids, texts = [pair[0] for pair in by_key.values()], [pair[1] for pair in by_key.values()]
    path = view.folder / view.stages[role]["path"] / "model"
    tokenizer = load_tokenizer(path)
    with saved_sampler(path, tokenizer, ids, options, backend, where) as generator:
        write_samples(work, generator, ids, sampling)
    samples = read_samples(work, ids)
    assert view.summary is not None
    reward = RewardModel.from_pretrained(view.folder.parent / str(view.summary["reward"]), where)
    scores = rank_samples(samples, sample_rewards(samples, reward), "reward")
    golds = judge(samples, texts, tokenizer, gold_path)
    return curve(scores, golds, {**LOWER_IS_BETTER, **_headline(gold_path)})


def judge(
    samples: SampleSet, texts: Sequence[str], tokenizer: Any, gold_path: str
) -> dict[str, np.ndarray]:
    """Every field of the gold's rows as (M, N)."""
    metric: GoldMetric = import_object(gold_path, "gold")
    _, completions = samples.flat()
    count = len(completions) // len(texts)
    prompts = [text for text in texts for _ in range(count)]
    found = metric(prompts, decode_batch(tokenizer, [c.token_ids for c in completions]), [])
    return {
        name: np.array([row[name] for row in found.rows]).reshape(len(texts), count)
        for name in found.rows[0]
    }


def _headline(gold_path: str) -> dict[str, bool]:
    """A gold's headline, and whether it is better when low."""
    metric: GoldMetric = import_object(gold_path, "gold")
    return {metric.headline: metric.lower_is_better}


def _own_headline(gold_path: str) -> dict[str, Any]:
    """For a stage's settings: what of a gold is judged, where that is not SlotErrorRate's."""
    headline = _headline(gold_path)
    usual = {SlotErrorRate.headline: SlotErrorRate.lower_is_better}
    return {} if headline == usual else {"lower_is_better": headline}
