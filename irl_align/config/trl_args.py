"""TRL's own options inside a recipe: which exist, which irl-align sets itself, and their types.

:func:`describe` gives a type in words, for messages and the table of options.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from irl_align.config.yaml import Loc, nearest, show

_CONFIGS = ("SFTConfig", "RewardConfig", "DPOConfig")

# Why a recipe's args cannot set a field of TRL's configs.
_RESERVED_BY_REASON = {
    "the run folder decides it; use the recipe's output_dir": "output_dir",
    "the run is named by the recipe's name": "run_name",
    "use the recipe's seed": "seed data_seed",
    "use the recipe's device": "use_cpu",
    "a loss that is not finite stops the run": "logging_nan_inf_filter",
    "use the recipe's report_to": "report_to",
    "use data.max_prompt_tokens and data.max_completion_tokens": "max_length truncation_mode",
    "use model.trust_remote_code": "trust_remote_code",
    "use model.chat_template": "chat_template_path",
    "use the options of model": "model_init_kwargs",
    "the tokenizer's own is used": "eos_token pad_token",
    "irl-align hands over token ids and their loss mask": (
        "completion_only_loss assistant_only_loss dataset_text_field dataset_kwargs "
        "dataset_num_proc remove_unused_columns label_names length_column_name shuffle_dataset"
    ),
    "rows are not packed: without flash attention they would see each other": (
        "packing packing_strategy eval_packing padding_free"
    ),
    "use reward.reference": (
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps precompute_ref_log_probs "
        "precompute_ref_batch_size"
    ),
    "a stage resumes by itself": (
        "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint "
        "enable_jit_checkpoint"
    ),
    "checkpoints are for resuming a stage; save_steps and save_total_limit are yours": (
        "save_strategy save_only_model save_on_each_node"
    ),
    "irl-align measures policies itself; see evaluation": (
        "do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start "
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "per_device_eval_batch_size prediction_loss_only batch_eval_metrics include_for_metrics "
        "bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model "
        "greater_is_better"
    ),
    "nothing is uploaded while a run trains": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision"
    ),
    "accelerate launch sets it; see docs/scaling.md": (
        "local_rank parallelism_config accelerator_config fsdp fsdp_config deepspeed ddp_backend "
        "ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph average_tokens_across_devices"
    ),
    "no loss reads it here; DPO has label_smoothing": "label_smoothing_factor",
    "irl-align calls the layers of a model, which a compiled model would not see": (
        "torch_compile torch_compile_backend torch_compile_mode"
    ),
    "TRL is removing it": "use_liger_kernel liger_kernel_config",
    "training never uses a cache": "use_cache",
    "a step's batch is that of the recipe on every machine": "auto_find_batch_size",
    "irl-align has its own log, progress bars and counts of tokens and memory": (
        "log_level log_level_replica log_on_each_node disable_tqdm skip_memory_metrics "
        "include_num_input_tokens_seen"
    ),
    "use the recipe's report_to, and the tracker's own settings": (
        "project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "it would outlast its stage; the recipe's seed makes runs repeatable": "full_determinism",
    "rows are token ids already; dataloader_num_workers is enough": (
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
        "dataloader_multiprocessing_context"
    ),
    "optimisers of projected gradients (GaLore, APOLLO) are not supported": "optim_target_modules",
    "a loss that is not finite stops a run": "debug",
}
RESERVED: dict[str, str] = {
    name: reason for reason, names in _RESERVED_BY_REASON.items() for name in names.split()
}

# Fields that some trainers of irl-align do not read, since a part of the trainer is its own.
_UNREAD: dict[str, dict[str, str]] = {
    "RewardConfig": {"pad_to_multiple_of": "pairs are packed into rows"},
    "DPOConfig": {
        "pad_to_multiple_of": "pairs are padded to the longest of their batch",
        "ld_alpha": "the reference's log-probs are summed before, over all tokens alike",
    },
    "iqlearn": dict.fromkeys(("loss_type", "router_aux_loss_coef"), "IQLearn has its own loss"),
}
# Types of fields that TRL itself gives too wide, and checks late or not at all.
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
_NARROWER: dict[tuple[str, str], Any] = {
    ("SFTConfig", "loss_type"): Literal["nll", "dft"],
    ("DPOConfig", "loss_type"): list[Literal[DPO_LOSSES]],  # type: ignore[valid-type]
    ("DPOConfig", "f_divergence_type"): Literal[
        "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"
    ],
    ("", "train_sampling_strategy"): Literal["random", "sequential", "group_by_length"],
    ("", "lr_scheduler_kwargs"): dict[str, Any] | None,
    ("", "gradient_checkpointing_kwargs"): dict[Literal["use_reentrant"], bool] | None,
    ("", "pad_to_multiple_of"): int | Literal["auto"] | None,
}
_LARGEST = 2**31 - 1  # of any number: larger ones overflow in torch

# Ranges that TRL does not check: other values fail late, or train nonsense.
_ABOVE_ZERO = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "beta",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "pad_to_multiple_of",
    "discopop_tau",
}
_AT_LEAST_ZERO = {
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "adam_epsilon",
    "label_smoothing",
    "dataloader_num_workers",
    "neftune_noise_alpha",
    "router_aux_loss_coef",
    "center_rewards_coefficient",
}


def trl_config(raw: dict[str, Any], group: str) -> str | None:
    """Name of the TRL config whose fields ``raw[group]["args"]`` holds; None if none.

    ``raw`` is a recipe as plain values, validated or not; ``group`` is sft, reward or
    policy_update.
    """
    options = raw.get(group)
    options = options if isinstance(options, dict) else {}
    if group == "sft":
        return "SFTConfig"
    if group == "reward":
        kind = options.get("kind", "explicit")
        return {"explicit": "RewardConfig", "implicit": "DPOConfig"}.get(str(kind))
    kind = options.get("kind", "best_of_n")
    if kind == "best_of_n":
        return {"sft": "SFTConfig", "dpo": "DPOConfig"}.get(str(options.get("use", "sft")))
    return "SFTConfig" if kind in ("sft", "iqlearn") else None


def args_problems(raw: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """(place, message) of each mistake in TRL's options, in a recipe of plain values."""
    for group in ("sft", "reward", "policy_update"):
        config = trl_config(raw, group)
        options = raw.get(group)
        if config is None or not isinstance(options, dict):
            continue  # the schema reports what is wrong
        args, schedule = options.get("args"), options.get("schedule")
        unread = _UNREAD.get("iqlearn" if options.get("kind") == "iqlearn" else config, {})
        for name, value in args.items() if isinstance(args, dict) else ():
            problem = _problem(config, name, value, unread)
            if problem:
                yield (group, "args", name), problem
        if group != "reward" or not isinstance(schedule, dict):
            continue
        for name, values in schedule.items():
            for i, value in enumerate(values if isinstance(values, list) else ()):
                problem = _problem(config, name, value, unread)
                if problem and name in _hints(config) and name not in RESERVED:
                    yield (group, "schedule", name, i), problem
                elif problem:  # the name is wrong: report it once
                    yield (group, "schedule", name), problem
                    break


def nearest_arg(config: str, word: str) -> str | None:
    """The field of ``trl.<config>`` that ``word`` may be a misspelling of."""
    return nearest(word, (name for name in _hints(config) if name not in RESERVED))


def describe(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words: ``integer above 0 or null``. ``metadata`` holds pydantic's constraints."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for extra in inner[1:]:
            metadata += tuple(extra.metadata) if isinstance(extra, FieldInfo) else (extra,)
        return describe(inner[0], metadata)
    if origin in (typing.Union, types.UnionType):
        parts = [describe(option) for option in inner if option is not type(None)]
        return " or ".join(parts + ["null"] * (type(None) in inner)) + _limits(metadata)
    if origin is Literal:
        return _one_of(list(inner))
    if origin is list:
        least = any(getattr(limit, "min_length", 0) for limit in metadata)
        return f"{'non-empty ' if least else ''}list of {describe(inner[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type):
        if issubclass(annotation, Enum):
            return _one_of([member.value for member in annotation])
        if issubclass(annotation, dict | BaseModel):
            return "mapping"
    words = {bool: "true or false", int: "integer", float: "number", str: "string", Any: "anything"}
    name = words.get(annotation) or str(getattr(annotation, "__name__", annotation))
    return name + _limits(metadata)


def _limits(metadata: tuple[Any, ...]) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{word} {_number(getattr(limit, name))}"
        for limit in metadata
        for name, word in words.items()
        if getattr(limit, name, None) is not None
    ]
    patterns = [limit.pattern for limit in metadata if getattr(limit, "pattern", None)]
    text = " and ".join(limits) + "".join(f"that matches {pattern}" for pattern in patterns)
    return f" {text}" if text else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _one_of(choices: list[Any]) -> str:
    if len(choices) == 1:
        return str(choices[0])
    names = ", ".join(map(str, choices[:12])) + (", ..." if len(choices) > 12 else "")
    return f"one of {names}"


@cache
def _hints(config: str) -> dict[str, Any]:
    """Field types of ``trl.<config>``. A union of an enum with a string counts as the enum."""
    import trl  # takes seconds, so it is imported only when a recipe has args

    cls = getattr(trl, config)
    hints = typing.get_type_hints(cls)
    return {
        field.name: _NARROWER.get((config, field.name))
        or _NARROWER.get(("", field.name))
        or _enum_or_type(hints[field.name])
        for field in dataclasses.fields(cls)
    }


def _enum_or_type(hint: Any) -> Any:
    enums = [t for t in typing.get_args(hint) if isinstance(t, type) and issubclass(t, Enum)]
    return enums[0] if enums else hint


@cache
def _adapter(config: str, name: str) -> TypeAdapter[Any] | None:
    hint = _hints(config)[name]
    if isinstance(hint, type) and issubclass(hint, Enum):
        hint = Literal[tuple(member.value for member in hint)]
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True))
    except PydanticUserError:  # pydantic cannot check this type
        return None


def _problem(config: str, name: str, value: Any, unread: Mapping[str, str]) -> str | None:
    """What is wrong with ``name: value`` as an option of ``trl.<config>``; None if it is right.

    unread: fields that this trainer does not read, with the reason.
    """
    if reason := RESERVED.get(name) or unread.get(name):
        return f"a recipe cannot set it: {reason}"
    hints = _hints(config)
    if name not in hints:
        guess = nearest_arg(config, name)
        hint = f"; did you mean {guess}?" if guess else ""
        owners = [other for other in _CONFIGS if name in _hints(other)]
        return f"no field of trl.{config}" + (f" but of trl.{owners[0]}" if owners else hint)
    adapter = _adapter(config, name)
    try:
        if adapter is not None:
            adapter.validate_python(value)
    except ValidationError:
        guess = nearest(value, _choices(hints[name])) if isinstance(value, str) else None
        hint = f"; did you mean {guess}?" if guess else ""
        return f"found {show(value)}, expected {describe(hints[name])}{hint}"
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and (limit := _beyond(name, number)):
            return f"found {show(number)}, expected {describe(hints[name])} {limit}"
    return None


def _beyond(name: str, number: float) -> str | None:
    """The limit of a field, in words, that a number is beyond; None if it is within it."""
    if not abs(number) <= _LARGEST:  # also NaN
        return f"of at most {_LARGEST}"
    if name == "max_steps" and number < 1 and number != -1:
        return "above 0, or -1 for no limit"
    if name in _ABOVE_ZERO and number <= 0:
        return "above 0"
    return "at least 0" if name in _AT_LEAST_ZERO and number < 0 else None


def _choices(hint: Any) -> list[str]:
    is_enum = isinstance(hint, type) and issubclass(hint, Enum)
    return [member.value for member in hint] if is_enum else []
