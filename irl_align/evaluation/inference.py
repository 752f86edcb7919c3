"""Use what a run left behind: score texts with its reward, sample its policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import DPOConfig

from irl_align.config.generation import GenerationOptions
from irl_align.data.encoding import decode_batch, encode_prompts
from irl_align.data.sources import file_rows
from irl_align.errors import UserError
from irl_align.evaluation.preference_baseline import first_policy
from irl_align.models.generation.backends import resolve_backend
from irl_align.models.generation.offline import saved_sampler
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.generation.protocol import generate as sample
from irl_align.models.generation.samples import SampleSet
from irl_align.models.loading import load_config, load_model, load_tokenizer, pick_device
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.model import RewardModel
from irl_align.reward.ranking import rank_samples, sample_rewards
from irl_align.training.reward_step import scheduled
from irl_align.training.run_folder import Run, artefact_folder, is_run

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class SavedPolicy:
    """A policy folder, and for Best-of-N selection its reward folder, N, score and temperature."""

    model: Path
    reward: Path | None = None
    best_of: int = 1
    score: str = "reward"
    temperature: float = 1.0


@dataclass(frozen=True)
class PromptFormat:
    """How a policy's prompts are written; saved in its config.json under `irl_prompt`."""

    name: str = "none"
    template: str = "{prompt}"
    lowercase: bool = False


def read_rows(path: Path, shapes: Sequence[tuple[str, ...]]) -> Rows:
    """Rows of a JSON, CSV or parquet file that all have the fields of one of `shapes`.

    Raises UserError that names the file and row.
    """
    expected = ", or ".join(" and ".join(shape) for shape in shapes)
    rows: Rows = []
    fitting = list(shapes)
    for raw in file_rows(path):
        fitting = [shape for shape in fitting if set(shape) <= set(raw.values)]
        if not fitting:
            fields = ", ".join(map(str, raw.values)) or "none"
            raise UserError(
                f"{raw.place}: found the fields {fields}; expected {expected}, the same in all rows"
            )
        for field in fitting[0]:
            if not isinstance(raw.values[field], str if field != "prompt" else str | list):
                kind = type(raw.values[field]).__name__
                raise UserError(f"{raw.place}: {field}: found {kind}, expected text")
        rows.append(dict(raw.values))
    return rows


def resolve_policy(path: Path) -> SavedPolicy:
    """A run's final policy, with its ranking if it selects; or a model's folder."""
    model = artefact_folder(path, "policy")
    if model == path:
        return SavedPolicy(path)
    ranking = (Run.load(path).summary or {}).get("ranking")
    if ranking is None:
        return SavedPolicy(model)
    return SavedPolicy(
        model,
        artefact_folder(path, "reward"),
        int(ranking["n"]),
        str(ranking["score"]),
        float(ranking["temperature"]),
    )


def saved_reward(path: Path, device: str) -> RewardModel | ImplicitReward:
    """A run's last reward, or the reward model in a folder.

    Of a run whose reward is implicit (SPIN, DPO): beta log(pi/pi_0), its final policy against the
    one that its loop began with, beta being the last iteration's.
    """
    where = pick_device(device)
    view = Run.load(path) if is_run(path) else None
    options = view.recipe["reward"] if view is not None else {}
    iterations = view.recipe["loop"]["iterations"] if view is not None else 0
    if view is None or options["kind"] != "implicit" or not iterations:
        return RewardModel.from_pretrained(artefact_folder(path, "reward"), where)
    policy, (first, _) = artefact_folder(path, "policy"), first_policy(view)
    args = scheduled(options["args"], options["schedule"], iterations - 1)
    return ImplicitReward(
        load_model(policy, where),
        [(1.0, load_model(first, where))],
        float(args.get("beta", DPOConfig.beta)),
        load_tokenizer(policy),
        prompt_format(policy),
    )


def prompt_format(policy: Path) -> PromptFormat:
    """How the prompts of a saved policy are written."""
    return PromptFormat(**(getattr(load_config(policy), "irl_prompt", None) or {}))


def score_rows(path: Path, rows: Rows, device: str) -> tuple[Rows, float | None]:
    """Rows with their scores by the reward of a run or folder (see :func:`saved_reward`): `score`,
    or `chosen_score` and `rejected_score` and accuracy."""
    reward = saved_reward(path, device)
    prompts = [row["prompt"] for row in rows]
    if not all("chosen" in row and "rejected" in row for row in rows):
        scores = reward.score(prompts, [row["completion"] for row in rows]).tolist()
        return [{**row, "score": s} for row, s in zip(rows, scores, strict=True)], None
    both = [reward.score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")]
    wins = (both[0] > both[1]).double() + 0.5 * (both[0] == both[1]).double()
    scored = [
        {**row, "chosen_score": chosen, "rejected_score": rejected}
        for row, chosen, rejected in zip(rows, both[0].tolist(), both[1].tolist(), strict=True)
    ]
    return scored, float(wins.mean())


def sampling_backend(backend: str, servers: Sequence[str]) -> GenerationOptions:
    """Options of the command generate; UserError for servers of another backend."""
    if servers and backend != "vllm-server":
        raise UserError(f"--server: an option of --backend vllm-server, not of {backend}")
    return GenerationOptions.model_validate({"backend": backend, "server": {"urls": list(servers)}})


def generate_rows(
    policy: SavedPolicy,
    rows: Rows,
    sampling: Sampling,
    device: str,
    options: GenerationOptions | None = None,
) -> Rows:
    """One row per sample: the prompt's row, with completion, sample and truncated added.

    options: the backend and its own; transformers when None. What is sampled, `sampling` says.
    """
    where = pick_device(device)
    options = GenerationOptions() if options is None else options
    backend = resolve_backend(options, where)
    tokenizer = load_tokenizer(policy.model)
    prompts = encode_prompts(
        [row["prompt"] for row in rows], tokenizer, prompt_format(policy.model)
    )
    many = Sampling(**{**vars(sampling), "n": sampling.n * policy.best_of})
    options = options.model_copy(update={"max_new_tokens": sampling.max_new_tokens})
    with saved_sampler(policy.model, tokenizer, prompts, options, backend, where) as generator:
        groups = sample(generator, prompts, many, progress=True)
    if policy.reward is not None:
        groups = _best(SampleSet(prompts, groups), policy, sampling.n, where)
    out = []
    for row, group in zip(rows, groups, strict=True):
        texts = decode_batch(tokenizer, [c.token_ids for c in group])
        for number, (completion, text) in enumerate(zip(group, texts, strict=True)):
            out.append(
                {
                    **row,
                    "completion": text,
                    "sample": number,
                    "truncated": completion.truncated,
                }
            )
    return out


def _best(samples: SampleSet, policy: SavedPolicy, n: int, device: Any) -> list[list[Completion]]:
    """The best of each of n groups of best_of samples."""
    assert policy.reward is not None
    reward = RewardModel.from_pretrained(policy.reward, device)
    scores = rank_samples(samples, sample_rewards(samples, reward), policy.score)
    scores = scores.reshape(-1, n, policy.best_of)
    return [
        [group[g * policy.best_of + int(j)] for g, j in enumerate(row)]
        for group, row in zip(samples.completions, scores.argmax(2), strict=True)
    ]
