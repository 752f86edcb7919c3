"""PPO's rollouts by a real vLLM."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.ppo_tools import Scripted, actors, options, train
from support.vllm_models import EOS, SETTINGS, build, needs_vllm, ragged_prompts
from transformers import PreTrainedTokenizerFast

from irl_align.config.generation import ServerOptions
from irl_align.models.generation.backends import LiveGenerator
from irl_align.models.generation.vllm_backend import VLLMGenerator

pytestmark = [pytest.mark.vllm, needs_vllm]


def test_ppo_rollouts_by_vllm_are_of_the_current_policy(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """vLLM gets new weights once per update, and no gap to the learner leaves weights of 1."""
    chosen = options(advantage="reinforce", episodes=32, epochs=1, importance_weights="truncated")
    reward = Scripted(lambda prompt, row: float(sum(token < 45 for token in row)) / len(row))
    cast = actors(build("llama", 0), reward, tiny_tokenizer, ragged_prompts(8), chosen)
    vllm = VLLMGenerator(SETTINGS, "vllm", ServerOptions(), tmp_path / "log")
    cast = replace(cast, generator=LiveGenerator(vllm, cast.policy, [EOS]))
    try:
        history = train(tmp_path, cast, chosen)["history"]
        assert vllm.engine is not None and vllm.engine.starts == 1
    finally:
        vllm.close()
    assert len(history) == 2
    for record in history:
        assert 0 < record["sampler_log_ratio"] <= record["sampler_log_ratio_max"] < 1e-4
        assert record["importance_weight"] == pytest.approx(1.0, abs=1e-4)
        assert record["importance_capped"] == 0
        assert not any("sampler" in alarm for alarm in record["alarms"])
    assert history[-1]["kl"] > 0.01  # the policy has moved, and the samples follow it
    # The start, which is evaluated and rolled out, and the policy after each of the updates.
    assert len(vllm.sync_seconds) == 3
