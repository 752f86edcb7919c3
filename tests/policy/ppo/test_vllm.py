"""Policies in training sampled by a real vLLM: PPO's rollouts, and LoRA adapters."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ppo_tools import Scripted, actors, options, train
from support.vllm_models import (
    CONTEXT,
    EOS,
    RANK,
    build,
    largest_gap,
    needs_vllm,
    ragged_prompts,
    save,
)
from transformers import PreTrainedTokenizerFast

from irl_align.config.generation import GenerationOptions
from irl_align.config.model import LoraOptions
from irl_align.models.generation.backends import LiveGenerator, VLLMSampler, VLLMSettings
from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.lora import DEFAULT_ADAPTER, adapter_weights, add_adapter

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSampler]:
    """One engine for the module, which takes adapters."""
    settings = VLLMSettings(GenerationOptions(backend="vllm"), CONTEXT, lora_rank=RANK)
    sampler = VLLMSampler(
        settings, "vllm", torch.device("cpu"), tmp_path_factory.mktemp("vllm") / "log"
    )
    yield sampler
    sampler.close()


def test_rollouts_are_of_the_policy_as_it_is(
    tmp_path: Path, sampler: VLLMSampler, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """New weights for every update and no others; no gap to the learner, so weights of 1."""
    chosen = options(advantage="reinforce", episodes=48, epochs=1, importance_weights="truncated")
    reward = Scripted(lambda prompt, row: float(sum(token < 45 for token in row)) / len(row))
    cast = actors(build("llama", 0), reward, tiny_tokenizer, ragged_prompts(8), chosen)
    cast = replace(cast, generator=LiveGenerator(sampler, cast.policy, [EOS]))
    history = train(tmp_path, cast, chosen)["history"]
    assert len(history) == 3
    for record in history:
        assert 0 < record["sampler_log_ratio"] <= record["sampler_log_ratio_max"] < 1e-4
        assert record["importance_weight"] == pytest.approx(1.0, abs=1e-4)
        assert record["importance_capped"] == 0
        assert not any("sampler" in alarm for alarm in record["alarms"])
    assert history[-1]["kl"] > 0.01  # the policy has moved, and was followed
    assert sampler.generator is not None
    # The start, which is looked at and rolled out, and the policy after each of the updates.
    assert sampler.generator.syncs == 4
    assert sampler.generator.engine.starts == 1  # type: ignore[attr-defined]


def test_of_an_adapter_in_training_that_alone_goes_to_vllm(
    tmp_path: Path, sampler: VLLMSampler
) -> None:
    where = save(build("llama", 1), tmp_path / "base")
    policy = build("llama", 1)
    targets = ["q_proj", "v_proj", "down_proj"]
    add_adapter(policy, LoraOptions(r=RANK, target_modules=targets), str(where))
    live = LiveGenerator(sampler, policy, [EOS])
    prompts, gaps = ragged_prompts(6), []
    for seed in range(3):
        found = generate(live, prompts, Sampling(max_new_tokens=12))
        assert largest_gap(policy, prompts, found) < 1e-4
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for weights in adapter_weights(policy, DEFAULT_ADAPTER).values():
                weights.add_(0.2 * torch.randn_like(weights))
        gaps.append(largest_gap(policy, prompts, found))
    assert min(gaps) > 0.01
    sent = {path.name for path in (Path(live.folder.name) / "policy").iterdir()}
    assert "adapter_model.safetensors" in sent and "model.safetensors" not in sent
    assert sampler.generator is not None
    assert sampler.generator.engine.starts == 1  # type: ignore[attr-defined]
