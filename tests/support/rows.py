"""Rows of random token ids, and log-probabilities by the plainest forward there is."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ids = list[list[int]]


def random_ids(count: int, shortest: int, longest: int, seed: int, vocabulary: int = 320) -> Ids:
    """`count` rows of `shortest` to `longest` ordinary token ids (0 to 2 are special)."""
    draw = random.Random(seed)
    return [
        [draw.randrange(3, vocabulary) for _ in range(draw.randint(shortest, longest))]
        for _ in range(count)
    ]


def random_pairs(count: int, seed: int) -> Dataset:
    """Pairs as the loop makes them; every third has another prompt on its rejected side."""
    prompts = random_ids(count, 1, 6, seed)
    others = random_ids(count, 1, 6, seed + 1)
    return Dataset.from_dict(
        {
            "prompt_ids": prompts,
            "chosen_ids": random_ids(count, 1, 8, seed + 2),
            "rejected_prompt_ids": [
                others[i] if i % 3 == 2 else prompt for i, prompt in enumerate(prompts)
            ],
            "rejected_ids": random_ids(count, 1, 8, seed + 3),
        }
    )


def plain_logps(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]
) -> torch.Tensor:
    """Log-prob of each completion token (T,): one unpadded row, a softmax over all positions."""
    ids = torch.tensor([[*prompt, *completion]])
    table = torch.softmax(model(input_ids=ids).logits[0].double(), dim=-1).log()
    places = range(len(prompt), len(prompt) + len(completion))
    return torch.stack([table[place - 1, ids[0, place]] for place in places])


def plain_sums(model: PreTrainedModel, prompts: Ids, completions: Ids) -> torch.Tensor:
    """Summed log-prob of each completion (B,), one row at a time; differentiable."""
    return torch.stack(
        [plain_logps(model, p, c).sum() for p, c in zip(prompts, completions, strict=True)]
    )


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether every tensor of two models is equal bit by bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write a model and its tokenizer; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
