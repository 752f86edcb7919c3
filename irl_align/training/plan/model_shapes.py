"""Shapes of language models, from their configs. No weights are loaded or downloaded."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from irl_align.config.model import LoraOptions, ModelOptions, ScratchOptions
from irl_align.errors import UserError
from irl_align.models.loading import load_config, name_backbone
from irl_align.models.lora import add_adapter
from irl_align.training.plan.memory import Shape

# Published configs of the recipes' models, so that a plan needs no network.
PUBLISHED: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-1b-deduped": {
        "model_type": "gpt_neox",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "vocab_size": 50304,
    },
    "EleutherAI/pythia-2.8b-deduped": {
        "model_type": "gpt_neox",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50304,
    },
    "alignment-handbook/zephyr-7b-sft-full": {"model_type": "mistral"},  # its defaults: 7B-v0.1
    "google/gemma-2b": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "openai-community/gpt2": {"model_type": "gpt2"},  # its defaults: the smallest
}


def shape_of_recipe(options: ModelOptions, vocabulary: int | None = None) -> Shape:
    """Shape of a recipe's model. Raises UserError where its config is not known.

    vocabulary: size of a trained tokenizer, which may be smaller than the recipe's vocab_size.
    """
    return shape_of(model_config(options, vocabulary))


def scratch_config(options: ScratchOptions, vocabulary: int | None = None) -> PreTrainedConfig:
    """The config of models.loading.scratch_model, without special tokens."""
    shape = options.model_dump(exclude={"architecture"})
    if options.num_key_value_heads is None:
        del shape["num_key_value_heads"]
    shape["vocab_size"] = vocabulary or options.vocab_size
    return AutoConfig.for_model(
        options.architecture, **shape, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


def model_config(options: ModelOptions, vocabulary: int | None = None) -> PreTrainedConfig:
    """Config of a recipe's model. Raises UserError where it is not known."""
    if options.from_scratch is not None:
        return scratch_config(options.from_scratch, vocabulary)
    path, revision = str(options.path), options.revision
    if path in PUBLISHED and not Path(path).exists():
        return AutoConfig.for_model(**PUBLISHED[path])
    try:
        return load_config(path, revision=revision, trust_remote_code=options.trust_remote_code)
    except UserError as error:
        raise UserError(
            f"model.path: {error}; the plan needs config.json of a folder, a model on the Hub, or "
            f"one of {', '.join(PUBLISHED)}"
        ) from error


def adapter_size(options: ModelOptions, lora: LoraOptions) -> int:
    """Parameters of an adapter of a recipe's model. Raises UserError where it adapts no layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(options))
        name_backbone(model)
        add_adapter(model, lora, str(options.path))
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def shape_of(config: PreTrainedConfig) -> Shape:
    """Shape of a config's causal language model. Raises UserError where it has none."""
    return _shape(config.to_json_string(use_diff=False))


@cache
def _shape(text: str) -> Shape:
    own = AutoConfig.for_model(**json.loads(text))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own)
        name_backbone(model)
        config: Any = own.get_text_config(decoder=True)
        heads = config.num_attention_heads
        width = config.hidden_size
        trunk = sum(p.numel() for p in model.base_model.parameters())
        return Shape(
            family=config.model_type,
            layers=config.num_hidden_layers,
            width=width,
            feed_forward=_feed_forward(config),
            heads=heads,
            key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or width // heads,
            vocabulary=config.vocab_size,
            trunk=trunk,
            head=sum(p.numel() for p in model.parameters()) - trunk,
        )
    except (ValueError, AttributeError) as error:  # no causal LM, or sizes by other names
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"model: found a config of {own.model_type}, which gives no shape; expected a causal "
            f"language model such as llama, mistral, qwen3, gpt_neox or gpt2: {cause}"
        ) from error


def _feed_forward(config: Any) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if size := getattr(config, name, None):
            return int(size)
    return 4 * int(config.hidden_size)
