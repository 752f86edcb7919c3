"""Tiny policies on disk for the tests against vLLM, and their log-probs by transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from irl_align.models.generation.protocol import Completion
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.generation.vllm_common import EngineSettings, vllm_importable

VOCAB, PAD, EOS, CONTEXT = 90, 0, 1, 96
RANK = 4  # of adapters
_TARGETS = {"gpt_neox": ["query_key_value", "dense_4h_to_h"]}
INSTALL = "vLLM is not installed: make vllm"
needs_vllm = pytest.mark.skipif(not vllm_importable(), reason=INSTALL)
SETTINGS = EngineSettings(device="cpu", dtype="float32", context_length=CONTEXT, cache_tokens=4096)
# vLLM's CPU attention has heads of 32 and more only.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": PAD,
    "eos_token_id": EOS,
}
_ROPE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_ROPE, "num_key_value_heads": 1}
_BUILD: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_GROUPED, head_dim=32, tie_word_embeddings=True)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_COMMON, n_embd=64, n_layer=2, n_head=2, n_positions=CONTEXT)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=8)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_ROPE)),
}


def build(architecture: str, seed: int) -> PreTrainedModel:
    """A random model with peaked, prompt-dependent distributions; EOS about 1 in 25 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = _BUILD[architecture]().eval()
        with torch.no_grad():
            for weights in model.parameters():
                if weights.ndim > 1:
                    weights.mul_(6)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def adapter(
    base: Path, model: PreTrainedModel, seed: int, folder: Path, rank: int = RANK
) -> PreTrainedModel:
    """The model with a random LoRA adapter, which is saved in a folder with `base` as its base."""
    model.config._name_or_path = model.name_or_path = str(base)
    targets = _TARGETS.get(model.config.model_type, ["q_proj", "v_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=targets)
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, weights in wrapped.named_parameters():
                if "lora_B" in name:
                    weights.normal_(std=0.2)
    wrapped.eval().save_pretrained(folder)
    adapted: PreTrainedModel = wrapped.get_base_model()
    return adapted


@torch.inference_mode()
def learner_logprobs(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Log-probs of completion tokens, one row at a time, by transformers alone."""
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        chosen = logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]
        out.append(chosen.numpy())
    return out


def sync(sampler: VLLMGenerator, path: Path, key: str, model: PreTrainedModel) -> None:
    sampler.sync(path, key, [EOS], lambda: model)


def largest_gap(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], groups: Sequence[list[Completion]]
) -> float:
    """Largest difference of a sampled token's log-prob between a backend and the learner."""
    rows = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    own = learner_logprobs(model, [p for p, _ in rows], [c.token_ids for _, c in rows])
    return max(
        float(np.abs(c.logprobs - logprobs).max())
        for (_, c), logprobs in zip(rows, own, strict=True)
    )


def ragged_prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=count)
    return [rng.integers(2, VOCAB, size=length).tolist() for length in lengths]


def ids(groups: Sequence[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]
