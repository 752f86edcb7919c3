"""The fit of the explicit reward, and its report."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.rows import plain_logps, random_pairs, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import RewardConfig

from irl_align.errors import UserError
from irl_align.models.packing import can_pack
from irl_align.models.trl import Training, as_dataset
from irl_align.models.trl_options import training_args
from irl_align.reward.fit import (
    PairCollator,
    PairRewardTrainer,
    fit_reward,
    margin_report,
    margins,
    order_columns,
    pair_columns,
)
from irl_align.reward.forward import score_head
from irl_align.reward.losses import PairLoss
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.utils.statistics import clustered_share

MakeModel = Callable[[str], PreTrainedModel]
BATCH = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}


@pytest.fixture
def reward(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., RewardModel]:
    """``reward(arch, **settings)``: a fresh reward on a tiny policy."""

    def make(arch: str = "llama", **options: Any) -> RewardModel:
        folder = save(tiny_model(arch), tiny_tokenizer, tmp_path / f"policy-{arch}")
        return RewardModel.from_policy(folder, tiny_tokenizer, RewardSettings(**options), seed=1)

    return make


def training(work: Path) -> Training:
    return Training(work, seed=0, device=torch.device("cpu"), run_name="irl", label="reward 0")


def plain_rewards(
    reward: RewardModel, policy: PreTrainedModel, pairs: Dataset
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (B,) of both sides, one unpadded row at a time, differentiable in the reward."""
    settings, sides = reward.settings, []
    for prompts, completions in (
        ("prompt_ids", "chosen_ids"),
        ("rejected_prompt_ids", "rejected_ids"),
    ):
        rows = []
        for prompt, completion in zip(pairs[prompts], pairs[completions], strict=True):
            ids = torch.tensor([prompt + completion])
            value = reward.model(input_ids=ids).logits[0, 0]
            if settings.lm_coef:
                value = value + settings.lm_coef * plain_logps(policy, prompt, completion).mean()
            if settings.bound is not None:
                value = settings.bound * torch.tanh(value / settings.bound)
            rows.append(value)
        sides.append(torch.stack(rows))
    return sides[0], sides[1]


# --- columns and batches --------------------------------------------------------------------------


def test_order_columns_keep_pairs_of_a_row_together() -> None:
    """Two pairs of one prompt share a row; contrast is as long as its longer side; without sharing
    every pair is."""
    columns = {
        "prompt_ids": [[1, 2], [1, 2], [1, 2]],
        "chosen_ids": [[3, 4, 5], [3, 4], [3, 4, 5]],
        "rejected_prompt_ids": [[1, 2], [1, 2], [1, 2, 6, 7]],
        "rejected_ids": [[6], [7, 8, 9], [3, 4, 5]],
    }
    shared, single = (order_columns(columns, share) for share in (True, False))
    assert shared["unit"][0] == shared["unit"][1] != shared["unit"][2]
    assert shared["length"] == [2 + 3 + 1 + 2 + 3] * 2 + [4 + 3]
    assert len(set(single["unit"])) == 3 and single["length"] == [2 + 3, 2 + 3, 4 + 3]


def test_pair_columns_and_collator_by_hand() -> None:
    pairs = Dataset.from_dict(
        {
            "prompt_ids": [[10, 11], [12]],
            "chosen_ids": [[13, 2], [14, 15, 2]],
            "rejected_prompt_ids": [[10, 11], [10, 11]],
            "rejected_ids": [[16], [13, 2]],
        }
    )
    columns = pair_columns(pairs, weight=0.5)
    assert columns == {**pairs.to_dict(), "weight": [0.5, 0.5], "offset": [0.0, 0.0]}
    rows = [{name: values[i] for name, values in columns.items()} for i in range(2)]
    batch = PairCollator(0, share=True)(rows)
    # Three sequences: the second pair's rejected one is the first pair's preferred one.
    assert batch["input_ids"].tolist() == [[10, 11, 13, 2, 16], [12, 14, 15, 2, 0]]
    assert batch["start"].tolist() == [2, 4, 1]
    assert batch["slot"].tolist() == [0, 2, 1, 0]
    assert batch["weight"].tolist() == [0.5, 0.5]
    plain = PairCollator(0, share=False)(rows)
    assert plain["input_ids"].tolist() == [[10, 11, 13, 2], [12, 14, 15, 2], [10, 11, 16, 0]]
    assert plain["attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 1, 1, 0]]
    assert plain["slot"].tolist() == [0, 1, 2, 0]


# --- the loss -------------------------------------------------------------------------------------


def batch_loss(
    reward: RewardModel,
    pairs: Dataset,
    weights: list[float],
    loss: str,
    work: Path,
    beta: float = 1.0,
    **options: Any,
) -> tuple[torch.Tensor, PairRewardTrainer]:
    """The trainer's loss of all pairs in one batch."""
    columns = {**pair_columns(pairs), "weight": weights}
    dataset = as_dataset(columns, "test")
    collator = PairCollator(reward.tokenizer.pad_token_id, can_pack(reward.model, 40))
    trainer = PairRewardTrainer(
        model=reward.model,
        args=training_args(RewardConfig, options, training(work)),
        data_collator=collator,
        train_dataset=dataset,
        processing_class=reward.tokenizer,
        settings=reward.settings,
        loss=PairLoss(loss, beta),
    )
    return trainer.compute_loss(reward.model, collator(list(dataset))), trainer


def with_one_prompt(pairs: Dataset) -> Dataset:
    """The pairs, the first three of one prompt and the first two of one demonstration."""
    columns = pairs.to_dict()
    for name in ("prompt_ids", "rejected_prompt_ids"):
        columns[name][:3] = [columns["prompt_ids"][0]] * 3
    columns["chosen_ids"][1] = columns["chosen_ids"][0]
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("bradley_terry", {}),
        ("bradley_terry", {"lm_coef": 2.0}),
        ("linear", {"bound": 1.5}),
        ("linear", {"bound": 1.5, "lm_coef": 0.5}),
    ],
)
def test_compute_loss_and_its_gradient(
    shared: bool,
    arch: str,
    loss: str,
    options: dict,
    reward: Callable[..., RewardModel],
    tiny_model: MakeModel,
    tmp_path: Path,
) -> None:
    weights = [1.0, 0.25, 1.0, 3.0]
    pairs = with_one_prompt(random_pairs(4, seed=3)) if shared else random_pairs(4, seed=3)
    ours = reward(arch, **options)
    offsets, beta = ([0.5, -0.25, 0.0, 2.0], 0.5) if loss == "bradley_terry" else ([0.0] * 4, 1.0)
    pairs = pairs.add_column("offset", offsets)
    got, trainer = batch_loss(ours, pairs, weights, loss, tmp_path, beta)
    chosen, rejected = plain_rewards(ours, tiny_model(arch), pairs)
    margin = (chosen - rejected).double() / beta - torch.tensor(offsets)
    each = torch.log(1 + torch.exp(-margin)) if loss == "bradley_terry" else -margin
    expected = (each * torch.tensor(weights)).sum() / 5.25
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logged["accuracy"] == float((margin > 0).double().mean())
    assert logged["margin"] == pytest.approx(float(margin.detach().mean()), abs=1e-5)
    if "lm_coef" not in options:  # there the backbone's gradient goes through the output layer too
        head = score_head(ours.model).weight
        (mine,) = torch.autograd.grad(got, head)
        (theirs,) = torch.autograd.grad(expected, head)
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_compute_loss_with_lm_coef_trains_the_backbone(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    pairs = random_pairs(4, seed=3)
    ours = reward("qwen3", lm_coef=2.0)
    score_head(ours.model).weight.data.zero_()  # the head gives nothing and passes nothing down
    loss, _ = batch_loss(ours, pairs, [1.0] * 4, "bradley_terry", tmp_path)
    loss.backward()
    gradient = ours.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.abs().max().item() > 1e-3


def test_compute_loss_adds_trls_centring_term(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    pairs, ours = random_pairs(4, seed=3), reward()
    plain, _ = batch_loss(ours, pairs, [1.0] * 4, "bradley_terry", tmp_path)
    centred, _ = batch_loss(
        ours, pairs, [1.0] * 4, "bradley_terry", tmp_path, center_rewards_coefficient=0.1
    )
    chosen, rejected = plain_rewards(ours, ours.model, pairs)
    extra = 0.1 * ((chosen + rejected) ** 2).mean().item()
    assert extra > 1e-3
    assert centred.item() - plain.item() == pytest.approx(extra, abs=1e-5)


# --- the fit --------------------------------------------------------------------------------------


def toy_pairs(count: int, seed: int) -> Dataset:
    """Preferred completions repeat the prompt's token, rejected ones have another; all finished."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        wanted, other = draw.sample(range(3, 11), 2)
        prompt = [wanted]
        rows.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": [draw.randrange(30, 60), wanted, 2],
                "rejected_prompt_ids": prompt,
                "rejected_ids": [draw.randrange(30, 60), other, 2],
            }
        )
    return Dataset.from_list(rows)


@pytest.mark.parametrize(("loss", "options"), [("bradley_terry", {}), ("linear", {"bound": 4.0})])
def test_fit_reward_learns_a_separable_relation(
    loss: str, options: dict, reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    # Neither side's tokens alone separate them: the reward must compare with the prompt.
    ours, held_out = reward(**options), toy_pairs(200, seed=2)
    before = margin_report(margins(ours, held_out), [""] * len(held_out))
    args = {**BATCH, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "max_steps": 100}
    columns = pair_columns(toy_pairs(600, seed=1))
    metrics = fit_reward(ours, columns, PairLoss(loss), args, training(tmp_path))
    report = margin_report(margins(ours, held_out), [""] * len(held_out))
    assert before["accuracy"] < 0.65
    assert report["accuracy"] > 0.95
    assert metrics["steps"] == 100
    assert not ours.model.training
    steps = [record["step"] for record in metrics["history"] if "accuracy" in record]
    assert set(range(10, 101, 10)) <= set(steps)


def test_fit_reward_ignores_rows_without_weight(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    pairs, swapped = toy_pairs(4, seed=1), toy_pairs(4, seed=9)
    columns, others = pair_columns(pairs), pair_columns(swapped, weight=0.0)
    ours, alone = reward(), reward()
    args = {**BATCH, "learning_rate": 1e-3, "max_steps": 3}
    both = {name: columns[name] + others[name] for name in columns}
    fit_reward(ours, both, PairLoss(), args, training(tmp_path / "both"))
    fit_reward(alone, columns, PairLoss(), args, training(tmp_path / "alone"))
    for mine, theirs in zip(ours.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


def test_fit_reward_stops_at_a_loss_that_is_not_finite(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    args = {**BATCH, "learning_rate": 1e30, "max_steps": 5}
    with pytest.raises(UserError, match=r"irl: the loss is (nan|inf) at step 2; lower learning_ra"):
        fit_reward(reward(), pair_columns(toy_pairs(16, 1)), PairLoss(), args, training(tmp_path))


def test_fit_reward_refuses_weights_broken_by_the_last_step(
    reward: Callable[..., RewardModel], tmp_path: Path
) -> None:
    args = {**BATCH, "learning_rate": 1e39, "max_steps": 1}
    with pytest.raises(UserError, match="reward 0: training ended at step 1 with weights that are"):
        fit_reward(reward(), pair_columns(toy_pairs(16, 1)), PairLoss(), args, training(tmp_path))


def test_fit_reward_refuses_no_pairs(reward: Callable[..., RewardModel], tmp_path: Path) -> None:
    columns = pair_columns(toy_pairs(1, 1).select([]))
    with pytest.raises(UserError, match="reward 0: no rows are left"):
        fit_reward(reward(), columns, PairLoss(), {}, training(tmp_path))


# --- the report -----------------------------------------------------------------------------------


class Lookup:
    """A reward function from a table, by whole sequence."""

    def __init__(self, table: dict[tuple[int, ...], float]) -> None:
        self.table = table

    def score_ids(self, prompts: Any, completions: Any) -> torch.Tensor:
        rows = zip(prompts, completions, strict=True)
        return torch.tensor([self.table[(*p, *c)] for p, c in rows])

    def prefix_scores_ids(self, prompts: Any, completions: Any) -> list[torch.Tensor]:
        raise NotImplementedError


def test_margins_score_each_side_on_its_own_prompt() -> None:
    pairs = Dataset.from_dict(
        {
            "prompt_ids": [[5], [5]],
            "chosen_ids": [[6], [7]],
            "rejected_prompt_ids": [[5], [9]],
            "rejected_ids": [[8], [7]],
        }
    )
    table = Lookup({(5, 6): 2.0, (5, 7): 0.5, (5, 8): 1.0, (9, 7): 1.5})
    assert margins(table, pairs).tolist() == [1.0, -1.0]


def test_margin_report_by_hand() -> None:
    margin = torch.tensor([math.log(3), 0.0, -math.log(3), math.log(3)])
    report = margin_report(margin, ["a", "a", "b", "b"])
    assert report.pop("calibration_error") == pytest.approx(
        # ten bins of one pair: |0.5 - 0.5|, then 0.75 against 1, 0 and 1
        (0.0 + 0.25 + 0.75 + 0.25) / 4,
        abs=1e-6,
    )
    share = clustered_share([1.0, 0.5, 0.0, 1.0], ["a", "a", "b", "b"])
    assert report.pop("accuracy_interval") == [share.low, share.high]
    assert report == pytest.approx(
        {
            "pairs": 4,
            "prompts": 2,
            "accuracy": 2.5 / 4,
            "margin": math.log(3) / 4,
            "loss": (2 * math.log(4 / 3) + math.log(2) + math.log(4)) / 4,
        },
        abs=1e-6,
    )
    assert margin_report(torch.zeros(0), []) == {"pairs": 0}
    assert margin_report(torch.ones(3), ["a"] * 3)["accuracy_interval"] == [None, None]
