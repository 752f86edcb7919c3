"""The loop with one cumulative reward: its offsets, its fit and its policy step."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.tiny_runs import BEST, metrics, stage_folder, stage_records, tiny_recipe
from transformers import AutoModelForCausalLM

from irl_align.errors import UserError
from irl_align.models.lm_head import completion_logprobs
from irl_align.policy.best_of_n import choose_prompts
from irl_align.reward.model import RewardModel
from irl_align.training.train import Result, train

SIGNS = "loop.signs={action: warn, two_sample_accuracy: 0.0, unfit_accuracy: 0.0}"
TWO = (*BEST, "loop.iterations=2", SIGNS)
PPO = "policy_update={kind: ppo, batch_size: 8, episodes: 16}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    folder = tmp_path_factory.mktemp("offset")
    return lambda name, *overrides: train(tiny_recipe(folder, f"name={name}", *overrides))


@pytest.fixture(scope="module")
def log_ratio(run: Callable[..., Result]) -> Result:
    return run("log-ratio", *TWO, "reward.offset=log_ratio", "reward.beta=2.0", "reward.init=warm")


@torch.no_grad()
def summed(model: Path, prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    return np.array([float(row.sum()) for row in completion_logprobs(policy, prompts, completions)])


def log_ratios(run: Path, prompts: list[list[int]], completions: list[list[int]]) -> np.ndarray:
    """log pi_1 / pi_0 of completions."""
    new, old = (stage_folder(run, role) / "model" for role in ("policy-1", "sft"))
    return summed(new, prompts, completions) - summed(old, prompts, completions)


def test_offsets_are_the_log_ratio_of_demonstrations_less_that_of_samples(
    log_ratio: Result,
) -> None:
    rows = pq.read_table(stage_folder(log_ratio.folder, "pairs/1") / "train.parquet").to_pydict()
    sides = (
        log_ratios(log_ratio.folder, rows["prompt_ids"], rows[f"{side}_ids"])
        for side in ("chosen", "rejected")
    )
    preferred, rejected = sides
    stored = np.load(stage_folder(log_ratio.folder, "offsets/1") / "train.npy")
    np.testing.assert_allclose(stored, preferred - rejected, atol=2e-4)
    assert np.abs(stored).max() > 1e-3
    assert "offsets/0" not in stage_records(log_ratio.folder)  # pi_0 has no log-ratio to itself


def test_the_first_loss_of_a_warm_fit_subtracts_the_offsets(log_ratio: Result) -> None:
    """Before its first step r_1 is r_0, and the window holds the pairs of both iterations."""
    reward = RewardModel.from_pretrained(stage_folder(log_ratio.folder, "reward/0") / "model")
    losses = []
    for k in (0, 1):
        folder = stage_folder(log_ratio.folder, f"pairs/{k}")
        rows = pq.read_table(folder / "held_out.parquet").to_pydict()
        own = reward.score_ids(rows["prompt_ids"], rows["chosen_ids"])
        other = reward.score_ids(rows["rejected_prompt_ids"], rows["rejected_ids"])
        logits = (own - other).double().numpy() / 2.0
        if k:
            logits -= np.load(stage_folder(log_ratio.folder, "offsets/1") / "held_out.npy")
        losses.append(float(np.log1p(np.exp(-logits)).mean()))
    report = metrics(log_ratio.folder)["reward/0"]["held_out"]
    assert report["loss"] == pytest.approx(losses[0], abs=1e-5)
    records = metrics(log_ratio.folder)["reward/1"]
    assert records["older_before"]["0"]["loss"] == pytest.approx(losses[0], abs=1e-5)


def test_best_of_n_ranks_by_what_the_policy_lacks_of_the_reward(log_ratio: Result) -> None:
    drawn = stage_folder(log_ratio.folder, "samples/candidates/policy-1/t1") / "samples.parquet"
    rows = pq.read_table(drawn).to_pandas().sort_values("prompt", kind="stable").to_dict("list")
    rows["token_ids"] = [list(map(int, ids)) for ids in rows["token_ids"]]
    data = pq.read_table(stage_folder(log_ratio.folder, "data") / "reward.parquet").to_pydict()
    distinct = [list(ids) for ids in dict.fromkeys(map(tuple, data["prompt_ids"]))]
    prompts = choose_prompts(distinct, 24)
    asked = [prompts[index] for index in rows["prompt"]]
    reward = RewardModel.from_pretrained(stage_folder(log_ratio.folder, "reward/1") / "model")
    ratio = log_ratios(log_ratio.folder, asked, rows["token_ids"])
    expected = reward.score_ids(asked, rows["token_ids"]).numpy() / 2.0 - ratio
    stored = np.load(stage_folder(log_ratio.folder, "candidate-rewards/1") / "rewards.npy")
    np.testing.assert_allclose(stored, expected, atol=2e-4)


def test_a_sum_of_rewards_subtracts_the_last_one(run: Callable[..., Result]) -> None:
    """With a warm start and the latest pairs the fit starts at logits 0: r_1 is r_0."""
    latest = ("pairs.window=latest", "reward.offset=reward", "reward.init=warm")
    result = run("sum", *TWO, *latest, "reward.schedule.learning_rate=[0.0]")
    first, second = (
        RewardModel.from_pretrained(stage_folder(result.folder, f"reward/{k}") / "model")
        for k in (0, 1)
    )
    rows = pq.read_table(stage_folder(result.folder, "pairs/1") / "held_out.parquet").to_pydict()
    own = first.score_ids(rows["prompt_ids"], rows["chosen_ids"])
    other = first.score_ids(rows["rejected_prompt_ids"], rows["rejected_ids"])
    stored = np.load(stage_folder(result.folder, "offsets/1") / "held_out.npy")
    np.testing.assert_allclose(stored, (own - other).numpy(), atol=1e-5)
    again = second.score_ids(rows["prompt_ids"], rows["chosen_ids"])
    torch.testing.assert_close(again - again.mean(), own - own.mean(), atol=1e-5, rtol=0)
    report = metrics(result.folder)["reward/1"]["held_out"]
    assert report["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert report["accuracy"] == 0.5


def test_ppo_optimises_the_cumulative_reward_against_pi_0(run: Callable[..., Result]) -> None:
    result = run("ppo", "loop.iterations=2", PPO, "reward.offset=log_ratio", SIGNS)
    records = stage_records(result.folder)
    assert records["policy-2"]["inputs"]["reference"] == records["sft"]["key"]
    assert {"offsets/1", "reward/1"} <= set(records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["policy_update={kind: ppo, reference: current}"],
            "policy_update.reference is current, which would count it twice: use initial",
        ),
        (["policy_update={use: select}"], "makes policies without log-probs: use offset reward"),
        (
            ["reward.loss=linear", "reward.bound=2.0"],
            "offset log_ratio has no effect on loss",
        ),
        (["reward.offset=none", "reward.offset_clip=1.0"], "offset_clip"),
        (["reward.kind=implicit", "policy_update={kind: identity}"], "offset"),
        (["reward.offset_coef=-1"], "reward.offset_coef"),
        (["reward.beta=0"], "reward.beta"),
    ],
    ids=str,
)
def test_what_contradicts_the_offset_is_refused(
    options: list[str], message: str, tmp_path: Path
) -> None:
    chosen = ["loop.iterations=2", "reward.offset=log_ratio", *options]
    with pytest.raises(UserError, match=message) as error:
        tiny_recipe(tmp_path, *chosen)
    assert "\n" not in str(error.value)
