"""What all uses of TRL's trainers share: settings, resume, progress, and a stop on NaN."""

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
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from irl_align.data.columns import column
from irl_align.errors import UserError
from irl_align.models.attention import short_attention
from irl_align.models.batch_sharding import (
    FACTOR,
    BatchSplit,
    PieceCollator,
    PieceDataset,
    PieceLoader,
    PieceSampler,
)
from irl_align.models.lora import has_adapter, kept_precision, load_trained, save_trained
from irl_align.models.sharding import is_finite, reset_deepspeed
from irl_align.utils import distributed
from irl_align.utils.files import is_sealed, seal

T = TypeVar("T")
# Batches of similar length waste no padding; recipes may choose another sampling strategy.
LENGTH_GROUPS = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
_TRAINED = "trained.safetensors"  # in a checkpoint of a model with adapters


@dataclass(frozen=True)
class Training:
    """Where and how a trainer runs; the recipe's top-level options.

    work: the stage's folder; checkpoints go to work/scratch, which is deleted at the end.
    """

    work: Path
    seed: int
    device: torch.device
    report_to: tuple[str, ...] = ()
    run_name: str = ""
    label: str = "train"
    tensorboard: Path | None = None
    """Folder of TensorBoard's events, if report_to names it."""


class LengthGroups(Sampler[int]):
    """transformers' batches of similar length, in an order that depends only on seed and epoch.

    transformers draws the order from torch's global random numbers: a training that resumes in its
    second epoch would see the rows in the first epoch's order. Rows of one unit stay adjacent.

    batch_size: rows of a step. lengths: tokens of each row. epoch: returns the current epoch.
    units: the unit of each row; by default every row is its own.
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
        self.generator = torch.Generator()
        self.units: Any = LengthGroupedSampler(
            max(1, batch_size * len(self.members) // len(lengths)),
            lengths=[max(lengths[row] for row in unit) for unit in self.members],
            generator=self.generator,
        )
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(hash((self.seed, self.epoch())) % 2**63)
        for unit in self.units:
            yield from self.members[unit]


class Guarded:
    """Mixin before a Trainer, for what all our trainings need.

    It stops at a loss that is not finite, orders rows by epoch and seed, splits batches among
    processes, and saves only the trained weights in checkpoints of models with adapters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs["args"]
        try:
            with kept_precision(kwargs["model"]):
                super().__init__(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # options that do not fit the model or the device
            raise UserError(
                f"{config.run_name or 'recipe'}: args of {type(config).__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        if not has_adapter(trainer.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        folder = Path(output_dir or trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(trainer.model, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        if not has_adapter(trainer.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        load_trained(trainer.model, Path(resume_from_checkpoint) / _TRAINED)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """The order of the rows: ours for batches of similar length, otherwise the trainer's."""
        trainer: Any = self
        args = trainer.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = trainer.train_dataset if train_dataset is None else train_dataset
        split: BatchSplit | None = args.batch_split
        return LengthGroups(
            split.batch if split else args.train_batch_size * args.gradient_accumulation_steps,
            column(rows, args.length_column_name),
            args.data_seed,
            lambda: int(trainer.state.epoch or 0),
            column(rows, "unit") if "unit" in rows.column_names else None,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The trainer's own loader; with several processes, this one's pieces of every step.

        Raises UserError: no batch is full, and dataloader_drop_last drops the others.
        """
        trainer: Any = self
        args = trainer.args
        whole = args.batch_split is None
        loader = super().get_train_dataloader() if whole else self._pieces()  # type: ignore[misc]
        if not len(loader):
            raise UserError(
                f"{args.run_name or 'training'}: dataloader_drop_last leaves no batch of "
                f"{len(trainer.train_dataset)} rows; lower per_device_train_batch_size"
            )
        return loader

    def _pieces(self) -> DataLoader[Any]:
        trainer: Any = self
        args = trainer.args
        order = self._get_train_sampler()
        if isinstance(order, RandomSampler):  # as accelerate makes it in one process
            order = SeedableRandomSampler(order.data_source, data_seed=args.data_seed)
        rows = trainer.train_dataset
        sampler: Any = PieceSampler(
            order,
            len(rows),
            args.batch_split,
            rank=distributed.rank(),
            processes=distributed.count(),
            drop_last=args.dataloader_drop_last,
        )
        collate: Any = PieceCollator(trainer.data_collator)
        return PieceLoader(
            PieceDataset(rows),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step of the trainer below; raises UserError on a NaN or infinite loss."""
        trainer: Any = self
        factor = inputs.pop(FACTOR, None)  # only with several processes
        tokens = real_tokens(inputs)
        if factor is not None:
            counted = torch.tensor(tokens if factor else 0, device=trainer.args.device)
            tokens = int(distributed.total(counted))
        trainer.state.num_input_tokens_seen += tokens  # checkpoints save this state
        with self._loss_scaled(factor):
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise UserError(
                f"{trainer.args.run_name or 'training'}: the loss is {loss.item()} at step "
                f"{trainer.state.global_step + 1}; lower learning_rate or max_grad_norm in the "
                "stage's args, or look for broken rows in the data"
            )
        return loss

    @contextmanager
    def _loss_scaled(self, factor: torch.Tensor | None) -> Iterator[None]:
        """Have the trainer multiply a loss that is a mean over rows by a piece's factor.

        The trainer divides such a loss by the number of micro-batches. A loss that is already a
        share of the step's sum over tokens is not divided, and needs no factor.
        """
        if factor is None:
            yield
            return
        trainer: Any = self
        steps = trainer.current_gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = steps / float(factor) if factor else math.inf
        yield
        trainer.current_gradient_accumulation_steps = steps


def inside_forward(model: Any, inner: Any, compute: Callable[[], T]) -> T:
    """Run compute(), a function of the model's layers, as the forward pass of the wrapped model.

    model: `inner`, or a distributed engine's wrapper of it. The wrapper's hooks gather the weights
    and reduce the gradients, and run only in a forward pass. One process has no wrapper.
    """
    if distributed.count() == 1:
        return compute()
    previous = vars(inner).get("forward")  # accelerate may have set one

    def once(*_: Any, **__: Any) -> T:
        if previous is None:
            del inner.forward
        else:
            inner.forward = previous
        return compute()

    inner.forward = once
    result: T = model()
    return result


def real_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch without padding: by its mask (B, L), or by the rows of a packed batch."""
    if "row" not in inputs:
        return int(inputs["attention_mask"].sum())
    ends: torch.Tensor = inputs["start"] + inputs["length"]  # (B,) end of each completion
    rows = ends.new_zeros(len(inputs["input_ids"]))
    return int(rows.scatter_reduce(0, inputs["row"], ends, "amax").sum())


class _Progress(ProgressCallback):
    """transformers' progress bar with the loss in it, in place of printed dictionaries."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        untyped: Any = super()
        untyped.on_train_begin(args, state, control, **kwargs)
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
    """Seals a checkpoint after its last file, so that no incomplete or NaN checkpoint is resumed.

    It also logs before every checkpoint: otherwise a resume would lose a mean over steps on both
    sides of it.
    """

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        finite = is_finite(kwargs["model"])
        distributed.barrier()  # until every process has written its part
        if finite and state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; newer ones that are damaged are deleted."""
    checkpoints = folder.glob("checkpoint-*")
    for checkpoint in sorted(checkpoints, key=lambda path: -int(path.name.split("-")[1])):
        if is_sealed(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def run_trainer(trainer: Trainer, training: Training) -> dict[str, Any]:
    """Train from the last complete checkpoint, if there is one; returns the training's metrics.

    Raises UserError where the trained weights are not finite.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and training.tensorboard is not None:
            callback.logging_dir = str(training.tensorboard)
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
        # output.training_loss covers only the steps since the resume.
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


def as_dataset(columns: Mapping[str, list[Any]], name: str) -> Dataset:
    """A dataset of columns of equal length. Raises UserError when there are no rows."""
    if not next(iter(columns.values()), None):
        raise UserError(
            f"{name}: no rows are left to train on: no sample ended with EOS; raise "
            "generation.max_new_tokens, or train SFT for longer"
        )
    return Dataset.from_dict(dict(columns))
