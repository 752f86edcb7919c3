"""PPO's learner: its gradient, ratio 1 at its first step, bf16, the early stop, learning rates."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_tools import (
    CPU,
    cast_of,
    learner_of,
    options,
    pack,
    samples_of,
    small_llama,
    train,
)
from support.rows import random_ids, same_weights
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.lm_head import lm_head_logits
from irl_align.policy.ppo.learner import Learner, UpdateBatch
from irl_align.policy.ppo.network import Network, hidden_before, token_outputs
from irl_align.policy.ppo.rollout import RolloutBatch

MakeModel = Callable[[str], PreTrainedModel]


# --- the gradient ---------------------------------------------------------------------------------


def random_samples(n: int, seed: int) -> RolloutBatch:
    """Six random samples, n per prompt."""
    prompts = [p for p in random_ids(6 // n, 2, 5, seed, vocabulary=20) for _ in range(n)]
    rows = random_ids(6, 1, 7, seed + 1, vocabulary=20)
    return samples_of(*[(p, row, True) for p, row in zip(prompts, rows, strict=True)])


def random_batch(learner: Learner, samples: RolloutBatch, kl_coef: float) -> UpdateBatch:
    """Log-probs near the learner's, and random advantages, values and targets."""
    draw = torch.Generator().manual_seed(5)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(samples.mask.shape, generator=draw) * samples.mask

    packed = pack(learner, samples)
    logps, _ = learner.infer(packed, logps=True, values=False)
    assert logps is not None
    old = logps + noise(0.3)
    return UpdateBatch(packed, old, noise(1), old + noise(0.2), kl_coef, noise(1), noise(1))


def equal_samples(count: int, length: int, vocabulary: int = 12) -> RolloutBatch:
    """Random samples, each of `length` tokens."""
    prompts = random_ids(count, 2, 5, 1, vocabulary=vocabulary)
    rows = random_ids(count, length, length, 2, vocabulary=vocabulary)
    return samples_of(*[(p, row, True) for p, row in zip(prompts, rows, strict=True)])


def own_batch(learner: Learner, samples: RolloutBatch) -> UpdateBatch:
    """A rollout with the learner's own log-probs and values, and advantages of 1 and -1."""
    packed = pack(learner, samples)
    critic = learner.network.critic is not None
    logps, values = learner.infer(packed, logps=True, values=critic)
    assert logps is not None
    sign = 1.0 - 2.0 * (torch.arange(len(samples.mask)) % 2)
    advantages = sign[:, None] * samples.mask
    targets = None if values is None else advantages.clone()
    return UpdateBatch(packed, logps, advantages, old_values=values, targets=targets)


def plain_loss(network: Network, batch: UpdateBatch, chosen: PPOOptions) -> torch.Tensor:
    """PPO's loss of a rollout, token by token, from one unpadded forward per sample."""
    assert batch.reference_logps is not None
    assert batch.old_values is not None and batch.targets is not None
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for i, (prompt, row) in enumerate(
        zip(batch.packed.prompts, batch.packed.completions, strict=True)
    ):
        ids = torch.tensor([[*prompt, *row]])
        table = torch.softmax(network.policy(input_ids=ids).logits[0].double(), -1).log()
        assert network.critic is not None
        trunk = network.critic.trunk or network.policy.base_model
        hidden = trunk(input_ids=ids)[0][0]
        for t, token in enumerate(row):
            place = len(prompt) + t - 1
            logp = table[place, token]
            ratio = (logp - batch.old_logps[i, t]).exp()
            advantage = batch.advantages[i, t]
            clipped = ratio.clamp(1 - chosen.clip, 1 + chosen.clip)
            policy = -torch.minimum(ratio * advantage, clipped * advantage)
            gap = batch.reference_logps[i, t] - logp
            kl = gap.exp() - gap - 1
            if chosen.kl == "loss":  # its gradient goes through the ratio too
                kl = ratio * kl
            entropy = -(table[place].exp() * table[place]).sum()
            value = network.critic.head(hidden[place])[0]
            old, goal = batch.old_values[i, t], batch.targets[i, t]
            near = old + (value - old).clamp(-0.2, 0.2)
            critic = 0.5 * torch.maximum((value - goal) ** 2, (near - goal) ** 2)
            total = total + policy + chosen.kl_coef * kl - chosen.entropy_coef * entropy
            total = total + chosen.vf_coef * critic
            tokens += 1
    return total / tokens


def gradients(network: Network) -> dict[str, torch.Tensor]:
    grads = {
        name: weight.grad.double().clone()
        for name, weight in network.named_parameters()
        if weight.grad is not None
    }
    network.zero_grad()
    return grads


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3", "mistral"])
@pytest.mark.parametrize(
    ("n", "critic", "kl"), [(1, "separate", "loss"), (3, "shared", "loss"), (3, "shared", "grpo")]
)
def test_accumulate_gives_the_formulas_gradient_however_the_rollout_is_cut(
    tiny_model: MakeModel, arch: str, n: int, critic: str, kl: str
) -> None:
    """Policy, KL, entropy and clipped value loss, meaned over tokens: against a plain loop over
    unpadded rows, for one micro-batch, for one row each, and for prompts that are shared."""
    chosen = options(kl=kl, entropy_coef=0.02, critic=critic, n=n, batch_size=6, kl_coef=0.1)
    learner = learner_of(tiny_model(arch).float(), chosen)
    network = learner.network
    assert network.critic is not None
    with torch.no_grad():
        network.critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    samples = random_samples(n, 5)
    batch = random_batch(learner, samples, chosen.kl_coef)
    plain_loss(network, batch, chosen).backward()
    want = gradients(network)
    assert len(want) > 10
    packed = batch.packed
    for limit in (1, 40, 10_000):
        packed.max_tokens = limit
        cut = packed.batches(range(6))
        if limit == 1:  # a row each, and completions of a prompt share one where they may
            assert (len(cut) < 6) == (n > 1 and arch != "mistral")
        _, count, _ = learner.accumulate(cut, batch.on_device(CPU), batch.kl_coef, 0)
        assert count == int(samples.mask.sum())
        got = gradients(network)
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            scale = float(want[name].abs().max())
            assert torch.allclose(gradient, want[name], atol=3e-5 * max(scale, 1e-2), rtol=0), name


def test_accumulate_gives_the_same_gradient_with_checkpointing(tiny_model: MakeModel) -> None:
    """A model's dropout has no influence either."""
    results = []
    for checkpointing in (False, True):
        chosen = options(gradient_checkpointing=checkpointing, kl="loss", batch_size=6)
        model = tiny_model("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        learner = learner_of(model, chosen)
        assert model.is_gradient_checkpointing == checkpointing
        batch = random_batch(learner, random_samples(1, 5), chosen.kl_coef)
        learner.accumulate(batch.packed.whole, batch.on_device(CPU), batch.kl_coef, 0)
        results.append(gradients(learner.network))
    plain, checkpointed = results
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-8) for name in plain)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_accumulate_multiplies_the_policy_gradient_by_the_weights(
    tiny_tokenizer: PreTrainedTokenizerFast, kl_coef: float
) -> None:
    """Against -mean(w (A - kl_coef k3) pi / pi_old), written with the model's own logits."""
    model = small_llama(len(tiny_tokenizer))
    learner = learner_of(model, options(advantage="reinforce", kl="loss"))
    samples = random_samples(1, 5)
    batch = own_batch(learner, samples)
    shape = samples.mask.shape
    advantages, weights = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    reference = batch.old_logps - 0.5
    batch = replace(batch, advantages=advantages, weights=weights.abs(), reference_logps=reference)
    learner.accumulate(batch.packed.whole, batch.on_device(CPU), kl_coef, 0)
    got = gradients(learner.network)

    loss = torch.zeros(())
    for i, (prompt, row) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
        logits = model(input_ids=torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)[range(len(row)), row]
        ratio = (logps - batch.old_logps[i, : len(row)]).exp()
        gap = reference[i, : len(row)] - logps
        worth = advantages[i, : len(row)] - kl_coef * (gap.exp() - gap - 1)
        loss = loss - (weights.abs()[i, : len(row)] * worth * ratio).sum()
    (loss / samples.mask.sum()).backward()
    want = gradients(learner.network)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert torch.allclose(gradient, want[name], atol=1e-6, rtol=1e-4)


def test_infer_uses_the_temperature(tiny_model: MakeModel) -> None:
    """At temperature 0.5 log-probs are those of logits / 0.5."""
    model = tiny_model("llama")
    learner = learner_of(model, options(temperature=0.5, advantage="reinforce"))
    prompt, row = [5, 9], [11, 4, 7]
    packed = learner.pack([prompt], [row])
    got, _ = learner.infer(packed, logps=True, values=False)
    logits = model(input_ids=torch.tensor([[*prompt, *row]])).logits[0, 1:4].double() / 0.5
    want = torch.softmax(logits, -1).log()[range(3), row]
    assert got is not None and torch.allclose(got[0].double(), want, atol=1e-5)


def steps_of(learner: Learner) -> set[int]:
    """Numbers of optimiser steps of the weights."""
    return {int(state["step"]) for state in learner.optimizer.state.values()}


@pytest.mark.parametrize("bf16", [False, True])
def test_update_refuses_one_wrong_token_of_a_rollout(bf16: bool) -> None:
    """One of 1,536 tokens has ratio 2.46, or 1 / 4.5 under bf16: the mean is below its limit."""
    off = -1.5 if bf16 else math.log(2.46)
    chosen = options(advantage="reinforce", bf16=True, epochs=1)
    learner = learner_of(small_llama(12), chosen, bf16=bf16)
    batch = own_batch(learner, equal_samples(256, 6))
    before = small_llama(12)
    wrong = batch.old_logps.clone()
    wrong[200, 3] -= off
    mean = abs(off) / wrong.numel()
    assert mean < (5e-2 if bf16 else 1e-3)
    message = rf"before its first step .* by {abs(off):.2g} at a token, expected at most"
    with pytest.raises(UserError, match=message) as caught:
        learner.update(0, replace(batch, old_logps=wrong))
    assert "\n" not in str(caught.value)
    assert same_weights(learner.network.policy, before)  # before any step
    learner.optimizer.zero_grad()
    report = learner.update(0, batch)
    assert report["first_log_ratio"] <= report["first_log_ratio_max"] < (0.1 if bf16 else 1e-5)


def test_update_reports_the_largest_log_ratio_of_all_micro_batches() -> None:
    """One row each, the wrong one neither the first nor the last."""
    chosen = options(advantage="reinforce", epochs=1, max_batch_tokens=1)
    learner = learner_of(small_llama(12), chosen)
    batch = own_batch(learner, equal_samples(8, 4))
    batch.old_logps[3, 2] += 1e-3  # within what is let through
    report = learner.update(0, batch)
    assert report["first_log_ratio_max"] == pytest.approx(1e-3, rel=1e-2)
    assert report["first_log_ratio"] == pytest.approx(1e-3 / 32, rel=1e-2)


def test_infer_in_bf16_gives_log_probs_in_float32(tiny_model: MakeModel) -> None:
    """Autocast on any CPU, emulated where it must be: near float32, and not float32."""
    samples = equal_samples(6, 7, vocabulary=320)
    chosen, results = options(epochs=1), {}
    for bf16 in (False, True):
        learner = learner_of(tiny_model("llama"), chosen, bf16=bf16)
        assert learner.bf16 is bf16
        results[bf16] = own_batch(learner, samples)
    exact, rounded = results[False].old_logps, results[True].old_logps
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).abs().max()) < 5e-2
    assert not torch.equal(rounded, rounded.bfloat16().float())


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_infer_in_bf16_computes_the_critics_head_in_float32(
    tiny_model: MakeModel, critic: str
) -> None:
    """Against the head in float64 on the states that autocast computes. A bf16 has 8 bits: values
    near 5 would be off by 0.01."""
    learner = learner_of(tiny_model("llama"), options(critic=critic), bf16=True)
    network = learner.network
    assert network.critic is not None
    with torch.no_grad():
        network.critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        network.critic.head.bias.fill_(5.0)
    packed = pack(learner, equal_samples(6, 7, vocabulary=320))
    _, values = learner.infer(packed, logps=False, values=True)
    assert values is not None and values.dtype == torch.float32
    [batch] = packed.whole
    with torch.no_grad(), learner.accelerator.autocast():
        hidden = hidden_before(network.critic.trunk or network.policy.base_model, batch)
    head = network.critic.head
    want = hidden.double() @ head.weight[0].double() + head.bias.double()
    got = values.flatten()[batch.token_index]
    assert torch.allclose(got.double(), want, atol=1e-5, rtol=0)
    assert not torch.equal(got, got.bfloat16().float())


def test_token_outputs_in_bf16_compute_log_softmax_in_float32(tiny_model: MakeModel) -> None:
    """Against float64 on the logits that autocast computes: the temperature rounds nothing more."""
    model = tiny_model("llama")
    learner = learner_of(model, options(advantage="reinforce"), bf16=True)
    [batch] = pack(learner, equal_samples(6, 7, vocabulary=320)).whole
    with torch.no_grad(), learner.accelerator.autocast():
        got = token_outputs(model, batch, 0.7, "monitor")
        logits = lm_head_logits(
            model.get_output_embeddings(), hidden_before(model.base_model, batch)
        )
    assert logits.dtype == torch.bfloat16
    assert got.logps is not None and got.logps.dtype == torch.float32
    table = (logits.double() / 0.7).log_softmax(-1)
    want = table.gather(1, batch.targets[:, None])[:, 0]
    assert torch.allclose(got.logps.double(), want, atol=1e-5, rtol=0)
    assert got.entropy is not None and got.entropy.dtype == torch.float32
    assert torch.allclose(got.entropy.double(), -(table.exp() * table).sum(1), atol=1e-4, rtol=0)


def test_update_in_bf16_changes_weights_in_float32(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    learner = learner_of(model, options(epochs=2, learning_rate=1e-3), bf16=True)
    report = learner.update(0, own_batch(learner, equal_samples(6, 7, vocabulary=320)))
    assert all(math.isfinite(value) for value in report.values())
    assert {weight.dtype for weight in learner.network.parameters()} == {torch.float32}
    assert not same_weights(model, tiny_model("llama"))


def test_update_stops_its_epochs_above_epoch_kl(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Eight epochs of two minibatches, of which a step ends half of one."""
    results: dict[float | None, list[dict[str, Any]]] = {}
    for limit in (None, 0.05, 1e-4):
        chosen = options(epochs=8, minibatches=2, epoch_kl=limit, episodes=32)
        cast = cast_of(tiny_tokenizer, chosen)
        results[limit] = train(tmp_path / str(limit), cast, chosen)["history"]
    assert [record["epochs"] for record in results[None]] == [8.0, 8.0]
    assert [record["epochs"] for record in results[1e-4]] == [0.5, 0.5]
    for record in results[0.05]:
        assert 0.5 < record["epochs"] < 8.0 and record["epochs"] % 0.5 == 0.0
    for limit in (0.05, 1e-4):
        assert all(record["update_kl"] > limit for record in results[limit])
    # One and the same first rollout, so that more steps have taken the policy further.
    assert results[None][0]["update_kl"] > results[1e-4][0]["update_kl"]


@pytest.mark.parametrize(("limit", "epochs", "steps"), [(1e-4, 0.5, 1), (None, 8.0, 16)])
def test_update_takes_no_step_above_epoch_kl(
    limit: float | None, epochs: float, steps: int
) -> None:
    chosen = options(
        epochs=8, minibatches=2, epoch_kl=limit, advantage="reinforce", learning_rate=1e-2
    )
    learner = learner_of(small_llama(12), chosen)
    report = learner.update(0, own_batch(learner, equal_samples(16, 5)))
    assert report["epochs"] == epochs and steps_of(learner) == {steps}
    assert all(weight.grad is None for weight in learner.network.parameters())


@pytest.mark.parametrize(("attention", "packed"), [("sdpa", 1), ("eager", 8)])
def test_update_takes_every_minibatch_whatever_shares_a_row(attention: str, packed: int) -> None:
    """Eight short completions of one prompt are one row with torch's attention, and eight without:
    both are divided into the four minibatches that are asked for."""
    chosen = options(
        epochs=3, minibatches=4, batch_size=8, n=8, advantage="reinforce", epoch_kl=None
    )
    model = small_llama(12)
    model.set_attn_implementation(attention)
    learner = learner_of(model, chosen)
    rows = random_ids(8, 3, 3, 2, vocabulary=12)
    samples = samples_of(*[([5, 6], row, True) for row in rows])
    batch = own_batch(learner, samples)
    assert len(batch.packed.whole[0].inputs["input_ids"]) == packed
    read: list[int] = []
    accumulate = learner.accumulate

    def counted(minibatch: Any, *arguments: Any) -> Any:
        read.append(sum(len(micro.targets) for micro in minibatch))
        return accumulate(minibatch, *arguments)

    learner.accumulate = counted  # type: ignore[method-assign]
    report = learner.update(0, batch)
    assert report["epochs"] == 3.0 and steps_of(learner) == {12}
    assert read == [2 * 3] * 12  # two completions of three tokens each


@pytest.mark.parametrize(
    ("schedule", "factors"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("constant", [1.0] * 4)]
)
def test_update_follows_the_learning_rate_schedule(schedule: str, factors: list[float]) -> None:
    chosen = options(lr_schedule=schedule, learning_rate=1e-3, critic_learning_rate=4e-3)
    assert chosen.updates == 4
    learner = learner_of(small_llama(12), chosen)
    samples = equal_samples(4, 3)
    for number, factor in enumerate(factors):
        fresh = own_batch(learner, samples)
        report = learner.update(number, fresh)
        assert report["learning_rate"] == pytest.approx(1e-3 * factor)
        rates = [group["lr"] for group in learner.optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * factor, 4e-3 * factor])


def test_critic_learning_rate_does_not_change_the_policy(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The critic starts at 0, so that the first update of the policy is the same."""
    values, rewards = {}, {}
    for rate in (None, 1e-9):
        chosen = options(episodes=32, critic_learning_rate=rate)
        cast = cast_of(tiny_tokenizer, chosen)
        history = train(tmp_path / str(rate), cast, chosen)["history"]
        assert history[0]["value"] == 0.0
        values[rate], rewards[rate] = history[1]["value"], history[1]["reward"]
    assert rewards[None] == rewards[1e-9]
    assert abs(values[1e-9]) < 1e-6 < 1e-3 < abs(values[None])
