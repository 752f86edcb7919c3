"""Many architectures: log-probs, samples and rewards against one unpadded row at a time.

Batches are padded and packed, caches are cut and joined; an architecture that counts positions,
masks or windows in another way than assumed would give other numbers. Weights are four times as
large as usual, so that each position and each head matters.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.rows import plain_logps, random_ids
from support.tiny_models import cached_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from irl_align.models.generation.protocol import Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import classifier_class, load_config, load_model, seeded
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings

EOS, PAD = 2, 0  # as in the tests' tokenizer
SIZES: dict[str, Any] = {
    "vocab_size": 328,  # more than tokens: for Qwen 2 transformers adds one of its own
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW: dict[str, Any] = {"sliding_window": 8}  # shorter than the longest prompt
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "biogpt": ("biogpt", {}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 4}),
    "cohere2": ("cohere2", {**HEADS, **WINDOW}),
    "diffllama": ("diffllama", {"num_key_value_heads": 2}),
    "ernie4_5": ("ernie4_5", HEADS),
    "exaone4": ("exaone4", {"num_key_value_heads": 2, **WINDOW, "sliding_window_pattern": 2}),
    "falcon": ("falcon", {"alibi": True}),
    "falcon_rotary": ("falcon", {"alibi": False, "multi_query": False}),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", {**HEADS, **WINDOW}),
    "gemma3_text": ("gemma3_text", {**HEADS, **WINDOW}),
    "glm4": ("glm4", HEADS),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
        | {"window_size": 8},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": (
        "gpt_oss",
        {**HEADS, **WINDOW, "num_local_experts": 4}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "granite": ("granite", {"num_key_value_heads": 2, "logits_scaling": 4.0}),
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama4_text": (
        "llama4_text",
        {
            **HEADS,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 8,
        },
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, **WINDOW}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "modernbert_decoder": ("modernbert-decoder", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "olmo3": ("olmo3", {"num_key_value_heads": 2, **WINDOW}),
    "olmoe": ("olmoe", EXPERTS),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "opt_projected": (
        "opt",
        {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False},
    ),
    "phi": ("phi", {"num_key_value_heads": 2}),
    "phi3": ("phi3", {"num_key_value_heads": 2, **WINDOW}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2_window": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 0, **WINDOW},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_key_value_heads": 2, **EXPERTS, "shared_expert_intermediate_size": 32},
    ),
    "qwen3": ("qwen3", HEADS),
    "qwen3_moe": ("qwen3_moe", {**HEADS, **EXPERTS}),
    "smollm3": ("smollm3", {"num_key_value_heads": 2}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2}),
    "starcoder2": ("starcoder2", {"num_key_value_heads": 2, **WINDOW}),
    "xglm": ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
}
# Its classifier has another head than a score of the last hidden state.
REFUSED = {"modernbert_decoder"}
LENGTHS = (5, 20, 9)
DISTINCT = [random_ids(1, length, length, seed=length)[0] for length in LENGTHS]
# Several completions of a prompt, of very different lengths; one ends at once.
PROMPTS = [DISTINCT[0], DISTINCT[0], DISTINCT[0], DISTINCT[1], DISTINCT[1], DISTINCT[2]]
COMPLETIONS = [
    random_ids(1, length, length, seed=100 + length)[0] for length in (3, 12, 7, 1, 18, 5)
]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved language model with random weights, and its tokenizer."""
    kind, more = ARCHITECTURES[request.param]
    with seeded(0):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | more)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.dim() > 1 else 1.0)
    path: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    cached_tokenizer().save_pretrained(path)
    return path


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> list[int]:
    """The most likely continuation up to EOS, by a whole forward for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + steps and ids[-1] != EOS:
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[len(prompt) :]


each = pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)


@each
@torch.no_grad()
def test_completion_logprobs_equal_plain_forwards(folder: Path) -> None:
    model = load_model(folder)
    rows = zip(PROMPTS, COMPLETIONS, completion_logprobs(model, PROMPTS, COMPLETIONS), strict=True)
    for prompt, completion, actual in rows:
        expected = plain_logps(model, prompt, completion).float()
        torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-5, rtol=1e-6)


@each
def test_greedy_samples_equal_plain_forwards(folder: Path) -> None:
    model = load_model(folder)
    # Two rows at once of three prompts: one joins when another leaves.
    generator = TransformersGenerator(model, [EOS], PAD, max_batch_rows=2)
    groups = generate(generator, DISTINCT, Sampling(temperature=0.0, max_new_tokens=12))
    for prompt, [completion] in zip(DISTINCT, groups, strict=True):
        assert completion.token_ids == greedy(model, prompt, 12)


@pytest.mark.parametrize(
    "folder", [name for name in ARCHITECTURES if name not in REFUSED], indirect=True
)
@torch.no_grad()
def test_rewards_equal_plain_forwards(folder: Path, tmp_path: Path) -> None:
    RewardModel.from_policy(folder, cached_tokenizer(), RewardSettings(), 3).save_pretrained(
        tmp_path
    )
    actual = RewardModel.from_pretrained(tmp_path).score_ids(PROMPTS, COMPLETIONS, None)
    alone = classifier_class(load_config(tmp_path)).from_pretrained(tmp_path).eval()

    def reward(prompt: list[int], completion: list[int]) -> Tensor:
        logits: Tensor = alone(input_ids=torch.tensor([prompt + completion])).logits
        return logits[0, 0]

    expected = torch.stack([reward(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert float(expected.std()) > 0.03
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-6)
