"""The implicit reward by hand, and its fit: the loss of SPIN and DPO, and its reference."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.rows import Ids, plain_logps, plain_sums, random_ids, random_pairs
from support.tiny_models import TINY_ARCHITECTURES
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from irl_align.errors import UserError
from irl_align.models.trl import Training
from irl_align.reward.implicit import (
    ImplicitCollator,
    ImplicitReward,
    PairDPOTrainer,
    fit_implicit,
    reference_logps,
    token_rewards,
)
from irl_align.reward.losses import bradley_terry, implicit_reward, pair_logits
from irl_align.reward.settings import RewardSettings

MakeModel = Callable[[str], PreTrainedModel]
LN2 = math.log(2)
PROMPTS = random_ids(5, 1, 9, seed=1)
COMPLETIONS = random_ids(5, 1, 12, seed=2)


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with every weight shifted a little."""
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data.add_(0.02 * torch.randn(weight.shape, generator=draw))
    return model


def columns(pairs: Dataset) -> tuple[Ids, Ids, Ids, Ids]:
    names = ("prompt_ids", "chosen_ids", "rejected_prompt_ids", "rejected_ids")
    prompts, chosen, other_prompts, rejected = (list(pairs[name]) for name in names)
    return prompts, chosen, other_prompts, rejected


def side_sums(model: PreTrainedModel, pairs: Dataset) -> tuple[Tensor, Tensor]:
    """Summed log-probs (B,) of the preferred and rejected side, one unpadded row at a time."""
    prompts, chosen, other_prompts, rejected = columns(pairs)
    return plain_sums(model, prompts, chosen), plain_sums(model, other_prompts, rejected)


def gradient_of(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def training(work: Path, label: str = "SPIN 0") -> Training:
    return Training(work, seed=0, device=torch.device("cpu"), run_name="spin", label=label)


# --- the reward -----------------------------------------------------------------------------------


def sums(model: PreTrainedModel, completions: Ids) -> list[float]:
    return [
        float(plain_logps(model, p, c).sum()) for p, c in zip(PROMPTS, completions, strict=True)
    ]


@torch.no_grad()
def test_implicit_reward_of_texts(
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = RewardSettings(template="Q {prompt} A ")
    models = moved(tiny_model("llama"), 1), [(1.0, tiny_model("llama"))]
    implicit = ImplicitReward(*models, 0.3, tiny_tokenizer, template)
    texts = (["near", "a cheap one"], ["the pub is here.", "no"])
    ids = implicit.text_format().encode(*texts)
    assert implicit.score(*texts).tolist() == implicit.score_ids(*ids).tolist()
    assert [len(row) for row in implicit.prefix_scores(*texts)] == [len(c) + 1 for c in ids[1]]
    with pytest.raises(UserError, match="an implicit reward needs a tokenizer to score texts"):
        ImplicitReward(*models, 0.3).score(*texts)


@torch.no_grad()
def test_implicit_reward_is_zero_where_policy_and_reference_agree(tiny_model: MakeModel) -> None:
    implicit = ImplicitReward(tiny_model("llama"), [(1.0, tiny_model("llama"))], beta=0.1)
    assert implicit.score_ids(PROMPTS, COMPLETIONS).tolist() == [0.0] * len(PROMPTS)
    assert implicit.score_ids([], []).shape == (0,)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
@torch.no_grad()
def test_implicit_reward_is_the_scaled_log_ratio(arch: str, tiny_model: MakeModel) -> None:
    policy, reference = moved(tiny_model(arch), 1), tiny_model(arch)
    implicit = ImplicitReward(policy, [(1.0, reference)], beta=0.3)
    ratios = zip(sums(policy, COMPLETIONS), sums(reference, COMPLETIONS), strict=True)
    expected = [0.3 * (mine - theirs) for mine, theirs in ratios]
    assert max(map(abs, expected)) > 0.05
    assert implicit.score_ids(PROMPTS, COMPLETIONS).tolist() == pytest.approx(expected, abs=1e-5)
    for row, scores in enumerate(implicit.prefix_scores_ids(PROMPTS, COMPLETIONS)):
        log_ratio = plain_logps(policy, PROMPTS[row], COMPLETIONS[row]) - plain_logps(
            reference, PROMPTS[row], COMPLETIONS[row]
        )
        by_hand = [0.0] + [0.3 * float(log_ratio[:t].sum()) for t in range(1, len(log_ratio) + 1)]
        assert scores.tolist() == pytest.approx(by_hand, abs=1e-5)


@torch.no_grad()
def test_implicit_reward_against_a_mixture(tiny_model: MakeModel) -> None:
    policy, one, other = (
        moved(tiny_model("llama"), 1),
        tiny_model("llama"),
        moved(tiny_model("llama"), 2),
    )
    implicit = ImplicitReward(policy, [(0.25, one), (0.75, other)], beta=2.0)
    parts = (sums(model, COMPLETIONS) for model in (policy, one, other))
    expected = [2.0 * (p - 0.25 * a - 0.75 * b) for p, a, b in zip(*parts, strict=True)]
    assert implicit.score_ids(PROMPTS, COMPLETIONS).tolist() == pytest.approx(expected, abs=5e-5)


def test_token_rewards_by_hand() -> None:
    """Logits as soft Q values: r_t = beta (log pi_t + V_t - V_(t+1)), with V = 0 at the end."""
    logp, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    values = torch.tensor([3.0, 5.0, -1.0])
    assert token_rewards(logp, reference, 2.0).tolist() == [1.0, -2.0, 0.0]
    none = torch.zeros(3)
    assert token_rewards(logp, none, 0.5, values).tolist() == [-1.5, 2.0, -0.75]
    assert float(token_rewards(logp, reference, 2.0, values).sum()) == -1.0 + 2.0 * 3.0


@torch.no_grad()
def test_endogenous_rewards_telescope_to_the_log_prob_and_the_prompts_value(
    tiny_model: MakeModel,
) -> None:
    model = moved(tiny_model("llama"), 1)
    implicit = ImplicitReward(model, [], beta=0.3, endogenous=True)
    for row, scores in enumerate(implicit.prefix_scores_ids(PROMPTS, COMPLETIONS)):
        ids = torch.tensor([[*PROMPTS[row], *COMPLETIONS[row]]])
        places = range(len(PROMPTS[row]) - 1, ids.shape[1] - 1)
        logits = model(ids).logits[0].double()
        q = [float(logits[at, ids[0, at + 1]]) for at in places]  # soft Q of each action
        v = [float(logits[at].logsumexp(0)) for at in places] + [0.0]
        rewards = [0.3 * (q[t] - v[t + 1]) for t in range(len(q))]  # r = Q - V', arXiv:2506.23235
        assert scores.diff().tolist() == pytest.approx(rewards, abs=2e-5)
        whole = plain_logps(model, PROMPTS[row], COMPLETIONS[row]).sum()
        assert float(scores[-1]) == pytest.approx(0.3 * (float(whole) + v[0]), abs=2e-5)


@torch.no_grad()
def test_implicit_reward_as_a_mean_log_prob(tiny_model: MakeModel) -> None:
    """Without a reference and divided by the length: the control that learns no reward."""
    implicit = ImplicitReward(tiny_model("llama"), [], beta=1.0, mean=True)
    lengths = [len(completion) for completion in COMPLETIONS]
    means = [s / n for s, n in zip(sums(tiny_model("llama"), COMPLETIONS), lengths, strict=True)]
    assert implicit.score_ids(PROMPTS, COMPLETIONS).tolist() == pytest.approx(means, abs=1e-5)
    row = int(np.argmax(lengths))
    prefixes = implicit.prefix_scores_ids(PROMPTS, COMPLETIONS)[row]
    start = plain_logps(tiny_model("llama"), PROMPTS[row], COMPLETIONS[row])[:3].mean()
    assert [float(prefixes[0]), float(prefixes[3])] == pytest.approx([0.0, float(start)], abs=1e-5)


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_reference_logps_are_the_models_own(arch: str, tiny_model: MakeModel) -> None:
    pairs = random_pairs(7, seed=5)
    got = reference_logps([(1.0, tiny_model(arch))], pairs)
    expected = torch.stack(side_sums(tiny_model(arch), pairs))
    assert got.shape == (2, 7)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-5)


@torch.no_grad()
def test_reference_logps_of_a_mixture_and_of_repeated_rows(tiny_model: MakeModel) -> None:
    pairs = random_pairs(3, seed=6)
    repeated = Dataset.from_dict({k: [*v, *v] for k, v in pairs.to_dict().items()})
    one, other = tiny_model("llama"), moved(tiny_model("llama"), 1)
    got = reference_logps([(0.3, one), (0.7, other)], repeated)
    first, second = (torch.stack(side_sums(model, pairs)) for model in (one, other))
    expected = (0.3 * first + 0.7 * second).numpy()
    np.testing.assert_allclose(got, np.concatenate([expected, expected], axis=1), atol=2e-5)


def test_reference_logps_reuse_those_of_the_generator_only(
    tiny_model: MakeModel,
) -> None:
    pairs = random_pairs(4, seed=6)
    pairs = pairs.add_column("generator", ["mine", "other", "mine", ""])
    pairs = pairs.add_column("rejected_logp", [-1.0, -2.0, None, None])
    plain = reference_logps([(1.0, tiny_model("llama"))], pairs)
    known = reference_logps([(1.0, tiny_model("llama"))], pairs, "mine")
    np.testing.assert_allclose(known[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(known[1], [-1.0, *plain[1, 1:]], atol=1e-5)


# --- the loss -------------------------------------------------------------------------------------


def test_collator_masks_each_sides_own_prompt() -> None:
    row = {
        "prompt_ids": [10, 11],
        "chosen_ids": [12, 13, 2],
        "rejected_prompt_ids": [20, 21, 22],
        "rejected_ids": [23],
        "ref_chosen_logps": -1.5,
        "ref_rejected_logps": -2.5,
    }
    short = {**row, "prompt_ids": [30], "chosen_ids": [31], "ref_chosen_logps": -3.5}
    batch = {name: value.tolist() for name, value in ImplicitCollator(0)([row, short]).items()}
    assert batch == {
        "input_ids": [
            [10, 11, 12, 13, 2],
            [30, 31, 0, 0, 0],
            [20, 21, 22, 23, 0],
            [20, 21, 22, 23, 0],
        ],
        "attention_mask": [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "completion_mask": [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]],
        "ref_chosen_logps": [-1.5, -3.5],
        "ref_rejected_logps": [-2.5, -2.5],
    }


def spin_loss(
    policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], lam: float
) -> Tensor:
    """arXiv:2401.01335 eq. 4.7 with l(t) = log(1 + e^-t), as it is printed there."""
    t = lam * (policy[0] - reference[0]) - lam * (policy[1] - reference[1])
    return torch.log(1 + torch.exp(-t)).mean()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_compute_loss_is_spins_and_trls(
    arch: str, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs, beta = random_pairs(5, seed=7), 0.4
    # In float64: what differs is the formula and not a processor's kernels.
    model, opponent = moved(tiny_model(arch), 1).double(), tiny_model(arch).double()
    with torch.no_grad():
        reference = side_sums(opponent, pairs)

    policy = side_sums(model, pairs)
    rewards = [implicit_reward(p, r, beta) for p, r in zip(policy, reference, strict=True)]
    ours, _ = bradley_terry(pair_logits(*rewards))
    ours_gradient = gradient_of(ours, model)
    assert abs(ours.item() - LN2) > 0.01

    printed = spin_loss(side_sums(model, pairs), reference, beta)
    assert printed.item() == pytest.approx(ours.item(), abs=1e-6)
    for name, gradient in gradient_of(printed, model).items():
        torch.testing.assert_close(gradient, ours_gradient[name], atol=1e-6, rtol=1e-5)

    # TRL's trainer as it is, with its own reference model, preprocessing off (ids are given).
    trainer = plain_dpo(model, opponent, tiny_tokenizer, pairs, beta, tmp_path)
    theirs = trainer.compute_loss(model, collated(pairs))
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-6)
    for name, gradient in gradient_of(theirs, model).items():
        torch.testing.assert_close(gradient, ours_gradient[name], atol=1e-6, rtol=1e-4)


def plain_dpo(
    model: PreTrainedModel,
    opponent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Dataset,
    beta: float,
    folder: Path,
) -> DPOTrainer:
    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
    args = DPOConfig(output_dir=str(folder), beta=beta, gradient_checkpointing=False, **options)
    return OnIds(model, opponent, args=args, train_dataset=pairs, processing_class=tokenizer)


def collated(pairs: Dataset) -> dict[str, Tensor]:
    """The batch of pairs, padded by hand; without reference log-probs."""
    prompts, chosen, other_prompts, rejected = columns(pairs)
    sides = [*zip(prompts, chosen, strict=True), *zip(other_prompts, rejected, strict=True)]
    longest = max(len(p) + len(c) for p, c in sides)
    padding = [[0] * (longest - len(p) - len(c)) for p, c in sides]
    return {
        "input_ids": torch.tensor(
            [p + c + pad for (p, c), pad in zip(sides, padding, strict=True)]
        ),
        "attention_mask": torch.tensor(
            [[1] * len(p + c) + pad for (p, c), pad in zip(sides, padding, strict=True)]
        ),
        "completion_mask": torch.tensor(
            [[0] * len(p) + [1] * len(c) + pad for (p, c), pad in zip(sides, padding, strict=True)]
        ),
    }


# --- the fit --------------------------------------------------------------------------------------


OPTIONS = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "beta": 0.5}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_fit_implicit_starts_at_ln_2_and_learns(
    accumulate: int, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs, model = random_pairs(12, seed=8), tiny_model("llama")
    logps = reference_logps([(1.0, model)], pairs)
    options = {
        **OPTIONS,
        "per_device_train_batch_size": 4 // min(accumulate, 2),
        "gradient_accumulation_steps": accumulate,
        "max_steps": 12,
    }
    metrics = fit_implicit(
        model, tiny_tokenizer, pairs, logps, options, training(tmp_path), at_reference=True
    )
    assert metrics["first_loss"] == pytest.approx(LN2, abs=1e-5)
    assert metrics["steps"] == 12
    assert metrics["last_loss"] < 0.5
    assert not model.training
    with torch.no_grad():  # every demonstration is now above its sample
        chosen, rejected = side_sums(model, pairs)
    margin = 0.5 * (chosen - torch.tensor(logps[0]) - rejected + torch.tensor(logps[1]))
    assert bool((margin > 0).all())


def test_fit_implicit_has_the_pure_loss(
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With a learning rate of zero nothing moves: the mean logged loss is that of all pairs.
    pairs, reference = random_pairs(8, seed=9), tiny_model("gpt2")
    model = moved(tiny_model("gpt2"), 3)
    with torch.no_grad():
        policy, base = side_sums(model, pairs), side_sums(reference, pairs)
    sides = [0.5 * (p - r) for p, r in zip(policy, base, strict=True)]
    expected, _ = bradley_terry(pair_logits(*sides))
    options = {
        **OPTIONS,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
    }
    logps = reference_logps([(1.0, reference)], pairs)
    metrics = fit_implicit(
        model, tiny_tokenizer, pairs, logps, options, training(tmp_path), at_reference=False
    )
    assert metrics["train_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_fit_implicit_refuses_a_wrong_reference(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs = random_pairs(8, seed=10)
    logps = reference_logps([(1.0, moved(tiny_model("llama"), 1))], pairs)
    options = {
        **OPTIONS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    fit = (tiny_model("llama"), tiny_tokenizer, pairs, logps, options, training(tmp_path))
    with pytest.raises(UserError, match=r"spin: the first loss is .*, expected 1 ln 2 = 0\.693147"):
        fit_implicit(*fit, at_reference=True)


def test_fit_implicit_stops_at_a_loss_that_is_not_finite(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """At the first step it is no ln 2 either, which would blame the reference."""
    pairs, model = random_pairs(4, seed=10), tiny_model("llama")
    logps = reference_logps([(1.0, model)], pairs)
    options = {**OPTIONS, "per_device_train_batch_size": 4, "max_steps": 5}
    with pytest.raises(UserError, match=r"spin: the loss is nan at step [23]; lower learning_rate"):
        wild = {**options, "learning_rate": 1e30}
        fit_implicit(
            model,
            tiny_tokenizer,
            pairs,
            logps,
            wild,
            training(tmp_path / "wild"),
            at_reference=True,
        )
    broken = tiny_model("llama")
    broken.get_output_embeddings().weight.data[3, 0] = float("nan")
    with pytest.raises(UserError, match="spin: the loss is nan at step 1"):
        fit_implicit(
            broken,
            tiny_tokenizer,
            pairs,
            logps,
            options,
            training(tmp_path),
            at_reference=True,
        )


def test_fit_implicit_refuses_a_reference_with_errors_that_cancel(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # Off by +1 on even pairs and -1 on odd ones: the mean loss is ln 2 to first order.
    pairs, model = random_pairs(4, seed=11), tiny_model("llama")
    logps = reference_logps([(1.0, model)], pairs)
    logps[0] += np.array([1, -1, 1, -1], np.float32)
    options = {**OPTIONS, "beta": 0.1, "per_device_train_batch_size": 4}
    with pytest.raises(UserError, match="ln 2"):
        fit_implicit(
            model,
            tiny_tokenizer,
            pairs,
            logps,
            options,
            training(tmp_path),
            at_reference=True,
        )


def test_fit_implicit_allows_rounding_at_any_beta(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs, model = random_pairs(4, seed=11), tiny_model("llama")
    logps = reference_logps([(1.0, model)], pairs)
    options = {**OPTIONS, "beta": 5.0, "per_device_train_batch_size": 4, "max_steps": 1}
    logps[0] += 0.002  # moves the loss by 5 * 0.002 / 2
    fit = (tiny_tokenizer, pairs, logps, options)
    metrics = fit_implicit(
        tiny_model("llama"), *fit, training(tmp_path / "near"), at_reference=True
    )
    assert metrics["first_loss"] == pytest.approx(LN2 + 0.005, abs=1e-3)
    logps[0] += 0.05
    with pytest.raises(UserError, match="ln 2"):
        fit_implicit(tiny_model("llama"), *fit, training(tmp_path / "far"), at_reference=True)


def test_fit_implicit_allows_rounding_of_half_precision_weights(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs, options = random_pairs(4, seed=11), {**OPTIONS, "per_device_train_batch_size": 4}
    logps = reference_logps([(1.0, tiny_model("llama").bfloat16())], pairs)
    options |= {"beta": 5.0, "max_steps": 1}
    fit = (tiny_tokenizer, pairs, logps, options)
    logps[0] += 0.05  # refused of weights in float32, above
    model = tiny_model("llama").bfloat16()
    metrics = fit_implicit(model, *fit, training(tmp_path / "near"), at_reference=True)
    assert metrics["first_loss"] == pytest.approx(LN2 + 5 * 0.05 / 2, abs=0.1)
    logps[0] += 0.6
    with pytest.raises(UserError, match="ln 2"):
        fit_implicit(
            tiny_model("llama").bfloat16(),
            *fit,
            training(tmp_path / "far"),
            at_reference=True,
        )


def test_fit_implicit_disables_dropout(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()  # dropout of 0.1, the family's default
    pairs = random_pairs(4, seed=12)
    logps = reference_logps([(1.0, model)], pairs)
    options = {**OPTIONS, "max_steps": 1}
    metrics = fit_implicit(
        model, tiny_tokenizer, pairs, logps, options, training(tmp_path), at_reference=True
    )
    assert metrics["first_loss"] == pytest.approx(LN2, abs=1e-5)
    refused = {**options, "disable_dropout": False}
    with pytest.raises(UserError, match="dropout"):
        fit_implicit(
            model,
            tiny_tokenizer,
            pairs,
            logps,
            refused,
            training(tmp_path / "again"),
            at_reference=True,
        )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss_type": ["bco_pair"], "beta": 1.0}, "space"),
        ({"loss_type": ["bco_pair"]}, "bco"),
        ({"loss_type": ["nca_pair"]}, "nca"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}, "sft"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fit_implicit_has_the_losses_of_self_play(
    options: dict[str, Any],
    expected: str,
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """The mean logged loss of all pairs, from log-ratios by the model's own forward."""
    pairs, reference = random_pairs(4, seed=9), tiny_model("gpt2")
    model = moved(tiny_model("gpt2"), 3)
    with torch.no_grad():
        policy, base = side_sums(model, pairs), side_sums(reference, pairs)
    chosen, rejected = (p - r for p, r in zip(policy, base, strict=True))
    tokens = sum(len(ids) for ids in pairs["chosen_ids"])
    beta = options.get("beta", 0.5)
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = {
        # arXiv:2512.07175 with mu = 1: sigma_mu(r) = 1 / (1 + mu exp(-r)) of r = log pi / pi_k.
        "space": -(1 / (1 + torch.exp(-chosen))).log() - (1 - 1 / (1 + torch.exp(-rejected))).log(),
        "bco": -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected),
        "nca": -log_sigmoid(beta * chosen)
        - 0.5 * log_sigmoid(-beta * chosen)
        - 0.5 * log_sigmoid(-beta * rejected),
        "sft": -log_sigmoid(beta * (chosen - rejected)) - 0.1 * policy[0].sum() / tokens,
    }
    still = {**OPTIONS, "beta": 0.5, **options, "per_device_train_batch_size": 4, "max_steps": 1}
    metrics = fit_implicit(
        model,
        tiny_tokenizer,
        pairs,
        reference_logps([(1.0, reference)], pairs),
        {**still, "learning_rate": 0.0},
        training(tmp_path),
        at_reference=False,
    )
    assert metrics["train_loss"] == pytest.approx(float(losses[expected].mean()), abs=1e-4)


@pytest.mark.parametrize("loss", ["bco_pair", "nca_pair"])
def test_fit_implicit_knows_the_first_loss_of_self_play(
    loss: str, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs, model = random_pairs(4, seed=13), tiny_model("llama")
    options = {**OPTIONS, "loss_type": [loss], "max_steps": 1}
    logps = reference_logps([(1.0, model)], pairs)
    fit: Any = (model, tiny_tokenizer, pairs)
    metrics = fit_implicit(*fit, logps, options, training(tmp_path), at_reference=True)
    assert metrics["first_loss"] == pytest.approx(2 * LN2, abs=1e-5)
    other = reference_logps([(1.0, moved(tiny_model("llama"), 3))], pairs)
    with pytest.raises(UserError, match=r"expected 2 ln 2 = 1\.386294: reference and policy"):
        fit_implicit(
            tiny_model("llama"),
            *fit[1:],
            other - 1.0,
            options,
            training(tmp_path / "far"),
            at_reference=True,
        )


def test_fit_implicit_expects_no_first_loss_of_other_losses(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs, model = random_pairs(4, seed=13), tiny_model("llama")
    logps = reference_logps([(1.0, model)], pairs)
    options = {**OPTIONS, "loss_type": ["hinge"], "max_steps": 1, "learning_rate": 0.0}
    metrics = fit_implicit(
        model, tiny_tokenizer, pairs, logps, options, training(tmp_path), at_reference=True
    )
    assert metrics["train_loss"] == pytest.approx(1.0, abs=1e-5)  # relu(1 - 0)
    assert "first_loss" not in metrics


def test_fit_implicit_refuses_no_pairs(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    none = random_pairs(1, seed=0).select([])
    with pytest.raises(UserError, match="SPIN 0: no rows are left"):
        fit_implicit(
            tiny_model("llama"),
            tiny_tokenizer,
            none,
            np.zeros((2, 0), np.float32),
            {},
            training(tmp_path),
            at_reference=True,
        )


def test_trainer_uses_trls_loss() -> None:
    """What is ours is the data's way in; the loss below compute_loss is the library's."""
    assert PairDPOTrainer._compute_loss is DPOTrainer._compute_loss
