"""TRL's configs from a recipe's args: irl-align's own settings, and a check before any training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from irl_align.errors import UserError
from irl_align.models.batch_sharding import split_batch
from irl_align.models.trl import Training
from irl_align.utils import distributed
from irl_align.utils.hardware import use_bf16


def training_args(config_class: type, options: Mapping[str, Any], training: Training) -> Any:
    """A TRL config from a recipe's args and the settings that irl-align decides.

    Defaults differ from TRL's so that a CPU works out of the box: no bf16 on a CPU unless it is
    asked for and native, and no gradient checkpointing. Checkpoints are for resume: four per
    training, of which the last two are kept. The recipe's batch of a step is split among the
    processes. Raises UserError for args that TRL refuses, or a batch that cannot be split.
    """
    on_cpu = training.device.type == "cpu"
    merged: dict[str, Any] = {
        "gradient_checkpointing": False,
        "save_steps": 0.25,
        "save_total_limit": 2,
        "logging_steps": 10,
        **({"bf16": False, "dataloader_pin_memory": False} if on_cpu else {}),
        **options,
        "output_dir": str(training.work / "scratch"),
        "save_strategy": "steps",
        "seed": training.seed,
        "data_seed": training.seed,
        "report_to": list(training.report_to) or "none",
        "run_name": training.run_name or None,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "use_cpu": on_cpu,
        "max_length": None,  # tokenising has checked the rows against the limits
    }
    if merged.get("bf16") and not merged.get("fp16"):  # TRL refuses both together
        merged["bf16"] = use_bf16(True, on_cpu)
    if merged.get("fp16") and on_cpu:
        raise UserError(f"recipe: args of {config_class.__name__}: fp16 needs a GPU; use bf16")
    split = None
    if distributed.count() > 1:
        merged["average_tokens_across_devices"] = True  # as in one process
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        fields: Any = config_class.__dataclass_fields__  # type: ignore[attr-defined]
        rows, steps = (merged.get(name, fields[name].default) for name in names)
        split = split_batch(rows, steps, distributed.count(), config_class.__name__)
        merged |= dict(zip(names, (split.rows, split.steps), strict=True))
    try:
        args = config_class(**merged)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"recipe: args of {config_class.__name__}: {' '.join(str(error).split())}"
        ) from error
    args.batch_split = split
    return args


def check_args(args: Any) -> None:
    """Try the optimiser and the schedule of a TRL config on one weight, through 10 steps.

    Raises UserError: a package is missing, an argument is missing, unknown or out of range.
    """
    config = type(args).__name__
    try:
        model: Any = torch.nn.Linear(1, 1, bias=False, device=args.device)
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimiser = kind(kwargs.pop("params", model.parameters()), **kwargs)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimiser,
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
        getattr(optimiser, "train", lambda: None)()  # schedule-free optimisers have modes
        for _ in range(10):
            model(torch.ones(1, 1, device=args.device)).sum().backward()
            optimiser.step()
            schedule.step()
    except Exception as error:  # each optimiser and schedule raises its own kinds
        names = f"optim {args.optim.value}, lr_scheduler_type {args.lr_scheduler_type.value}"
        raise UserError(
            f"recipe: args of {config}: {names}: {' '.join(str(error).split())[:300]}"
        ) from error
    _check_optimiser_options(args)
    _check_losses(args)


def _check_optimiser_options(args: Any) -> None:
    """Raise UserError for an option that the chosen optimiser does not read."""
    model: Any = torch.nn.Linear(1, 1, bias=False)
    read = Trainer.get_optimizer_cls_and_kwargs(args, model)[1]
    fields = type(args).__dataclass_fields__
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"):
        value, default = getattr(args, name), fields[name].default
        if value == default:
            continue
        plain = copy.copy(args)
        setattr(plain, name, default)
        if Trainer.get_optimizer_cls_and_kwargs(plain, model)[1] == read:
            raise UserError(
                f"recipe: args of {type(args).__name__}: {name}: found {value!r}, but optim "
                f"{args.optim.value} does not read it; expected another optim, or no {name}"
            )


# Options of TRL's DPO that only some values of another option read.
_READ_BY = {
    "label_smoothing": ("loss_type", ("robust", "exo_pair", "aot", "aot_unpaired")),
    "discopop_tau": ("loss_type", ("discopop",)),
    "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
}


def _check_losses(args: Any) -> None:
    """Raise UserError for options of DPO's losses that nothing reads, or that contradict."""
    at = f"recipe: args of {type(args).__name__}"
    for name, (other, readers) in _READ_BY.items():
        chosen = getattr(args, other, None)
        used = {chosen} if isinstance(chosen, str) else set(chosen or ())
        if hasattr(args, name) and not used & set(readers):
            value, default = getattr(args, name), type(args).__dataclass_fields__[name].default
            if value != default:
                raise UserError(
                    f"{at}: {name}: found {value:g}, but only {other} {' or '.join(readers)} reads "
                    f"it; expected one of them, or no {name}"
                )
    alpha = getattr(args, "f_divergence_type", "") == "alpha_divergence"
    if alpha and args.f_alpha_divergence_coef == 1.0:
        raise UserError(
            f"{at}: f_alpha_divergence_coef: found 1, expected another number; the limit at 1 is "
            "f_divergence_type reverse_kl"
        )
