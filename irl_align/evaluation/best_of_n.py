"""Best-of-n by a reward for n = 1, 2, 4, ..., N, from one set of samples: reward and gold over KL
(Gao et al., arXiv:2210.10760), and whether gold falls while the reward rises.

Legend of shapes: M prompts, N samples per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from irl_align.config.schema import Recipe
from irl_align.data.cards import import_object, load_card
from irl_align.data.columns import column, prompts_by_ids, read_parquet
from irl_align.data.decoding import TokenFormat
from irl_align.data.rows import Prompt, prompt_text
from irl_align.data.splits import choose_prompts
from irl_align.errors import UserError
from irl_align.evaluation.compare.overoptimization import fit_gain
from irl_align.evaluation.inference import first_policy, prompt_format
from irl_align.models.generation.backends import resolve_backend, sampling_of
from irl_align.models.generation.offline import saved_sampler, with_backend
from irl_align.models.generation.samples import Samples, StoredSamples, write_samples
from irl_align.models.loading import load_tokenizer, pick_device
from irl_align.models.logprobs import best_of_n_kl_bound
from irl_align.reward.composed import load_fitted
from irl_align.reward.ranking import rank_samples, sample_rewards
from irl_align.tasks.gold import GoldMetric
from irl_align.training.keys import derive_seed
from irl_align.training.run_folder import Run, RunView
from irl_align.training.store import Store
from irl_align.utils.statistics import clustered_difference, clustered_ratio

SIGNIFICANT = 0.05
LOWER_IS_BETTER = {
    **dict.fromkeys(("slot_errors", "missing", "wrong", "hallucinated"), True),
    "fully_right": False,
}
"""Field of SlotErrorRate's rows -> whether low is good. For another gold metric, this is known of
its headline only."""


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

    scores and every gold: (M, N). Means are over prompts, with t intervals. lower_is_better: name
    of a gold -> whether low is good; a gold that is not in it gets means only.
    """
    count = scores.shape[1]
    ns = [2**i for i in range(count.bit_length()) if 2**i <= count]
    finite = np.where(np.isfinite(scores), scores, np.nan)
    rewards = np.where(np.isnan(finite), np.nanmin(finite), finite)
    report: dict[str, Any] = {
        "n": ns,
        "kl": [best_of_n_kl_bound(n) for n in ns],
        "reward": [_over_prompts(expected_best(scores, rewards, n)) for n in ns],
        "gold": {},
    }
    for name, values in golds.items():
        if not np.ptp(values, axis=1).any():
            continue  # it depends on the prompt only, like the number of slots
        by_n = [expected_best(scores, values, n) for n in ns]
        report["gold"][name] = {
            "lower_is_better": lower_is_better.get(name),
            "estimates": list(map(_over_prompts, by_n)),
            **_overoptimisation(by_n, ns, lower_is_better.get(name)),
        }
    return report


def _overoptimisation(
    by_n: Sequence[np.ndarray], ns: Sequence[int], lower_is_better: bool | None
) -> dict[str, Any]:
    """Where a gold, (M,) for each of ns, is best, whether it falls after that, and its fit; all
    None where it is not known which values are good."""
    if lower_is_better is None:
        return {"peak_n": None, "overoptimised": None, "fit": None}
    sign = -1.0 if lower_is_better else 1.0
    means = [sign * float(values.mean()) for values in by_n]
    peak = int(np.argmax(means))
    fall = clustered_difference(
        (sign * (by_n[-1] - by_n[peak])).tolist(), [str(i) for i in range(len(by_n[0]))]
    )
    falls = fall.p is not None and fall.p < SIGNIFICANT and fall.mean < 0.0
    kls, gains = [best_of_n_kl_bound(n) for n in ns], [mean - means[0] for mean in means]
    fit = fit_gain("best_of_n", kls, gains)
    return {
        "peak_n": ns[peak],
        "overoptimised": peak < len(ns) - 1 and falls,
        "fit": None if fit is None else asdict(fit),
    }


def _over_prompts(values: np.ndarray) -> dict[str, Any]:
    """Mean of one value per prompt (M,), with its interval."""
    return asdict(replace(clustered_ratio(values, np.ones(len(values))), clusters=None))


def best_of_curve(
    source: Path,
    count: int,
    prompts: int | None = None,
    backend: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """The curve of a run's reward on samples of the policy it started from; a stage of its store.

    count: N samples per prompt. prompts: number of evaluation prompts, all by default. backend:
    what samples, the run's backend by default.
    Raises UserError: no finished run with an explicit reward, or a card without a gold metric.
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
    gold: GoldMetric = import_object(gold_path, "gold")
    where = pick_device(device)
    policy, policy_key = first_policy(view)
    options = with_backend(recipe.generation, backend)
    resolved = resolve_backend(options, where)
    seed = derive_seed(recipe.seed, "best-of curve") % 2**63
    sampling = replace(sampling_of(options, resolved, count, 1.0), seed=seed)
    reward_path = source.parent / str(view.summary["reward"])

    def build(work: Path) -> dict[str, Any]:
        asked = _evaluation_prompts(view, prompts)
        ids = [list(prompt) for prompt in asked]
        tokenizer = load_tokenizer(policy)
        with saved_sampler(policy, tokenizer, ids, options, resolved, where) as generator:
            write_samples(work, generator, ids, sampling)
        samples = StoredSamples(work, ids)
        reward = load_fitted(reward_path, where)
        scores = rank_samples(samples, sample_rewards(samples, reward), "reward")
        form = TokenFormat(tokenizer, prompt_format(policy), asked)
        golds = _gold_values(samples, form, gold)
        return curve(scores, golds, {**LOWER_IS_BETTER, gold.headline: gold.lower_is_better})

    settings = {
        "seed": recipe.seed,
        "sampling": vars(sampling),
        "prompts": prompts,
        "lower_is_better": {gold.headline: gold.lower_is_better},
    }
    inputs = {
        "policy": policy_key,
        "data": view.stages["data"]["key"],
        "reward": reward_path.parent.name,
        "gold": gold_path,
    }
    store = Store(source.parent / "store")
    return store.stage("best-of-curve", settings, inputs, build).metrics


def _evaluation_prompts(view: RunView, count: int | None) -> dict[tuple[int, ...], Prompt]:
    """Token ids -> prompt of a run's evaluation prompts, `count` of them chosen by hash."""
    file = view.folder / view.stages["data"]["path"] / "evaluation.parquet"
    rows = read_parquet(file)
    keys = choose_prompts(column(rows, "prompt_key"), count, view.recipe["seed"])
    return prompts_by_ids(rows.filter(lambda key: key in keys, input_columns="prompt_key"))


def _gold_values(samples: Samples, form: TokenFormat, gold: GoldMetric) -> dict[str, np.ndarray]:
    """Field of the gold's rows -> its values (M, N)."""
    prompts, completions = samples.flat()
    answers = form.answers(prompts, [c.token_ids for c in completions])
    texts = [prompt_text(form.prompt(ids)) for ids in prompts]
    rows = gold(texts, [answer.text for answer in answers], []).rows
    shape = (len(samples.prompts), -1)
    return {name: np.array([row[name] for row in rows]).reshape(shape) for name in rows[0]}
