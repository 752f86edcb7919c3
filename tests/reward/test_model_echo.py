"""A reward that reads the prompt again after the completion."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.rows import plain_logps, random_ids, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.recipe import load_recipe
from irl_align.data.encoding import encode_completions, encode_prompts
from irl_align.errors import UserError
from irl_align.hub.check import chat_texts
from irl_align.hub.weights import chat_template
from irl_align.models.packing import pack_rows
from irl_align.models.trl import Training
from irl_align.reward.fit import fit_reward, margins, pair_columns
from irl_align.reward.forward import score_head, whole_rewards
from irl_align.reward.losses import PairLoss
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import ScoreRequest
from irl_align.reward.scoring import score_tokens
from irl_align.reward.settings import RewardSettings

PROMPTS = random_ids(5, 1, 9, seed=1)
COMPLETIONS = random_ids(5, 0, 12, seed=2)


@pytest.fixture
def reward(
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Callable[..., RewardModel]:
    """``reward(arch, **settings)``: a fresh reward with echo on a tiny policy."""

    def make(arch: str = "llama", **settings: Any) -> RewardModel:
        folder = save(tiny_model(arch), tiny_tokenizer, tmp_path / f"policy-{arch}")
        settings = {"echo": True, **settings}
        return RewardModel.from_policy(folder, tiny_tokenizer, RewardSettings(**settings), seed=1)

    return make


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings", [{}, {"lm_coef": 0.7}, {"lm_coef": 0.7, "bound": 1.5, "mean": 0.25}]
)
@torch.no_grad()
def test_score_ids_reads_the_head_after_the_second_prompt(
    arch: str,
    settings: dict[str, float],
    reward: Callable[..., RewardModel],
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    """The head at the end of x y x EOS, and the log-prob of y alone, where x comes first."""
    ours, policy = reward(arch, **settings), tiny_model(arch)
    eos = ours.tokenizer.eos_token_id
    expected = []
    for x, y in zip(PROMPTS, COMPLETIONS, strict=True):
        value = float(ours.model(torch.tensor([[*x, *y, *x, eos]])).logits[0, 0])
        if y and "lm_coef" in settings:
            value += settings["lm_coef"] * float(plain_logps(policy, x, y).mean())
        if "bound" in settings:
            value = settings["bound"] * math.tanh(value / settings["bound"])
            value -= settings["mean"]
        expected.append(value)
    scores = ours.score_ids(PROMPTS, COMPLETIONS)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    empty = ours.score_ids(PROMPTS[:1], [[]])
    torch.testing.assert_close(empty, ours.score_ids(PROMPTS, [[]] * 5)[:1], atol=1e-5, rtol=0)
    ours.save_pretrained(tmp_path / "reward")
    again = RewardModel.from_pretrained(tmp_path / "reward")
    assert again.settings.echo
    assert again.score_ids(PROMPTS, COMPLETIONS).equal(scores)


def test_whole_rewards_log_prob_covers_the_completion_only(
    reward: Callable[..., RewardModel],
) -> None:
    """With a head of zeros the loss is that of the log-probs of y, and no token of x counts."""
    ours = reward(lm_coef=1.0)
    score_head(ours.model).weight.data.zero_()
    rows = [[number] for number in range(len(PROMPTS))]
    read = ours.as_read(PROMPTS, COMPLETIONS)
    rewards = whole_rewards(ours.model, ours.settings, pack_rows(PROMPTS, read, rows, 0))
    plain = whole_rewards(
        ours.model, RewardSettings(lm_coef=1.0), pack_rows(PROMPTS, COMPLETIONS, rows, 0)
    )
    torch.testing.assert_close(rewards, plain, atol=1e-5, rtol=0)
    embeddings = ours.model.get_input_embeddings().weight
    mine, theirs = (torch.autograd.grad(r.sum(), embeddings)[0] for r in (rewards, plain))
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_score_tokens_refuses_dense_requests_with_echo(reward: Callable[..., RewardModel]) -> None:
    ours = reward()
    scores = score_tokens(ours, ScoreRequest(PROMPTS, COMPLETIONS))
    assert scores.rewards.equal(ours.score_ids(PROMPTS, COMPLETIONS))
    with pytest.raises(UserError, match="reads the prompt again"):
        ours.prefix_scores_ids(PROMPTS, COMPLETIONS)
    for wanted in ({"prefixes": True, "attention": False}, {"prefixes": False, "attention": True}):
        with pytest.raises(UserError, match="expected credit sparse, uniform or random"):
            score_tokens(ours, ScoreRequest(PROMPTS, COMPLETIONS, **wanted))


def test_score_ids_refuses_a_short_context(reward: Callable[..., RewardModel]) -> None:
    ours = reward("gpt2")
    context = ours.model.config.max_position_embeddings
    with pytest.raises(
        UserError, match=f"have {context + 4} tokens, expected at most .* {context}"
    ):
        ours.score_ids([[5]], [[7] * (context + 1)])


def test_fit_reward_reads_the_prompt_twice(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    """The same text under two prompts: only what is read after the prompt can tell."""
    texts = random_ids(24, 3, 8, seed=3)
    rows = [
        {
            "prompt_ids": [text[0], 7],
            "chosen_ids": text,
            "rejected_prompt_ids": [(text[0] + 5) % 40 + 3, 7],
            "rejected_ids": text,
        }
        for text in texts
    ]
    pairs = Dataset.from_list(rows)
    ours = reward()
    before = (margins(ours, pairs) > 0).float().mean()
    args = {
        "learning_rate": 5e-3,
        "num_train_epochs": 8,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
    }
    where = Training(tmp_path / "work", seed=0, device=torch.device("cpu"))
    fit_reward(ours, pair_columns(pairs), PairLoss(), args, where)
    after = (margins(ours, pairs) > 0).float().mean()
    assert after > 0.9 > before


def test_chat_template_writes_the_second_prompt(
    reward: Callable[..., RewardModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ours = reward(template="ask: {prompt} say:")
    prompts, answers = ["the cat sat", "a dog"], ["on the mat", "ran"]
    tiny_tokenizer.chat_template = chat_template(ours.settings, tiny_tokenizer, echo=True)
    first = encode_prompts(prompts, tiny_tokenizer, ours.settings)
    second = encode_completions(prompts, answers, first, tiny_tokenizer, ours.settings)
    read = [[*x, *y] for x, y in zip(first, ours.as_read(first, second), strict=True)]
    assert chat_texts(tiny_tokenizer, prompts, answers) == read


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.kind=implicit", "policy_update.kind=identity"], "echo is an option of kind"),
        (
            ["policy_update.kind=ppo", "policy_update.credit=red"],
            "reward.echo gives no rewards of prefixes, which credit red needs",
        ),
    ],
)
def test_load_recipe_refuses_options_that_exclude_echo(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("recipes/restaurant/irl-best-of-n.yaml", ["reward.echo=true", *overrides])
