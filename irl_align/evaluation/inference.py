"""Use the models of a finished run: score texts with its reward, sample its policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import DPOConfig

from irl_align.config.generation import GenerationOptions
from irl_align.data.encoding import encode_prompts
from irl_align.data.sources import file_rows
from irl_align.data.tokenizer import decode_batch
from irl_align.errors import UserError
from irl_align.models.generation.backends import resolve_backend
from irl_align.models.generation.offline import saved_sampler
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.samples import SampleSet
from irl_align.models.loading import load_config, load_model, load_tokenizer, pick_device
from irl_align.policy.roles import SFT, START
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.model import RewardModel
from irl_align.reward.ranking import rank_samples, sample_rewards
from irl_align.training.reward_step import scheduled
from irl_align.training.run_folder import Run, RunView, artefact_folder, is_run

Row = dict[str, Any]
"""A row of a file that a user gives or gets: field -> value."""


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


def prompt_format(policy: Path) -> PromptFormat:
    """The prompt format of a saved policy."""
    return PromptFormat(**(getattr(load_config(policy), "irl_prompt", None) or {}))


def first_policy(view: RunView) -> tuple[Path, str]:
    """Folder and stage key of the model that a run's loop began with: SFT's, or the start model."""
    stage = view.stages[str(SFT if str(SFT) in view.stages else START)]
    return view.folder / stage["path"] / "model", stage["key"]


def read_rows(path: Path, shapes: Sequence[tuple[str, ...]]) -> list[Row]:
    """Rows of a JSON, CSV or parquet file that all have the fields of one of `shapes`.

    Raises UserError that names the file and row.
    """
    expected = ", or ".join(" and ".join(shape) for shape in shapes)
    rows = []
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
    """The final policy of a run, with its ranking if it selects; or the model in a folder."""
    model = artefact_folder(path, "policy")
    ranking = (Run.load(path).summary or {}).get("ranking") if is_run(path) else None
    if ranking is None:
        return SavedPolicy(model)
    reward = artefact_folder(path, "reward")
    return SavedPolicy(
        model, reward, int(ranking["n"]), str(ranking["score"]), float(ranking["temperature"])
    )


def saved_reward(path: Path, device: str) -> RewardModel | ImplicitReward:
    """The last reward of a run, or the reward model in a folder.

    For a run with an implicit reward (SPIN, DPO) it is beta log(pi/pi_0): pi is the run's final
    policy, pi_0 the policy that its loop began with, and beta that of the last iteration.
    """
    where = pick_device(device)
    view = Run.load(path) if is_run(path) else None
    options = view.recipe["reward"] if view is not None else {}
    iterations = view.recipe["loop"]["iterations"] if view is not None else 0
    if not view or options["kind"] != "implicit" or not iterations:
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


def score_rows(path: Path, rows: Sequence[Row], device: str) -> tuple[list[Row], float | None]:
    """Rows with their scores by the reward of a run or folder, and the accuracy on pairs.

    A row with a completion gets `score`; a pair gets `chosen_score` and `rejected_score`. The
    accuracy counts equal scores as half; it is None for completions.
    """
    reward = saved_reward(path, device)
    prompts = [row["prompt"] for row in rows]
    if not all("chosen" in row and "rejected" in row for row in rows):
        scores = reward.score(prompts, [row["completion"] for row in rows]).tolist()
        return [{**row, "score": s} for row, s in zip(rows, scores, strict=True)], None
    chosen = reward.score(prompts, [row["chosen"] for row in rows])
    rejected = reward.score(prompts, [row["rejected"] for row in rows])
    wins = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    scored = [
        {**row, "chosen_score": c, "rejected_score": r}
        for row, c, r in zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
    ]
    return scored, float(wins.mean())


def sampling_backend(backend: str, servers: Sequence[str]) -> GenerationOptions:
    """Generation options of the command generate.

    Raises UserError: servers are given for a backend that has none.
    """
    if servers and backend != "vllm-server":
        raise UserError(f"--server: an option of --backend vllm-server, not of {backend}")
    return GenerationOptions.model_validate({"backend": backend, "server": {"urls": list(servers)}})


def generate_rows(
    policy: SavedPolicy,
    rows: Sequence[Row],
    sampling: Sampling,
    device: str,
    options: GenerationOptions | None = None,
) -> list[Row]:
    """One row per sample: the prompt's row, with completion, sample and truncated added.

    options: the backend and its settings, transformers by default; `sampling` overrides the
    settings that it has too.
    """
    where = pick_device(device)
    options = options or GenerationOptions()
    backend = resolve_backend(options, where)
    tokenizer = load_tokenizer(policy.model)
    prompts = encode_prompts(
        [row["prompt"] for row in rows], tokenizer, prompt_format(policy.model)
    )
    options = options.model_copy(update={"max_new_tokens": sampling.max_new_tokens})
    candidates = replace(sampling, n=sampling.n * policy.best_of)
    with saved_sampler(policy.model, tokenizer, prompts, options, backend, where) as generator:
        groups = generate(generator, prompts, candidates, progress=True)
    if policy.reward is not None:
        reward = RewardModel.from_pretrained(policy.reward, where)
        samples = SampleSet(prompts, groups)
        scores = rank_samples(samples, sample_rewards(samples, reward), policy.score)
        # The best of each of a prompt's n groups of best_of samples.
        best = scores.reshape(-1, sampling.n, policy.best_of).argmax(2)
        groups = [
            [group[number * policy.best_of + int(at)] for number, at in enumerate(row)]
            for group, row in zip(groups, best, strict=True)
        ]
    return [
        {**row, "completion": text, "sample": number, "truncated": completion.truncated}
        for row, group in zip(rows, groups, strict=True)
        for number, (completion, text) in enumerate(
            zip(group, decode_batch(tokenizer, [c.token_ids for c in group]), strict=True)
        )
    ]
