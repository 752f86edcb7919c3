"""Tiny rewards of other projects, and their scores as their model cards compute them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def tiny_llama(tokenizer: PreTrainedTokenizerFast, **more: Any) -> LlamaConfig:
    """The config of a tiny model that reads this tokenizer's ids."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
        **more,
    )


def one_label_classifier(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A sequence classifier with nothing of ours in its config."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_llama(tokenizer, num_labels=1)
        return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
def card_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str | Sequence[dict[str, str]],
    answer: str,
) -> float:
    """Score as in a model card's snippet: one call of apply_chat_template."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    chat = [*asked, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
    return float(model(input_ids=ids).logits)
