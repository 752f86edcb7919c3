"""Critics and their starting values."""

from collections.abc import Callable
from pathlib import Path

import torch
from support.ppo_tools import learner_of, options, reward_model
from support.rows import random_ids
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.policy.ppo.critic import make_critic


def test_make_critic_starts_at_the_rewards_prefixes_or_at_zero(
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("llama")
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, model)
    prompts, rows = random_ids(4, 2, 5, 0), random_ids(4, 1, 6, 1)
    starts = {}
    for name, option in {
        "reward": {"critic_init": "reward"},
        "zero": {"critic_init": "zero"},
        "shared": {"critic": "shared"},
    }.items():
        chosen = options(**option)
        learner = learner_of(model, chosen, make_critic(chosen, model, reward, tiny_tokenizer))
        _, values = learner.infer(learner.pack(prompts, rows), logps=False, values=True)
        assert values is not None
        starts[name] = values
    assert not starts["zero"].any() and not starts["shared"].any()
    for row, prefixes in enumerate(reward.prefix_scores_ids(prompts, rows)):
        got = starts["reward"][row, : len(rows[row])]
        assert torch.allclose(got, prefixes[:-1], atol=1e-5)
