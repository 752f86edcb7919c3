"""Tiny seeded models and a tokenizer, made without a network."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

torch.set_num_threads(1)

SENTENCES = [
    "The Punter is a cheap pub near the river.",
    "Alimentum serves Italian food in the city centre.",
    "name = Loch Fyne, food = French, price = high",
    "Do you know a child friendly restaurant? Yes, there are two.",
]
TINY_ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen3", "mistral")


@cache
def cached_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text has an encoding
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def _config(arch: str) -> PreTrainedConfig:
    tokenizer = cached_tokenizer()
    shared = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,  # ten times the usual, so that a wrong mask or position shows
    }
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    if arch == "llama":
        return LlamaConfig(**shared, **sizes, num_key_value_heads=2)
    if arch == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(**shared, **no_dropout, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    if arch == "gpt_neox":
        return GPTNeoXConfig(**shared, **sizes)
    if arch == "qwen3":
        return Qwen3Config(
            **shared, **sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True
        )
    if arch == "mistral":
        return MistralConfig(**shared, **sizes, num_key_value_heads=2, sliding_window=8)
    raise ValueError(f"no tiny {arch!r}: choose one of {TINY_ARCHITECTURES}")


@cache
def cached_model(arch: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(_config(arch)).eval()


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def qwen2() -> PreTrainedModel:
    """Its first layer has full attention, the last a window of 4."""
    config = Qwen2Config(
        **SIZES,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def gemma2() -> PreTrainedModel:
    """Attention scores are capped at +-0.5, so that leaving it out shows."""
    config = Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5, sliding_window=4
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
