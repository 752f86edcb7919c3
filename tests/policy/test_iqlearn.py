"""IQLearn's offline loss against hand numbers, a plain loop and its closed-form optimum; as a step
of the loop."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import tiny_recipe
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.errors import UserError
from irl_align.models.sft import GuardedSFTTrainer, fit_sft, sft_columns
from irl_align.models.trl import Training
from irl_align.policy.iqlearn import IQLearnTrainer
from irl_align.reward.losses import iq_learn
from irl_align.training.train import train

pytestmark = pytest.mark.timeout(240)


def of_logits(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(log pi, V) of the tokens at their places."""
    value = logits.logsumexp(-1)
    return logits.gather(-1, tokens[..., None])[..., 0] - value, value


def test_by_hand() -> None:
    # Two tokens of a vocabulary of two. Q(s_0) = (ln 3, 0), Q(s_1) = (0, 0): V = ln 4, ln 2.
    # Tokens 0 and 1: log pi = ln 3/4, ln 1/2. r_0 = ln 3 - ln 2 / 2 (gamma 1/2), r_1 = ln 1 - 0.
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])
    logp, value = of_logits(logits, torch.tensor([[0, 1]]))
    loss, metrics = iq_learn(logp, value, torch.ones(1, 2, dtype=torch.bool), 0.2, 0.5)
    nll = (math.log(4 / 3) + math.log(2)) / 2
    reward = math.log(3) - math.log(2) / 2
    assert loss.item() == pytest.approx(nll + 0.2 * reward**2 / 2, abs=1e-6)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"nll": nll, "reward": reward / 2, "reward_square": reward**2 / 2}, abs=1e-6
    )


def plain(rows: list[tuple[Tensor, list[int], int]], coef: float, gamma: float) -> Tensor:
    """The same by loops over rows (logits (L, V), tokens, where the completion starts)."""
    terms = []
    for logits, tokens, start in rows:
        values = [torch.log(torch.exp(place).sum()) for place in logits]
        for t in range(start, len(tokens)):
            following = values[t + 1] if t + 1 < len(tokens) else 0.0
            q = logits[t][tokens[t]]  # = log pi + V
            terms.append(coef * (q - gamma * following) ** 2 - (q - values[t]))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("coef", "gamma"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.9)])
def test_loss_and_gradient_are_those_of_a_plain_loop(coef: float, gamma: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, requires_grad=True)
    tokens = torch.randint(4, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    loss, _ = iq_learn(*of_logits(logits, tokens), mask, coef, gamma)
    rows = [(logits[0], tokens[0].tolist(), 2), (logits[1, :4], tokens[1, :4].tolist(), 1)]
    expected = plain(rows, coef, gamma)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    own, other = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    assert torch.allclose(own, other, atol=1e-6)


def test_rewards_of_a_completion_sum_to_its_log_prob_and_first_value() -> None:
    torch.manual_seed(1)
    logits, tokens = torch.randn(1, 6, 3), torch.randint(3, (1, 6))
    logp, value = of_logits(logits, tokens)
    _, metrics = iq_learn(logp, value, torch.ones(1, 6, dtype=torch.bool), 1.0)
    assert 6 * metrics["reward"].item() == pytest.approx((logp.sum() + value[0, 0]).item(), 1e-5)


def test_optimum_of_one_token_shrinks_the_reward() -> None:
    # One state, then the end: r = Q. The gradient is 0 where pi(a) = p(a) (1 - 2 coef Q(a)).
    share, coef = torch.tensor([0.7, 0.2, 0.1]), 0.2
    q = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.LBFGS([q], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12)
    tokens, mask = torch.arange(3)[:, None], torch.ones(3, 1, dtype=torch.bool)

    def expected_loss() -> Tensor:
        optimiser.zero_grad()
        logp, value = of_logits(q.expand(3, 1, 3), tokens)
        by_token = [
            iq_learn(logp[a : a + 1], value[a : a + 1], mask[:1], coef)[0] for a in range(3)
        ]
        loss = (share * torch.stack(by_token)).sum()
        loss.backward()
        return loss

    optimiser.step(expected_loss)
    pi = q.detach().softmax(0)
    assert pi.tolist() == pytest.approx((share * (1 - 2 * coef * q.detach())).tolist(), abs=1e-4)
    assert 1 / 3 < pi[0] < 0.7  # flatter than the demonstrations, which coef 0 would give


Trained = Callable[..., dict[str, Tensor]]


@pytest.fixture
def trained(
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Trained:
    """Weights after a few steps on four demonstrations, by TRL's loss or by IQLearn's."""
    prompts = [tiny_tokenizer.encode(text) for text in ("the punter", "a pub", "near", "cheap")]
    completions = [[*ids, tiny_tokenizer.eos_token_id] for ids in prompts[::-1]]

    def run(name: str, trainer: Any = GuardedSFTTrainer, **args: Any) -> dict[str, Tensor]:
        model = tiny_model("llama")
        options = {"max_steps": 3, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
        options |= {"per_device_train_batch_size": 4, **args}
        training = Training(tmp_path / name, 0, torch.device("cpu"))
        fit_sft(
            model, tiny_tokenizer, sft_columns(prompts, completions), options, training, trainer
        )
        return {key: value.clone() for key, value in model.state_dict().items()}

    return run


def close(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_without_the_square_it_is_sft(trained: Trained) -> None:
    sft = trained("sft")
    assert close(sft, trained("zero", partial(IQLearnTrainer, coef=0.0, gamma=1.0)))
    assert not close(sft, trained("half", partial(IQLearnTrainer, coef=0.5, gamma=1.0)))


def test_accumulated_batches_are_one_batch(trained: Trained) -> None:
    make = partial(IQLearnTrainer, coef=0.5, gamma=1.0)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert close(trained("whole", make), trained("parts", make, **parts))


def test_as_the_loops_policy_step(tiny_folder: Path) -> None:
    update = (
        "reward.kind=none",
        "policy_update={kind: iqlearn, coef: 0.05}",
        "policy_update.args={max_steps: 4, per_device_train_batch_size: 16, logging_steps: 1}",
    )
    result = train(tiny_recipe(tiny_folder, *update))
    view = result.view()
    record = next(r for r in view.metrics if r["key"] == "stage/policy-1")
    assert record["stage"] == "iqlearn"
    assert any(r["key"] == "evaluation/1/t1" for r in view.metrics)


def test_options_of_another_loss_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss_type belongs to another loss: iqlearn has its own"):
        tiny_recipe(tmp_path, "policy_update={kind: iqlearn, args: {loss_type: dft}}")
