"""PPO as a whole: it learns, its gradient is the formula's, and dense credit at 0 is sparse."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_tools import (
    EOS,
    PAD,
    Scripted,
    actors,
    options,
    small_llama,
    train,
)
from support.rows import plain_logps, random_ids, same_weights, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.models.generation.protocol import Completion
from irl_align.models.loading import load_model
from irl_align.policy.ppo import advantages as adv
from irl_align.policy.ppo.critic import make_critic
from irl_align.policy.ppo.learner import Batch, Learner, make_accelerator, padded_batches
from irl_align.policy.ppo.monitors import find_alarms, rollout_report
from irl_align.policy.ppo.network import Network
from irl_align.policy.ppo.rollout import RolloutBatch, collate, prompt_passes, score
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.utils.hardware import in_bf16

MakeModel = Callable[[str], PreTrainedModel]
CPU = torch.device("cpu")


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "reinforce"])
def test_solves_a_bandit(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, advantage: str
) -> None:
    """One token; the arm that pays depends on the prompt. Optimum 1, at random 1/12."""
    groups = advantage in ("rloo", "grpo")
    chosen = options(
        batch_size=64,
        episodes=64 * 30,
        epochs=4,
        kl_coef=0.0,
        advantage=advantage,
        n=4 if groups else 1,
        kl="loss" if advantage == "grpo" else "reward",
        evaluate_every=100,
    )
    reward = Scripted(lambda prompt, completion: float(completion[0] == 3 + prompt[0] % 5))
    cast = actors(small_llama(12), reward, tiny_tokenizer, [[i] for i in range(3, 8)], chosen, 1)
    report = train(tmp_path / "work", cast, chosen)
    assert report["history"][0]["reward"] < 0.3
    last = [record["reward"] for record in report["history"][-4:]]
    assert sum(last) / 4 > 0.95


@pytest.mark.parametrize("credit", ["sparse", "red"])
def test_solves_a_copy_task(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, credit: str
) -> None:
    """Five steps: repeat the prompt's five tokens of two kinds. Optimum 1, the share right."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 5, (16, 5), generator=draw).tolist()
    chosen = options(
        batch_size=64,
        episodes=64 * 60,
        epochs=4,
        kl_coef=0.0,
        entropy_coef=0.01,
        credit=credit,
        evaluate_every=100,
        samples_kept=0,
    )

    def right(prompt: list[int], completion: list[int]) -> float:
        return sum(a == b for a, b in zip(prompt, completion, strict=False)) / 5

    cast = actors(small_llama(8, layers=2), Scripted(right), tiny_tokenizer, prompts, chosen, 5)
    history = train(tmp_path / "work", cast, chosen)["history"]
    assert history[0]["reward"] < 0.25
    last = [record["reward"] for record in history[-5:]]
    assert sum(last) / 5 > 0.95


# --- the gradient ---------------------------------------------------------------------------------


def batch_of(model: PreTrainedModel, n: int, seed: int, chosen: PPOOptions) -> Batch:
    """Random samples, n per prompt, with log-probs near the model's and random advantages."""
    draw = torch.Generator().manual_seed(seed)
    distinct = random_ids(6 // n, 2, 5, seed, vocabulary=20)
    prompts = [prompt for prompt in distinct for _ in range(n)]
    rows = random_ids(len(prompts), 1, 7, seed + 1, vocabulary=20)
    completions = []
    for prompt, row in zip(prompts, rows, strict=True):
        logps = plain_logps(model, prompt, row).detach()
        noise = 0.3 * torch.randn(len(row), generator=draw)
        completions.append(Completion(row, (logps + noise).float().numpy(), True))
    samples = collate(prompts, completions)
    shape = samples.mask.shape

    def noise_like() -> torch.Tensor:
        return torch.randn(shape, generator=draw) * samples.mask

    return Batch(
        samples,
        samples.logps,
        noise_like(),
        samples.logps + 0.2 * noise_like(),
        chosen.kl_coef,
        noise_like(),
        noise_like(),
    )


def plain_loss(network: Network, batch: Batch, chosen: PPOOptions) -> torch.Tensor:
    """PPO's loss of a rollout, token by token, from one unpadded forward per sample."""
    assert batch.reference_logps is not None
    assert batch.old_values is not None and batch.targets is not None
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for i, (prompt, row) in enumerate(
        zip(batch.samples.prompts, batch.samples.completions, strict=True)
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
            apart = batch.reference_logps[i, t] - logp
            kl = apart.exp() - apart - 1
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
    found = {
        name: weight.grad.double().clone()
        for name, weight in network.named_parameters()
        if weight.grad is not None
    }
    network.zero_grad()
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3", "mistral"])
@pytest.mark.parametrize(("n", "critic"), [(1, "separate"), (3, "shared")])
def test_gradient_is_the_formulas_however_the_rollout_is_cut(
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    arch: str,
    n: int,
    critic: str,
) -> None:
    """Policy, k3, entropy and clipped value loss, meaned over tokens: against a plain loop over
    unpadded rows, for one micro-batch, for one row each, and for prompts that are shared."""
    chosen = options(kl="loss", entropy_coef=0.02, critic=critic, n=n, batch_size=6, kl_coef=0.1)
    model = tiny_model(arch).float()
    network = Network(model, make_critic(chosen, model, Scripted(len), tiny_tokenizer), 1.0)  # type: ignore[arg-type]
    assert network.critic is not None
    with torch.no_grad():
        network.critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    batch = batch_of(model, n, 5, chosen)
    plain_loss(network, batch, chosen).backward()
    want = gradients(network)
    assert len(want) > 10
    learner = Learner(network, chosen, CPU, 0, PAD, make_accelerator(CPU, False))
    micro = learner.micro(batch.samples)
    assert (len(micro.rows) < 6) == (n > 1 and arch != "mistral")
    for limit in (1, 40, 10_000):
        cut = micro.batches(range(len(micro.rows)), limit)
        assert limit > 1 or len(cut) == len(micro.rows)
        _, count, _ = learner._accumulate(cut, learner._on_device(batch), batch.kl_coef, 0)
        assert count == int(batch.samples.mask.sum())
        got = gradients(network)
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            scale = float(want[name].abs().max())
            assert torch.allclose(gradient, want[name], atol=3e-5 * max(scale, 1e-2), rtol=0), name


def test_checkpointing_changes_no_gradient(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Nor does a dropout that the model comes with."""
    found = []
    for checkpointing in (False, True):
        chosen = options(gradient_checkpointing=checkpointing, kl="loss", batch_size=6)
        model = tiny_model("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        network = Network(model, make_critic(chosen, model, Scripted(len), tiny_tokenizer), 1.0)  # type: ignore[arg-type]
        batch = batch_of(tiny_model("gpt2"), 1, 5, chosen)
        learner = Learner(network, chosen, CPU, 0, PAD, make_accelerator(CPU, False))
        assert model.is_gradient_checkpointing == checkpointing
        whole = learner.whole(learner.micro(batch.samples))
        learner._accumulate(whole, learner._on_device(batch), batch.kl_coef, 0)
        found.append(gradients(network))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-8) for name in found[0])


def test_micro_batches_hold_every_row_once_and_little_padding() -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = 35 + 10 * torch.randn(512, generator=draw)
    completions = 28 + 9 * torch.randn(512, generator=draw)
    lengths = (prompts + completions).clamp(min=10).long().tolist()
    batches = list(padded_batches(lengths, 4096))
    assert sorted(row for batch in batches for row in batch) == list(range(512))
    slots = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert max(slots) <= 4096
    assert 1 - sum(lengths) / sum(slots) < 0.05
    assert len(batches) < 25
    assert list(padded_batches([9, 5000, 8], 4096)) == [[1], [0, 2]]


# --- credit ---------------------------------------------------------------------------------------


def reward_model(folder: Path, tokenizer: PreTrainedTokenizerFast, model: Any) -> RewardModel:
    save(model, tokenizer, folder)
    settings = RewardSettings(mean=0.3, std=1.7)
    return RewardModel.from_policy(folder, tokenizer, settings, seed=3)


def test_dense_credit_at_0_is_sparse_bit_by_bit(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = small_llama(12, layers=2)
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, model)
    prompts = random_ids(8, 2, 5, 0, vocabulary=12)
    ways: list[dict[str, Any]] = [
        {"credit": "sparse"},
        {"credit": "red", "beta_c": 0.0},
        {"credit": "abc", "beta": 0.0},
        {"credit": "abc_policy", "beta": 0.0},
        {"credit": "random", "beta": 0.0},
    ]
    ended = []
    for number, way in enumerate(ways):
        chosen = options(episodes=48, missing_eos="subtract", minibatches=2, **way)
        cast = actors(model, reward, tiny_tokenizer, prompts, chosen)
        report = train(tmp_path / str(number), cast, chosen)
        ended.append((cast.policy, [record["kl"] for record in report["history"]]))
    for policy, kl in ended[1:]:
        assert same_weights(policy, ended[0][0]) and kl == ended[0][1]
    assert not same_weights(ended[0][0], model)
    moved = options(episodes=48, missing_eos="subtract", minibatches=2, credit="red")
    cast = actors(model, reward, tiny_tokenizer, prompts, moved)
    train(tmp_path / "red", cast, moved)
    assert not same_weights(cast.policy, ended[0][0])


def samples_of(*rows: tuple[list[int], list[int], bool]) -> RolloutBatch:
    zeros = [Completion(c, torch.zeros(len(c)).numpy(), cut) for _, c, cut in rows]
    return collate([prompt for prompt, _, _ in rows], zeros)


@pytest.mark.parametrize(
    ("way", "returns"),
    [
        ({"missing_eos": "replace"}, [6.0, -1.0]),
        ({"missing_eos": "replace", "missing_eos_value": -4.0}, [6.0, -4.0]),
        ({"missing_eos": "subtract"}, [6.0, 8.0]),
        ({"missing_eos": "subtract", "missing_eos_value": 2.5}, [6.0, 6.5]),
        ({"missing_eos": "ignore"}, [6.0, 9.0]),
        ({"missing_eos": "subtract", "clip_reward": 7.0}, [6.0, 6.0]),
    ],
)
def test_missing_eos_changes_the_terminal_slot(way: dict[str, Any], returns: list[float]) -> None:
    """R is the sum of a completion's ids: 4 + 2 with EOS, 4 + 5 without."""
    samples = samples_of(([3], [4, EOS], False), ([3], [4, 5], True))
    reward = Scripted(lambda prompt, completion: float(sum(completion)))
    for credit in ("sparse", "uniform", "red"):
        chosen = options(credit=credit, **way)
        scored = score(samples, reward, small_llama(12), chosen, torch.Generator())
        assert scored.returns.tolist() == returns
        assert scored.rewards.tolist() == [6.0, 9.0]
        assert scored.credit.sum(1).tolist() == pytest.approx(returns)  # red: R(x, empty) is 0
        clipped = [min(r, way.get("clip_reward", math.inf)) for r in (6.0, 9.0)]
        first = {"sparse": [0.0, 0.0], "uniform": [r / 2 for r in clipped], "red": [4.0, 4.0]}
        assert scored.credit[:, 0].tolist() == first[credit]


@pytest.mark.parametrize("missing_eos", ["replace", "subtract"])
def test_centred_rewards_sum_to_r_less_its_mean(missing_eos: str) -> None:
    """R is 4 + 2, 4 + 5 and 4 + 4 + 2 before the one without EOS becomes -1, or loses 1."""
    samples = samples_of(([3], [4, EOS], False), ([3], [4, 5], True), ([3], [4, 4, EOS], False))
    reward = Scripted(lambda prompt, completion: float(sum(completion)))
    returns, mean = {"replace": ([6, -1, 10], 5), "subtract": ([6, 8, 10], 8)}[missing_eos]
    for credit in ("sparse", "uniform", "red"):
        way = {"credit": credit, "missing_eos": missing_eos, "center_rewards": True}
        draws = torch.Generator()
        scored = score(samples, reward, small_llama(12), options(**way), draws)
        assert scored.returns.tolist() == returns and scored.rewards.tolist() == [6, 9, 10]
        assert scored.credit.sum(1).tolist() == pytest.approx([r - mean for r in returns])
        plain = score(
            samples, reward, small_llama(12), options(**way | {"center_rewards": False}), draws
        )
        moved = scored.credit - plain.credit  # red, like sparse, moves the last token alone
        last = [[0.0, -mean, 0.0], [0.0, -mean, 0.0], [0.0, 0.0, -mean]]
        even = [[-mean / 2, -mean / 2, 0.0]] * 2 + [[-mean / 3] * 3]
        assert torch.allclose(moved, torch.tensor(even if credit == "uniform" else last))


def test_credit_of_eos_is_told_of_samples_that_end() -> None:
    """The reward is 10 with EOS and 0 without, so red pays EOS."""
    ended, cut = ([3], [4, 5, EOS], False), ([3], [4, 5], True)
    reward = Scripted(lambda prompt, completion: 10.0 * (completion[-1:] == [EOS]))
    chosen = options(credit="red", missing_eos="ignore")
    for rows, told in (((ended, cut), 10.0), ((cut,), None)):
        samples = samples_of(*rows)
        scored = score(samples, reward, small_llama(12), chosen, torch.Generator())
        zeros = torch.zeros_like(samples.logps)
        assert rollout_report(samples, scored, zeros, zeros, None).get("eos_credit") == told


def test_red_pays_eos_nothing_where_prefixes_have_it_too(
    tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, tiny_model("llama"))
    samples = samples_of(([3], [4, 5, EOS], False), ([3, 6], [4, EOS], False))
    for eos_prefixes in (True, False):
        chosen = options(credit="red", eos_prefixes=eos_prefixes)
        scored = score(samples, reward, tiny_model("llama"), chosen, torch.Generator())
        zeros = torch.zeros_like(samples.logps)
        on_eos = rollout_report(samples, scored, zeros, zeros, None)["eos_credit"]
        assert (abs(on_eos) < 1e-5) is eos_prefixes


def test_centred_uniform_credit_does_not_pay_for_length() -> None:
    """All completions are worth -6, of 2 or of 6 tokens: rewards-to-go tell the short ones from the
    long ones at the first tokens they share, unless R is centred."""
    short, long = [4, EOS], [4, 4, 4, 4, 4, EOS]
    samples = samples_of(([3], short, False), ([3], long, False))
    reward = Scripted(lambda prompt, completion: -6.0)
    for centred in (False, True):
        chosen = options(credit="uniform", center_rewards=centred)
        scored = score(samples, reward, small_llama(12), chosen, torch.Generator())
        after_first = adv.rewards_to_go(scored.credit, samples.mask)[:, 1].tolist()
        assert after_first == pytest.approx([0.0, 0.0] if centred else [-3.0, -5.0])


def test_rewards_carry_no_gradient_and_do_not_change(
    tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, tiny_model("llama"))
    before = copy.deepcopy(reward.model)
    chosen = options(credit="abc", critic_init="reward", episodes=32)
    cast = actors(tiny_model("llama"), reward, tiny_tokenizer, random_ids(8, 2, 5, 0), chosen)
    history = train(tmp_path / "work", cast, chosen)["history"]
    assert same_weights(reward.model, before)
    assert all(weight.grad is None for weight in reward.model.parameters())
    assert 0 < history[0]["attention_mass"] < 1
    assert history[0]["attention_entropy"] > 0


# --- critics --------------------------------------------------------------------------------------


def test_critics_start_at_the_rewards_prefixes_or_at_zero(
    tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama")
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, model)
    prompts, rows = random_ids(4, 2, 5, 0), random_ids(4, 1, 6, 1)
    samples = samples_of(*[(p, c, True) for p, c in zip(prompts, rows, strict=True)])
    starts = {}
    for name, way in {
        "reward": {"critic_init": "reward"},
        "zero": {"critic_init": "zero"},
        "shared": {"critic": "shared"},
    }.items():
        chosen = options(**way)
        critic = make_critic(chosen, model, reward, tiny_tokenizer)
        learner = Learner(
            Network(model, critic, 1.0), chosen, CPU, 0, PAD, make_accelerator(CPU, False)
        )
        micro = learner.micro(samples)
        _, values = learner.infer(micro, learner.whole(micro), False, True)
        assert values is not None
        starts[name] = values
    assert not starts["zero"].any() and not starts["shared"].any()
    for row, prefixes in enumerate(reward.prefix_scores_ids(prompts, rows)):
        got = starts["reward"][row, : len(rows[row])]
        assert torch.allclose(got, prefixes[:-1], atol=1e-5)


# --- options, each of which runs ------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"critic": "shared", "minibatches": 3},
        {"temperature": 0.7, "kl_target": 2.0, "kl_horizon": 100},
        {"advantage": "rloo", "n": 4, "whiten_rewards": True, "clip_token_rewards": 1.0},
        {"advantage": "grpo", "n": 4, "kl": "loss", "whiten_advantages": "scale_only"},
        {"credit": "red", "eos_prefixes": True, "gamma": 0.9, "dynamic_initialisation": False},
        {"advantage": "reinforce", "credit": "uniform", "lr_schedule": "constant"},
        {"credit": "abc", "center_rewards": True},
    ],
    ids=str,
)
def test_every_way_starts_at_ratio_1_and_kl_0(
    tmp_path: Path,
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    way: dict[str, Any],
) -> None:
    model = tiny_model("llama")
    reward = reward_model(tmp_path / "sft", tiny_tokenizer, model)
    chosen = options(episodes=48, **way)
    cast = actors(model, reward, tiny_tokenizer, random_ids(8, 2, 5, 0), chosen)
    report = train(tmp_path / "work", cast, chosen)
    first, last = report["history"][0], report["history"][-1]
    exact = 5e-2 if in_bf16(chosen.bf16, on_cpu=True) else 1e-4
    assert first["first_log_ratio"] < exact and abs(first["kl"]) < 6 * exact
    assert all(math.isfinite(v) for v in last.values() if isinstance(v, float))
    assert report["updates"] == 3 and last["episodes_done"] == 48
    assert not same_weights(cast.policy, model)
    assert same_weights(load_model(tmp_path / "work/model"), cast.policy)
    changes = [record["kl_coef"] for record in report["history"]]
    assert (len(set(changes)) > 1) == (chosen.kl_target is not None)


def test_temperature_is_that_of_the_log_probs(
    tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Sampler, learner and reference at temperature 0.5 agree with logits / 0.5."""
    model = tiny_model("llama")
    chosen = options(temperature=0.5)
    learner = Learner(Network(model, None, 0.5), chosen, CPU, 0, PAD, make_accelerator(CPU, False))
    prompt, row = [5, 9], [11, 4, 7]
    micro = learner.micro(samples_of((prompt, row, True)))
    got, _ = learner.infer(micro, learner.whole(micro), True, False)
    logits = model(input_ids=torch.tensor([[*prompt, *row]])).logits[0, 1:4].double() / 0.5
    want = torch.softmax(logits, -1).log()[range(3), row]
    assert got is not None and torch.allclose(got[0].double(), want, atol=1e-5)


# --- prompts --------------------------------------------------------------------------------------


def test_passes_take_every_prompt_once_and_go_on_where_they_were() -> None:
    prompts = [[i] for i in range(10)]
    whole = prompt_passes(prompts, 7, 0, 25)
    assert [number for number, _ in whole] == [0, 1, 2]
    assert [len(part) for _, part in whole] == [10, 10, 5]
    for _, part in whole[:2]:
        assert sorted(part) == prompts
    assert whole[0][1] != whole[1][1]
    flat = [prompt for _, part in whole for prompt in part]
    again = [
        prompt
        for start in range(0, 25, 5)
        for _, part in prompt_passes(prompts, 7, start, 5)
        for prompt in part
    ]
    assert again == flat


# --- alarms ---------------------------------------------------------------------------------------


def records(lengths: list[float], rewards: list[float], kl: float = 0.1) -> list[dict[str, Any]]:
    return [
        {"length": length, "reward": reward, "reward_std": 1.0, "kl": kl, "sampler_log_ratio": 1e-6}
        for length, reward in zip(lengths, rewards, strict=True)
    ]


def test_alarms() -> None:
    chosen = options(kl_target=1.0, kl_alarm=5.0)
    quiet = records([10.0] * 10, [0.0] * 10)
    assert find_alarms(quiet, chosen) == []
    rising = records([10.0] * 5 + [12.0] * 5, [0.0] * 5 + [1.0] * 5)
    assert find_alarms(rising, chosen) == [
        "length and reward rise together over 10 updates: 10.0 to 12.0 tokens, 0 to 1"
    ]
    assert find_alarms(rising[1:], chosen) == []  # too few to tell
    assert find_alarms(records([10.0] * 5 + [12.0] * 5, [0.0] * 10), chosen) == []
    far = find_alarms(records([10.0], [0.0], kl=6.0), chosen)
    assert far == [
        "KL to the reference is 6.00 nats, more than twice its target 1",
        "KL to the reference is 6.00 nats, above kl_alarm 5",
    ]
    (apart,) = find_alarms([{**quiet[0], "sampler_log_ratio": 0.3}], chosen)
    assert apart.startswith("sampler and learner differ by 0.3 in a token's log-prob, above")
    assert find_alarms([{**quiet[0], "sampler_log_ratio": 0.3}], options(sampler_gap_alarm=1)) == []
    ending = [{**quiet[0], "eos_credit": -1.1}]
    (paid,) = find_alarms(ending, options(credit="red"))
    assert paid.startswith("EOS gets credit -1.10 in the mean from red, where rewards deviate by 1")
    assert find_alarms([{**quiet[0], "eos_credit": 0.9}], options(credit="red")) == []
    assert find_alarms(ending, chosen) == []  # sparse: all of R is there
    for way in ({"beta_c": 0.0}, {"eos_prefixes": True}):  # sparse too; mended already
        assert find_alarms(ending, options(credit="red", **way)) == []
    (broken,) = find_alarms([{**quiet[0], "entropy": math.nan}], chosen)
    assert broken == "entropy is not finite"
