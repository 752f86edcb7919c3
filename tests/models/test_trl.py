"""Trainings by TRL: bit-identical resume, order of rows, settings, and plain errors."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rows import random_ids, random_pairs, same_weights, save
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, RewardConfig, SFTConfig

from irl_align.errors import UserError
from irl_align.models.sft import fit_sft, sft_columns
from irl_align.models.trl import LengthGroups, Training, last_checkpoint
from irl_align.models.trl_options import training_args
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.losses import PairLoss
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.utils import hardware
from irl_align.utils.files import seal

MakeModel = Callable[[str], PreTrainedModel]
Fit = Callable[[Path], tuple[PreTrainedModel, dict[str, Any]]]
PROMPTS = random_ids(18, 1, 6, seed=1)
COMPLETIONS = random_ids(18, 1, 9, seed=2)
# 18 rows in batches of 2 x 2: five steps an epoch, the last of two rows, three epochs.
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "logging_steps": 4,
    "save_steps": 2,
}


def training(work: Path) -> Training:
    return Training(work, seed=11, device=torch.device("cpu"), run_name="run", label="SFT")


# --- resume ---------------------------------------------------------------------------------------


@pytest.fixture
def make_fit(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Fit]:
    """``make_fit(kind, **options)``: a training from the same start, in the folder it is given."""
    policy = save(tiny_model("llama"), tiny_tokenizer, tmp_path / "policy")
    pairs = random_pairs(18, seed=3)
    logps = reference_logps([(1.0, tiny_model("llama"))], pairs)

    def make(kind: str, **extra: Any) -> Fit:
        options = {**OPTIONS, **extra}

        def fit(work: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
            model = tiny_model("llama")
            if kind == "sft":
                columns = sft_columns(PROMPTS, COMPLETIONS)
                return model, fit_sft(model, tiny_tokenizer, columns, options, training(work))
            if kind == "implicit":
                arguments = (model, tiny_tokenizer, pairs, logps, options, training(work))
                return model, fit_implicit(*arguments, at_reference=True)
            settings = RewardSettings(lm_coef=0.5)  # with an output layer of its own
            reward = RewardModel.from_policy(policy, tiny_tokenizer, settings, seed=1)
            columns = pair_columns(pairs)
            metrics = fit_reward(reward, columns, PairLoss(), options, training(work))
            return reward.model, metrics

        return fit

    return make


class StopAt(TrainerCallback):
    """A kill after the save that follows some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(fit: Fit, work: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `fit` until `step` steps are done, then kill it."""
    whole = Trainer.train

    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(StopAt(step))
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        with pytest.raises(KeyboardInterrupt):
            fit(work)


def curve(metrics: dict[str, Any]) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics["history"] if "loss" in r]


@pytest.mark.parametrize("kind", ["sft", "reward", "implicit"])
def test_training_resumes_bit_identical_after_kills(
    kind: str, make_fit: Callable[..., Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = make_fit(kind)
    whole, metrics = fit(tmp_path / "whole")
    assert metrics["steps"] == 15
    work = tmp_path / "killed"
    interrupted(fit, work, 7, monkeypatch)  # in the second epoch; resumes from step 6
    half = work / "scratch" / "checkpoint-8"  # a save that was interrupted has no seal
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    interrupted(fit, work, 11, monkeypatch)  # in the third; resumes from step 10, its start
    resumed, again = fit(work)
    assert curve(again) == curve(metrics)
    assert same_weights(resumed, whole)
    for name in ("steps", "train_loss", "last_loss"):
        assert again[name] == metrics[name], name


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_training_resumes_bit_identical_in_the_trainers_own_orders(
    strategy: str, make_fit: Callable[..., Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = make_fit("sft", train_sampling_strategy=strategy)
    whole, _ = fit(tmp_path / "whole")
    interrupted(fit, tmp_path / "killed", 7, monkeypatch)
    assert same_weights(fit(tmp_path / "killed")[0], whole)


def test_a_finished_training_is_not_continued(make_fit: Callable[..., Fit], tmp_path: Path) -> None:
    fit = make_fit("sft", num_train_epochs=1)
    whole, metrics = fit(tmp_path)
    again, repeated = fit(tmp_path)
    assert same_weights(again, whole)
    assert (repeated["steps"], repeated["train_loss"]) == (metrics["steps"], metrics["train_loss"])


def test_last_checkpoint_is_the_newest_complete_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "missing") is None
    for step, whole in ((9, True), (10, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            seal(tmp_path / f"checkpoint-{step}")
    (tmp_path / "other").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9", "other"]


def test_training_keeps_two_checkpoints(make_fit: Callable[..., Fit], tmp_path: Path) -> None:
    make_fit("sft", num_train_epochs=2)(tmp_path)
    kept = sorted(p.name for p in (tmp_path / "scratch").glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-8"]


def test_length_groups_order_depends_on_seed_and_epoch_only() -> None:
    lengths = [len(row) for row in random_ids(200, 1, 40, seed=4)]
    now = [0]
    sampler = LengthGroups(4, lengths, seed=7, epoch=lambda: now[0])
    first = list(sampler)
    torch.rand(3)  # torch's global numbers do not matter
    assert list(sampler) == first
    assert sorted(first) == list(range(200))
    now[0] = 1
    assert list(sampler) != first
    other = LengthGroups(4, lengths, seed=8, epoch=lambda: 0)
    assert list(other) != first

    # Batches are of similar length: far less padding than in the rows' own order.
    def padding(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[n : n + 4]] for n in range(0, 200, 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    assert padding(first) < padding(list(range(200))) / 3


def test_length_groups_keep_rows_of_one_unit_together() -> None:
    units = [0, 1, 0, 2, 1, 2, 2, 3]
    sampler = LengthGroups(4, [3, 9, 3, 5, 9, 5, 5, 7], seed=7, epoch=lambda: 0, units=units)
    order = list(sampler)
    assert len(sampler) == 8
    assert sorted(order) == list(range(8))
    assert [unit for unit, _ in itertools.groupby(units[row] for row in order)] == list(
        dict.fromkeys(units[row] for row in order)
    )


def test_length_groups_order_differs_between_epochs(
    make_fit: Callable[..., Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, plain = [], LengthGroups.__iter__

    def watched(self: LengthGroups) -> Any:
        orders.append(tuple(plain(self)))
        return iter(orders[-1])

    monkeypatch.setattr(LengthGroups, "__iter__", watched)
    make_fit("sft")(tmp_path)
    assert [sorted(order) for order in orders] == [list(range(18))] * 3
    assert len(set(orders)) == 3


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, DPOConfig])
def test_training_args_take_the_options_except_our_own_settings(
    config: type, tmp_path: Path
) -> None:
    options = {"learning_rate": 3e-4, "save_steps": 7, "weight_decay": 0.125, "seed": 99}
    args = training_args(config, options, training(tmp_path))
    assert (args.learning_rate, args.save_steps, args.weight_decay) == (3e-4, 7, 0.125)
    assert (args.seed, args.data_seed) == (11, 11)
    assert args.output_dir == str(tmp_path / "scratch")
    assert (args.use_cpu, args.bf16, args.gradient_checkpointing) == (True, False, False)
    assert args.max_length is None
    assert args.report_to == []
    assert str(args.save_strategy.value) == "steps"


@pytest.mark.parametrize("native", [True, False])
def test_training_args_turn_off_bf16_on_a_cpu_that_emulates_it(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: native)
    with caplog.at_level(logging.WARNING, "irl_align"):
        for config in (SFTConfig, RewardConfig, DPOConfig):
            assert training_args(config, {"bf16": True}, training(tmp_path)).bf16 is native
    logged = [record.getMessage() for record in caplog.records]
    # At most one warning in a process: an earlier test may have caused it.
    assert len(logged) <= (not native) and all("computes in float32" in line for line in logged)
    assert hardware.use_bf16(True, on_cpu=False) and not hardware.use_bf16(False, on_cpu=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"optim": "adamm"}, "adamm"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"bf16": True, "fp16": True}, "fp16"),
    ],
)
def test_training_args_that_trl_refuses_are_a_user_error(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"recipe: args of SFTConfig: .*{named}"):
        training_args(SFTConfig, options, training(tmp_path))
