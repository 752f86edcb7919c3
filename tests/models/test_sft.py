"""SFT: only completions count in the loss, and errors are plain."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.rows import plain_logps, random_ids, same_weights
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.errors import UserError
from irl_align.models.loading import load_model
from irl_align.models.sft import CHECKPOINT, fit_sft, sft_columns
from irl_align.models.trl import Training

MakeModel = Callable[[str], PreTrainedModel]
PROMPTS = random_ids(18, 1, 6, seed=1)
COMPLETIONS = random_ids(18, 1, 9, seed=2)


def training(work: Path) -> Training:
    return Training(work, seed=11, device=torch.device("cpu"), run_name="run", label="SFT")


def test_sft_columns_leave_the_prompt_out_of_the_loss() -> None:
    assert sft_columns([[5, 6], [7]], [[8, 2], [9, 9, 2]]) == {
        "input_ids": [[5, 6, 8, 2], [7, 9, 9, 2]],
        "labels": [[-100, -100, 8, 2], [-100, 9, 9, 2]],
        "length": [4, 4],
    }


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_fit_sft_loss_is_the_mean_over_completion_tokens(
    arch: str,
    accumulate: int,
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    # One step, all rows: however they are split, each completion token counts once.
    model = tiny_model(arch)
    with torch.no_grad():
        each = torch.cat(
            [plain_logps(model, p, c) for p, c in zip(PROMPTS[:6], COMPLETIONS[:6], strict=True)]
        )
    options = {
        "per_device_train_batch_size": 6 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 1,
        "learning_rate": 0.0,
    }
    columns = sft_columns(PROMPTS[:6], COMPLETIONS[:6])
    metrics = fit_sft(model, tiny_tokenizer, columns, options, training(tmp_path))
    assert metrics["last_loss"] == pytest.approx(-each.mean().item(), abs=2e-5)
    assert not model.training


def test_fit_sft_with_dft_weighs_each_token_by_its_probability(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        each = torch.cat(
            [plain_logps(model, p, c) for p, c in zip(PROMPTS[:6], COMPLETIONS[:6], strict=True)]
        )
    options = {"per_device_train_batch_size": 6, "max_steps": 1, "learning_rate": 0.0}
    columns = sft_columns(PROMPTS[:6], COMPLETIONS[:6])
    dft = {**options, "loss_type": "dft"}
    metrics = fit_sft(model, tiny_tokenizer, columns, dft, training(tmp_path))
    expected = -(each.exp() * each).mean().item()  # arXiv:2508.05629
    assert metrics["last_loss"] == pytest.approx(expected, abs=2e-5)


def test_fit_sft_with_gradient_accumulation_equals_a_larger_batch(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # Completions of 1 to 40 tokens: a mean of the small batches' means would be another gradient.
    lengths = [1, 2, 3, 40] * 4
    completions = [random_ids(1, n, n, seed=i)[0] for i, n in enumerate(lengths)]
    columns = sft_columns(PROMPTS[:16], completions)
    common = {
        **{"num_train_epochs": 2, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 1e3},
        **{"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"},
    }
    trained = []
    for size in (16, 4):
        model = tiny_model("llama")
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
        work = training(tmp_path / str(size))
        metrics = fit_sft(model, tiny_tokenizer, columns, {**common, **sizes}, work)
        assert metrics["steps"] == 2
        trained.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    start = torch.cat([weight.detach().flatten() for weight in tiny_model("llama").parameters()])
    moved = (trained[0] - start).abs().max()
    assert moved > 1e-3 and (trained[0] - trained[1]).abs().max() < 1e-3 * moved


def test_fit_sft_teaches_completions_and_not_prompts(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    columns = sft_columns([[5, 6, 7]] * 4, [[8, 9, 2]] * 4)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 30,
        "warmup_steps": 3,
        "learning_rate": 1e-2,
    }
    before = plain_logps(model, [5], [6, 7]).sum().item()
    metrics = fit_sft(model, tiny_tokenizer, columns, options, training(tmp_path))
    assert plain_logps(model, [5, 6, 7], [8, 9, 2]).sum().item() > -0.1
    assert plain_logps(model, [5], [6, 7]).sum().item() < before + 1.0
    assert metrics["last_loss"] < metrics["history"][0]["loss"]


def test_fit_sft_keeps_the_model_after_a_share_of_the_steps(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With a constant learning rate it is the model of a shorter training."""
    columns = sft_columns(PROMPTS, COMPLETIONS)
    trained = []
    for steps, share in ((5, 0.5), (2, None)):
        model = tiny_model("llama")
        options = {
            "per_device_train_batch_size": 4,
            "max_steps": steps,
            "lr_scheduler_type": "constant",
        }
        work = training(tmp_path / str(steps))
        fit_sft(model, tiny_tokenizer, columns, options, work, checkpoint=share)
        trained.append(model)
    kept = load_model(tmp_path / "5" / CHECKPOINT)
    assert same_weights(kept, trained[1]) and not same_weights(kept, trained[0])
    assert not (tmp_path / "2" / CHECKPOINT).exists()


def test_fit_sft_refuses_no_rows(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="SFT: no rows are left to train on"):
        fit_sft(tiny_model("llama"), tiny_tokenizer, sft_columns([], []), {}, training(tmp_path))


def test_fit_sft_stops_at_a_loss_that_is_not_finite(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data[3, 0] = float("nan")
    columns = sft_columns(PROMPTS, COMPLETIONS)
    with pytest.raises(UserError, match="run: the loss is nan at step 1"):
        fit_sft(model, tiny_tokenizer, columns, {}, training(tmp_path))
