"""Trainings of a few steps with the options of TRL that a recipe may set."""

import copy
import dataclasses
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)

from irl_align.config.trl_args import args_problems
from irl_align.models.loading import seeded
from irl_align.models.sft import fit_sft, sft_columns
from irl_align.models.trl import Training
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.losses import PairLoss
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from support.tiny_models import cached_tokenizer

GROUPS = {
    "SFTConfig": {"sft": {}},
    "RewardConfig": {"reward": {}},
    "DPOConfig": {"reward": {"kind": "implicit"}},
    "iqlearn": {"policy_update": {"kind": "iqlearn"}},
}
Args = dict[str, Any]
BASE: Args = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "optim": "adamw_torch", "logging_steps": 1, "bf16": False,
    "save_steps": 100,
}  # fmt: skip
ROWS = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12], [5, 9]]
SIDE = [[13, 2], [14, 15, 16, 2], [17, 18, 2], [19, 2], [20, 21, 2]]
OTHER = [[22, 2], [23, 24, 2], [25, 2], [26, 27, 28, 2], [29, 2]]


def problem(group: str, name: str, value: Any) -> str | None:
    raw = {key: {**options, "args": {name: value}} for key, options in GROUPS[group].items()}
    problems = [text for _, text in args_problems(raw)]
    return problems[0] if problems else None


def fields(group: str) -> dict[str, Any]:
    config = getattr(trl, "SFTConfig" if group == "iqlearn" else group)
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
    }


def accepted(group: str) -> set[str]:
    """Fields of a config that a recipe may set."""
    refused = "a recipe cannot set it"
    return {n for n, v in fields(group).items() if refused not in (problem(group, n, v) or "")}


@cache
def model(kind: str) -> PreTrainedModel:
    sizes = {"vocab_size": 320, "pad_token_id": 0, "initializer_range": 0.2}
    shape = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    configs = {
        "llama": lambda: LlamaConfig(**sizes, **shape),
        "mixtral": lambda: MixtralConfig(**sizes, **shape, num_local_experts=2),
        "gpt2": lambda: GPT2Config(**sizes, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5),
    }
    with seeded(0):
        return AutoModelForCausalLM.from_config(configs[kind]())


def result(group: str, args: Args, folder: Path, kind: str) -> dict[str, Any]:
    """What a training with these args leaves behind: weights, records and checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base, tokenizer = model(kind), cached_tokenizer()
    training = Training(folder, 1, torch.device("cpu"), run_name="r", label="r")
    both = {"prompt_ids": ROWS, "chosen_ids": SIDE, "rejected_ids": OTHER}
    pairs = Dataset.from_dict({**both, "rejected_prompt_ids": ROWS})
    with seeded(0):
        config = copy.deepcopy(base.config)  # trainers write to it
        trained = AutoModelForCausalLM.from_config(config)
        trained.load_state_dict(base.state_dict())
        if group == "SFTConfig":
            metrics = fit_sft(trained, tokenizer, sft_columns(ROWS, SIDE), args, training)
        elif group == "RewardConfig":
            trained.save_pretrained(folder / "start")
            reward = RewardModel.from_policy(folder / "start", tokenizer, RewardSettings(), 0)
            trained = reward.model
            metrics = fit_reward(reward, pair_columns(pairs), PairLoss(), args, training)
        else:
            logps = reference_logps([(1.0, trained.eval())], pairs)
            metrics = fit_implicit(
                trained, tokenizer, pairs, logps, args, training, at_reference=kind != "gpt2"
            )
    hook = getattr(trained.base_model, "_gradient_checkpointing_func", None)
    if hook is None:
        layers = [m for m in trained.modules() if hasattr(m, "_gradient_checkpointing_func")]
        hook = layers[0]._gradient_checkpointing_func if layers else None
    return {
        "weights": torch.cat([weight.detach().flatten() for weight in trained.parameters()]),
        "records": [
            sorted(record.keys() | {record["step"]}, key=str) for record in metrics["history"]
        ],
        "checkpoints": sorted(path.name for path in (folder / "scratch").glob("checkpoint-*")),
        "checkpointing": (trained.is_gradient_checkpointing, str(getattr(hook, "keywords", None))),
    }
