"""Fixtures shared by the tests: tiny seeded models and a tokenizer, made without a network."""

import os

# Before torch or the Hugging Face libraries are imported by any test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's would be among the requests that tests count
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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
def _tokenizer() -> PreTrainedTokenizerFast:
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
    tokenizer = _tokenizer()
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
def _model(arch: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(_config(arch)).eval()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens; pad, bos and eos are distinct, none is added by encoding."""
    return copy.deepcopy(_tokenizer())


@pytest.fixture
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """``tiny_model(arch)``: a fresh copy of a random two-layer causal LM, H=32, float32, in eval.

    Weights are the same in every call and every test. ``arch`` is one of ``TINY_ARCHITECTURES``;
    llama, qwen3 (tied embeddings) and mistral (window of 8) have grouped-query attention.
    """
    return lambda arch: copy.deepcopy(_model(arch))
