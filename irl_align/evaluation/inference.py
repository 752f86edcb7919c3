"""Use the models of a finished run: score texts with its reward, sample its policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from irl_align.config.generation import GenerationOptions
from irl_align.data.cards import GIVEN
from irl_align.data.decoding import TokenFormat, decode_answers
from irl_align.data.encoding import encode_prompts
from irl_align.data.loading import before_answer
from irl_align.data.messages import read_messages, read_tools, with_tools
from irl_align.data.rows import Completion, Prompt, exchange, prompt_key
from irl_align.data.sources import file_rows
from irl_align.data.tokenizer import set_text_end
from irl_align.errors import UserError
from irl_align.models.generation.backends import resolve_backend
from irl_align.models.generation.offline import saved_sampler
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.samples import SampleSet
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import load_config, load_model, load_tokenizer, pick_device
from irl_align.policy import Reward
from irl_align.policy.roles import SFT, START
from irl_align.reward.composed import (
    FunctionInputs,
    call_arguments,
    composed,
    load_functions,
)
from irl_align.reward.foreign import TextReward, load_text_reward
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.protocol import TextFormat
from irl_align.reward.ranking import rank_samples, sample_rewards
from irl_align.reward.settings import own_template, refuse_template
from irl_align.training.run_folder import (
    Run,
    RunView,
    artefact_folder,
    is_run,
    missing_artefact,
)
from irl_align.utils.statistics import Estimate, clustered_share

Row = dict[str, Any]
"""A row of a file that a user gives or gets: field -> value."""
SCORED = [("prompt", "completion"), ("prompt", "chosen", "rejected"), ("messages",)]
SCORED += [("chosen", "rejected")]
SAMPLED = [("prompt",), ("messages",)]
"""Fields of rows to score and of prompts to sample; the first fitting tuple is read."""


@dataclass(frozen=True)
class SavedPolicy:
    """A policy folder, and for Best-of-N selection its reward (the folder of its run or of the
    reward), N, score and temperature."""

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


def prompt_format(policy: Path, template: str | None = None) -> PromptFormat:
    """The prompt format of a policy.

    template: of a policy that was not made here, text with {prompt} or chat. The default is its
    tokenizer's chat template if it has one, else {prompt}. Raises UserError: the template is not
    used, or cannot be.
    """
    saved = getattr(load_config(policy), "irl_prompt", None)
    if saved is None:
        return PromptFormat(
            template=own_template(policy, load_tokenizer(policy).chat_template, template)
        )
    form = PromptFormat(**saved)
    refuse_template(policy, form.template, template)
    return form


def first_policy(view: RunView) -> tuple[Path, str]:
    """Folder and stage key of the model that a run's loop began with: SFT's, or the start model."""
    stage = view.stages[str(SFT if str(SFT) in view.stages else START)]
    return view.folder / stage["path"] / "model", stage["key"]


def read_rows(
    path: Path, shapes: Sequence[tuple[str, ...]], read: Callable[[Row], object]
) -> list[Row]:
    """Rows of a JSON, CSV or parquet file that all have the fields of one of `shapes`.

    A field is a text or a list of messages; `messages` is a list. `tools` may define functions that
    the assistant can call. read: row_exchanges or
    row_prompt, which must be able to read each row. Raises UserError that names the file and row.
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
        row = dict(raw.values)
        if "tools" in row:
            row["tools"] = read_tools(raw, "tools")
        for field in fitting[0]:
            if isinstance(row[field], list):
                row[field] = read_messages(raw, field)
            elif field == "messages" or not isinstance(row[field], str):
                kind = type(row[field]).__name__
                text = "" if field == "messages" else "text or "
                raise UserError(
                    f"{raw.place}: {field}: found {kind}, expected {text}a list of messages"
                )
        try:
            read(row)
        except UserError as error:
            raise UserError(f"{raw.place}: {error}") from error
        rows.append(row)
    return rows


def row_exchanges(row: Row) -> list[tuple[Prompt, Completion]]:
    """Prompts and answers of a row: of chosen and rejected, of completion, or of messages.

    Raises UserError: there is no answer.
    """
    given = [row.get("completion", row.get("messages"))]
    if "chosen" in row and "rejected" in row:
        given = [row["chosen"], row["rejected"]]
    pairs = [exchange(row.get("prompt"), completion) for completion in given]
    return [(with_tools(prompt, row.get("tools") or []), answer) for prompt, answer in pairs]


def row_prompt(row: Row) -> Prompt:
    """The prompt of a row, or its messages before the last turns of the assistant.

    Raises UserError: there are no other messages.
    """
    prompt: Prompt = row["prompt"] if "prompt" in row else before_answer(row["messages"])
    if not prompt:
        raise UserError("found no prompt, expected text or messages before an answer")
    return with_tools(prompt, row.get("tools") or [])


def resolve_policy(path: Path) -> SavedPolicy:
    """The final policy of a run, with its ranking if it selects; or the model in a folder."""
    model = artefact_folder(path, "policy")
    ranking = (Run.load(path).summary or {}).get("ranking") if is_run(path) else None
    if ranking is None:
        return SavedPolicy(model)
    _, alone = run_functions(path)
    if not alone and log_ratio_of(path) is None:
        artefact_folder(path, "reward")  # its files are there
    return SavedPolicy(
        model, path, int(ranking["n"]), str(ranking["score"]), float(ranking["temperature"])
    )


def run_functions(path: Path) -> tuple[tuple[tuple[str, float], ...], bool]:
    """Import paths and weights of the functions in a run's reward, and whether they are all of it.

    None for the folder of a model.
    """
    options = Run.load(path).recipe["reward"] if is_run(path) else {}
    functions = options.get("functions", [])
    return tuple((f["path"], f["weight"]) for f in functions), options.get("kind") == "functions"


def _columns(row: Row) -> Row:
    """What reward functions read of a row besides its texts."""
    taken = {*(GIVEN - {"demonstrations"}), *(name for shape in SCORED for name in shape), "tools"}
    return {"demonstrations": [], **{name: row[name] for name in row if name not in taken}}


def saved_reward(
    path: Path, device: str, template: str | None = None
) -> TextReward | ImplicitReward:
    """The last reward of a run, or the reward model in a folder.

    The reward of a run may be the log-ratio of two models. For SPIN and DPO these are the final
    policy and the policy that the loop began with. template: of a reward that was not fitted here,
    see load_text_reward.
    """
    where = pick_device(device)
    ratio = log_ratio_of(path) if is_run(path) else None
    if ratio is None:
        return load_text_reward(artefact_folder(path, "reward"), where, template)
    return ImplicitReward(
        load_model(ratio.path, where),
        [(weight, load_model(model, where)) for weight, model in ratio.references],
        ratio.beta,
        load_tokenizer(ratio.path),
        prompt_format(ratio.path, template),
        endogenous=ratio.endogenous,
        mean=ratio.mean,
    )


def log_ratio_of(run: Path) -> Reward | None:
    """The last reward of a finished run, if it is the log-ratio of two models; else None.

    Raises UserError: the run is not finished, or one of the models is missing.
    """
    saved = Run.load(run).require_finished().get("log_ratio")
    if saved is None:
        return None
    references = tuple((float(w), run.parent / model) for w, model in saved["references"])
    reward = Reward(
        "log_ratio",
        run.parent / saved["numerator"],
        "",
        float(saved["beta"]),
        references,
        saved["endogenous"],
        saved["mean"],
    )
    for folder in (reward.path, *(model for _, model in references)):
        if not folder.is_dir():
            raise missing_artefact(run, "reward", folder)
    return reward


def score_rows(
    path: Path, rows: Sequence[Row], device: str, template: str | None = None
) -> tuple[list[Row], Estimate | None]:
    """Rows with their scores by the reward of a run or folder, and the accuracy on pairs.

    A row with a completion, or with messages whose last is the answer, gets `score`; a pair gets
    `chosen_score` and `rejected_score`. The accuracy counts equal scores as half, and the pairs of
    one prompt as one cluster; it is None for completions. template: of a reward that was not fitted
    here. Functions of a run's reward also get the other fields of the rows. Raises UserError: one
    of them fails.
    """
    paths, alone = run_functions(path)
    functions = load_functions(paths)
    reward = None if alone else saved_reward(path, device, template)
    columns = list(zip(*map(row_exchanges, rows), strict=True))  # one, or chosen and rejected
    scores = []
    for side in columns:
        prompts, answers = [p for p, _ in side], [a for _, a in side]
        parts = [] if reward is None else [reward.score(prompts, answers)]
        if functions:
            policy = artefact_folder(path, "policy")
            text_format = TextFormat(load_tokenizer(policy), prompt_format(policy))
            ids = text_format.encode(prompts, answers)[1]
            arguments = call_arguments(prompts, answers, ids, [_columns(row) for row in rows])
            parts += [function.weight * function.scores(arguments) for function in functions]
        scores.append(torch.stack(parts).sum(0))
    names = ("score",) if len(scores) == 1 else ("chosen_score", "rejected_score")
    scored = [
        {**row, **dict(zip(names, values, strict=True))}
        for row, values in zip(rows, zip(*(s.tolist() for s in scores), strict=True), strict=True)
    ]
    if len(scores) == 1:
        return scored, None
    chosen, rejected = scores
    wins = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    keys = [json.dumps(prompt, sort_keys=True) for prompt, _ in columns[0]]
    return scored, clustered_share(wins.tolist(), keys)


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
    template: str | None = None,
) -> list[Row]:
    """One row per sample: the prompt's row, with completion, sample and truncated added.

    The completion is the answer, without what the policy's template writes around it. options: the
    backend and its settings, transformers by default; `sampling` overrides the settings that it has
    too. template: of a policy that was not made here, see prompt_format.
    """
    where = pick_device(device)
    form, asked = prompt_format(policy.model, template), [row_prompt(row) for row in rows]
    options = options or GenerationOptions()
    backend = resolve_backend(options, where)
    tokenizer = load_tokenizer(policy.model)
    set_text_end(tokenizer, form.template)
    prompts = encode_prompts(asked, tokenizer, form)
    options = options.model_copy(update={"max_new_tokens": sampling.max_new_tokens})
    candidates = replace(sampling, n=sampling.n * policy.best_of)
    with saved_sampler(policy.model, tokenizer, prompts, options, backend, where) as generator:
        groups = generate(generator, prompts, candidates, progress=True)
    if policy.reward is not None:
        functions, alone = run_functions(policy.reward)
        learned = None if alone else saved_reward(policy.reward, device)
        known = dict(zip(map(tuple, prompts), asked, strict=True))
        fields = {prompt_key(p): _columns(row) for p, row in zip(asked, rows, strict=True)}
        inputs = FunctionInputs(TokenFormat(tokenizer, form, known), fields, {})
        reward = composed(learned, functions, inputs)
        samples = SampleSet(prompts, groups)
        logprobs = None
        if policy.score != "reward" and not candidates.plain:
            logprobs = partial(completion_logprobs, load_model(policy.model, where))
        scores = rank_samples(samples, sample_rewards(samples, reward), policy.score, logprobs)
        # The best of each of a prompt's n groups of best_of samples.
        best = scores.reshape(-1, sampling.n, policy.best_of).argmax(2)
        groups = [
            [group[number * policy.best_of + int(at)] for number, at in enumerate(row)]
            for group, row in zip(groups, best, strict=True)
        ]
    flat = [
        (row, prompt, number, completion)
        for row, prompt, group in zip(rows, asked, groups, strict=True)
        for number, completion in enumerate(group)
    ]
    answers = decode_answers(
        [prompt for _, prompt, _, _ in flat],
        [completion.token_ids for _, _, _, completion in flat],
        tokenizer,
        form,
    )
    return [
        {**row, "completion": answer.text, "sample": number, "truncated": completion.truncated}
        for (row, _, number, completion), answer in zip(flat, answers, strict=True)
    ]
