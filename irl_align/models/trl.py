"""What our three uses of TRL's trainers share: settings, resume, progress, and a stop on NaN."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler
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

from irl_align.data.columns import column
from irl_align.errors import UserError
from irl_align.models import lora
from irl_align.models.attention import short_attention
from irl_align.models.batch_sharding import (
    SHARE,
    BatchSplit,
    Collated,
    Pieces,
    PiecesLoader,
    Rows,
    divide,
)
from irl_align.models.sharding import copy_back, is_finite, reset_deepspeed, to_train
from irl_align.utils import distributed
from irl_align.utils.files import is_sealed, seal
from irl_align.utils.hardware import use_bf16

T = TypeVar("T")
# Batches of similar length waste no padding; recipes may choose another sampling strategy.
LENGTH_GROUPS = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
_TRAINED = "trained.safetensors"  # of a checkpoint of a model with adapters


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

    Differs from TRL's defaults where a CPU must work out of the box: no bf16 on a CPU unless asked
    for and more than emulated, and no gradient checkpointing. Checkpoints are for resume: four per
    training, the last two kept. The batch of a step is that of one process, divided among those
    that there are.
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
    if merged.get("bf16") and not merged.get("fp16"):  # both are refused below
        merged["bf16"] = use_bf16(True, on_cpu)
    how = None
    if distributed.count() > 1:
        merged["average_tokens_across_devices"] = True  # as in one process
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        fields: Any = config_class.__dataclass_fields__  # type: ignore[attr-defined]
        rows, steps = (merged.get(name, fields[name].default) for name in names)
        how = divide(rows, steps, distributed.count(), config_class.__name__)
        merged |= dict(zip(names, (how.rows, how.steps), strict=True))
    try:
        args = config_class(**merged)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"recipe: args of {config_class.__name__}: {' '.join(str(error).split())}"
        ) from error
    args.division = how
    return args


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


class Adapted:
    """Mixin before a Trainer: its checkpoints of a model with adapters hold what is trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with lora.kept_precision(kwargs["model"]):
            super().__init__(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        if not lora.has_adapter(trainer.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        folder = Path(output_dir or trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lora.save_trained(trainer.model, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        if not lora.has_adapter(trainer.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        lora.load_trained(trainer.model, Path(resume_from_checkpoint) / _TRAINED)


class Guarded(Adapted):
    """Mixin before a Trainer: stops at a loss that is not finite; orders rows by epoch and seed."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Order of the rows: ours for batches of similar length, else the trainer's own."""
        trainer: Any = self
        args = trainer.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = trainer.train_dataset if train_dataset is None else train_dataset
        whole: BatchSplit | None = args.division
        return LengthGroups(
            whole.batch if whole else args.train_batch_size * args.gradient_accumulation_steps,
            column(rows, args.length_column_name),
            args.data_seed,
            lambda: int(trainer.state.epoch or 0),
            column(rows, "unit") if "unit" in rows.column_names else None,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The trainer's own; of several processes each has its pieces of every step."""
        trainer: Any = self
        args = trainer.args
        if args.division is None:
            loader: DataLoader[Any] = super().get_train_dataloader()  # type: ignore[misc]
            return loader
        order = self._get_train_sampler()
        if isinstance(order, RandomSampler):  # as accelerate makes it in one process
            order = SeedableRandomSampler(order.data_source, data_seed=args.data_seed)
        rows, here = trainer.train_dataset, (distributed.rank(), distributed.count())
        pieces: Any = Pieces(order, len(rows), args.division, *here, args.dataloader_drop_last)
        collate: Any = Collated(trainer.data_collator)
        return PiecesLoader(
            Rows(rows),
            batch_sampler=pieces,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step of the trainer below; raises UserError on a NaN or infinite loss."""
        trainer: Any = self
        share = inputs.pop(SHARE, None)  # of one of several processes
        # In the trainer's state, which is in its checkpoints too.
        tokens = real_tokens(inputs)
        if share is not None:
            counted = torch.tensor(tokens if share else 0, device=trainer.args.device)
            tokens = int(distributed.total(counted))
        trainer.state.num_input_tokens_seen += tokens
        with self._shared(share):
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise UserError(
                f"{self.args.run_name or 'training'}: the loss is {loss.item()} at step "  # type: ignore[attr-defined]
                f"{step}; lower learning_rate or max_grad_norm in the stage's args, or look for "
                "broken rows in the data"
            )
        return loss

    @contextmanager
    def _shared(self, share: torch.Tensor | None) -> Iterator[None]:
        """Have the trainer multiply a loss that is a mean over rows by a batch's share of it.

        It divides such a loss by the number of micro-batches; one that is already a share of the
        step's sum over tokens it takes as it is.
        """
        if share is None:
            yield
            return
        trainer: Any = self
        steps = trainer.current_gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = steps / float(share) if share else math.inf
        yield
        trainer.current_gradient_accumulation_steps = steps


def inside_forward(model: Any, inner: Any, compute: Callable[[], T]) -> T:
    """compute(), a function of the model's layers, as the forward pass of what wraps the model.

    model: `inner`, or what a distributed engine has wrapped it in; its hooks gather the weights and
    reduce the gradients, and run in a forward pass alone. In one process there are none.
    """
    if distributed.count() == 1:
        return compute()
    before = vars(inner).get("forward")  # one that accelerate has put there, if any

    def once(*_: Any, **__: Any) -> T:
        if before is None:
            del inner.forward
        else:
            inner.forward = before
        return compute()

    inner.forward = once
    found: T = model()
    return found


def real_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch that are no padding: by its mask (B, L), or the rows of a packed one."""
    if "row" not in inputs:
        return int(inputs["attention_mask"].sum())
    ends: torch.Tensor = inputs["start"] + inputs["length"]  # (B,) where each completion ends
    rows = ends.new_zeros(len(inputs["input_ids"]))
    return int(rows.scatter_reduce(0, inputs["row"], ends, "amax").sum())


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


class _SealCheckpoints(TrainerCallback):
    """Seals a checkpoint after its last file: half written, damaged or not finite, none is resumed.

    Logs before every checkpoint too: a mean over steps on both sides of it would be lost.
    """

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        finite = is_finite(kwargs["model"])
        distributed.barrier()  # every process has written its part
        if finite and state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below a folder; half-written and damaged ones are deleted."""
    found = folder.glob("checkpoint-*")
    for checkpoint in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_sealed(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def run_trainer(trainer: Trainer, training: Training) -> dict[str, Any]:
    """Train from the last whole checkpoint, if there is one; returns the training's metrics."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress(training.label))
    trainer.add_callback(_SealCheckpoints())
    resume = distributed.on_main(lambda: last_checkpoint(training.work / "scratch"))
    if resume is not None:
        logging.getLogger(__name__).info("%s: resuming from %s", training.label, resume.name)
    with short_attention():
        output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    reset_deepspeed()
    history = trainer.state.log_history
    losses = [(record["step"], record["loss"]) for record in history if "loss" in record]
    starts = [0] + [step for step, _ in losses]
    metrics: dict[str, Any] = {
        "steps": output.global_step,
        "tokens_trained": trainer.state.num_input_tokens_seen,
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
    if not is_finite(model):
        raise UserError(
            f"{training.label}: training ended at step {output.global_step} with weights that are "
            "not finite; lower learning_rate in the stage's args"
        )
    return metrics


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), those of an adapter alone, config and tokenizer to a folder.

    Of several processes one writes.
    """
    if not distributed.is_main():
        return
    if lora.has_adapter(model):
        lora.save_adapter(model, folder)
    else:
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
    trainer_class: Callable[..., Trainer] | None = None,
) -> dict[str, Any]:
    """Train `model` in place on completions (see :func:`sft_columns`) with TRL's SFTTrainer.

    trainer_class: one with another loss. Returns training metrics. Every completion token counts
    once, EOS included.
    """
    args = training_args(
        SFTConfig,
        {**LENGTH_GROUPS, **options, "dataset_kwargs": {"skip_prepare_dataset": True}},
        training,
    )
    trained = to_train(model)
    trainer = (trainer_class or GuardedSFTTrainer)(
        model=trained,
        args=args,
        train_dataset=as_dataset(columns, training.label),
        processing_class=tokenizer,
    )
    metrics = run_trainer(trainer, training)
    copy_back(trained, model)
    model.eval()
    return metrics


class GuardedSFTTrainer(Guarded, SFTTrainer):
    """TRL's SFTTrainer that stops on a NaN."""
