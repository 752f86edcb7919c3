"""Supervised fine-tuning on completions, with TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from irl_align.models.loading import save_model
from irl_align.models.sharding import copy_back, to_train
from irl_align.models.trl import (
    LENGTH_GROUPS,
    Guarded,
    Training,
    as_dataset,
    run_trainer,
)
from irl_align.models.trl_options import training_args

CHECKPOINT = "checkpoint"
"""Folder of the model that is kept before the end of a training."""


def sft_columns(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """Whole sequences of token ids, and labels that leave the prompt out of the loss."""
    rows = list(zip(prompts, completions, strict=True))
    return {
        "input_ids": [list(p) + list(c) for p, c in rows],
        "labels": [[-100] * len(p) + list(c) for p, c in rows],
        "length": [len(p) + len(c) for p, c in rows],
    }


def conversation_columns(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """Like sft_columns, but turns of a conversation share one sequence, whose loss they all have.

    A row joins the one before it if its prompt begins with that row's prompt and completion, so
    every completion token is predicted from the same ids as in a row of its own.
    """
    ids, labels = list[list[int]](), list[list[int]]()
    for prompt, completion in zip(prompts, completions, strict=True):
        if not ids or list(prompt[: len(ids[-1])]) != ids[-1]:
            ids.append([])
            labels.append([])
        rest = list(prompt[len(ids[-1]) :])
        ids[-1] += [*rest, *completion]
        labels[-1] += [*[-100] * len(rest), *completion]
    return {"input_ids": ids, "labels": labels, "length": list(map(len, ids))}


class GuardedSFTTrainer(Guarded, SFTTrainer):
    """TRL's SFTTrainer, which stops at a loss that is not finite."""


class _KeepCheckpoint(TrainerCallback):
    """Calls a function after a share of the steps, at least one.

    A checkpoint to resume from is written after that, so a resumed training has it already.
    """

    def __init__(self, share: float, keep: Callable[[], None]) -> None:
        self.share, self.keep = share, keep

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == max(1, round(self.share * state.max_steps)):
            self.keep()


def fit_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, list[Any]],
    options: Mapping[str, Any],
    training: Training,
    trainer_class: Callable[..., Trainer] = GuardedSFTTrainer,
    *,
    checkpoint: float | None = None,
) -> dict[str, Any]:
    """Train `model` in place on completions (see :func:`sft_columns`); returns training metrics.

    Every completion token counts once, EOS included. trainer_class: a trainer with another loss.
    checkpoint: share of the steps after which the model is also written to work/checkpoint.
    """
    args = training_args(
        SFTConfig,
        {**LENGTH_GROUPS, **options, "dataset_kwargs": {"skip_prepare_dataset": True}},
        training,
    )
    trained = to_train(model)
    trainer = trainer_class(
        model=trained,
        args=args,
        train_dataset=as_dataset(columns, training.label),
        processing_class=tokenizer,
    )

    def keep() -> None:
        copy_back(trained, model)
        save_model(model, tokenizer, training.work / CHECKPOINT)

    if checkpoint is not None:
        trainer.add_callback(_KeepCheckpoint(checkpoint, keep))
    metrics = run_trainer(trainer, training)
    copy_back(trained, model)
    model.eval()
    return metrics
