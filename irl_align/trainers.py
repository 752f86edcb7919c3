"""What our three uses of TRL's trainers share: settings, resume, progress, and a stop on NaN."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from irl_align.errors import UserError

# Batches of similar length waste no padding; recipes may choose another sampling strategy.
LENGTH_GROUPS = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
_DONE = "complete"  # marks a checkpoint whose every file is written


@dataclass(frozen=True)
class Training:
    """Where and how a trainer runs; the recipe's top-level options.

    work: the stage's folder; checkpoints go to work/scratch and are thrown away at the end.
    """

    work: Path
    seed: int
    device: torch.device
    report_to: tuple[str, ...] = ()
    run_name: str = ""
    label: str = "train"


def training_args(config_class: type, options: Mapping[str, Any], training: Training) -> Any:
    """A TRL config from a recipe's args, with what irl-align sets itself.

    Differs from TRL's defaults where a CPU must work out of the box: no bf16 on a CPU, and no
    gradient checkpointing. Checkpoints are for resume: four per training, the last two kept.
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
        "max_length": None,  # rows were checked against the limits when they were tokenised
    }
    try:
        return config_class(**merged)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"recipe: args of {config_class.__name__}: {' '.join(str(error).split())}"
        ) from error


class LengthGroups(LengthGroupedSampler):
    """transformers' batches of similar length, in an order that seed and epoch alone decide.

    Its own order comes from torch's global random numbers: a training that resumes in its second
    epoch would see the rows of the first epoch's order. Rows of one unit stay side by side.
    """

    def __init__(
        self,
        batch_size: int,
        lengths: list[int],
        seed: int,
        epoch: Callable[[], int],
        units: Sequence[int] | None = None,
    ) -> None:
        members: dict[int, list[int]] = {}
        for row, unit in enumerate(range(len(lengths)) if units is None else units):
            members.setdefault(unit, []).append(row)
        self.members = list(members.values())
        super().__init__(
            max(1, batch_size * len(self.members) // len(lengths)),
            lengths=[max(lengths[row] for row in unit) for unit in self.members],
            generator=torch.Generator(),
        )
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(hash((self.seed, self.epoch())) % 2**63)
        for unit in super().__iter__():
            yield from self.members[unit]


class Guarded:
    """Mixin before a Trainer: stops at a loss that is not finite; orders rows by epoch and seed."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Order of the rows: ours for batches of similar length, else the trainer's own."""
        trainer: Any = self
        args = trainer.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = trainer.train_dataset if train_dataset is None else train_dataset
        return LengthGroups(
            args.train_batch_size * args.gradient_accumulation_steps,
            list(rows[args.length_column_name]),
            args.data_seed,
            lambda: int(trainer.state.epoch or 0),
            list(rows["unit"]) if "unit" in rows.column_names else None,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step of the trainer below; raises UserError on a NaN or infinite loss."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise UserError(
                f"{self.args.run_name or 'training'}: the loss is {loss.item()} at step "  # type: ignore[attr-defined]
                f"{step}; lower learning_rate or max_grad_norm in the stage's args, or look for "
                "broken rows in the data"
            )
        return loss


class _Progress(ProgressCallback):
    """transformers' bar with the loss in it, instead of a printed dictionary per logged step."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label, refresh=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}", refresh=False)


class _MarkComplete(TrainerCallback):
    """Marks a checkpoint after its last file, so that a half-written one is never resumed.

    Logs before every checkpoint too: a mean over steps on both sides of it would be lost.
    """

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _DONE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below a folder; half-written ones are deleted."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _DONE).exists():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def run_trainer(trainer: Trainer, training: Training) -> dict[str, Any]:
    """Train from the last whole checkpoint, if there is one; returns the training's metrics."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress(training.label))
    trainer.add_callback(_MarkComplete())
    resume = last_checkpoint(training.work / "scratch")
    if resume is not None:
        logging.getLogger(__name__).info("%s: resuming from %s", training.label, resume.name)
    output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    history = trainer.state.log_history
    losses = [(record["step"], record["loss"]) for record in history if "loss" in record]
    starts = [0] + [step for step, _ in losses]
    metrics: dict[str, Any] = {
        "steps": output.global_step,
        # The output's own is of the steps since the resume.
        "train_loss": sum(
            (step - start) * loss for start, (step, loss) in zip(starts, losses, strict=False)
        )
        / output.global_step,
        "last_loss": losses[-1][1],
        "history": [
            {key: value for key, value in record.items() if isinstance(value, int | float)}
            for record in history
        ],
    }
    model: Any = trainer.model
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise UserError(
            f"{training.label}: training ended at step {output.global_step} with weights that are "
            "not finite; lower learning_rate in the stage's args"
        )
    return metrics


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer to a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def as_dataset(columns: Mapping[str, list[Any]], name: str) -> Dataset:
    """A dataset of equal columns; raises UserError when there are no rows."""
    if not next(iter(columns.values()), None):
        raise UserError(
            f"{name}: no rows are left to train on: no sample ended with EOS; raise "
            "generation.max_new_tokens, or train SFT for longer"
        )
    return Dataset.from_dict(dict(columns))


def sft_columns(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """Whole sequences, and labels that leave the prompt out of the loss."""
    rows = list(zip(prompts, completions, strict=True))
    return {
        "input_ids": [list(p) + list(c) for p, c in rows],
        "labels": [[-100] * len(p) + list(c) for p, c in rows],
        "length": [len(p) + len(c) for p, c in rows],
    }


def fit_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, list[Any]],
    options: Mapping[str, Any],
    training: Training,
) -> dict[str, Any]:
    """Train `model` in place on completions (see :func:`sft_columns`) with TRL's SFTTrainer.

    Returns training metrics. Every completion token counts once, EOS included.
    """
    args = training_args(
        SFTConfig,
        {**LENGTH_GROUPS, **options, "dataset_kwargs": {"skip_prepare_dataset": True}},
        training,
    )
    trainer = GuardedSFTTrainer(
        model=model,
        args=args,
        train_dataset=as_dataset(columns, training.label),
        processing_class=tokenizer,
    )
    metrics = run_trainer(trainer, training)
    model.eval()
    return metrics


class GuardedSFTTrainer(Guarded, SFTTrainer):
    """TRL's SFTTrainer that stops on a NaN."""
