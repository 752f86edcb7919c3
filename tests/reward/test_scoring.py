"""The one reward pass: each value against a forward of its own, one completion at a time."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rows import Ids, plain_logps, random_ids, save
from support.tiny_models import TINY_ARCHITECTURES, gemma2, qwen2
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.errors import UserError
from irl_align.reward.forward import score_head
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import ScoreRequest, TokenScores
from irl_align.reward.scoring import policy_attention, score_tokens
from irl_align.reward.settings import RewardSettings

MakeModel = Callable[[str], PreTrainedModel]
DISTINCT = random_ids(3, 2, 9, seed=1)
# Several completions of a prompt share a row; one is a token long, one ends at once (EOS is 2).
PROMPTS = [DISTINCT[0], DISTINCT[1], DISTINCT[0], DISTINCT[2], DISTINCT[0], DISTINCT[1]]
COMPLETIONS = [*random_ids(4, 2, 14, seed=2), [2], [7]]
PLAIN = RewardSettings()
EVERYTHING = RewardSettings(lm_coef=0.7, bound=20.0, mean=0.25)


@pytest.fixture
def reward(
    tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., RewardModel]:
    """``reward(arch)``: a fresh reward on a tiny policy."""

    def make(arch: str, given_settings: RewardSettings = PLAIN) -> RewardModel:
        own = {"qwen2": qwen2, "gemma2": gemma2}
        model = own[arch]() if arch in own else tiny_model(arch)
        folder = save(model, tiny_tokenizer, tmp_path / arch)
        return RewardModel.from_policy(folder, tiny_tokenizer, given_settings, seed=3)

    return make


@torch.no_grad()
def alone(reward: RewardModel, policy: PreTrainedModel, prompt: list, completion: list) -> float:
    """R(x, y) by the plainest forward: one unpadded row of this text and nothing else."""
    settings = reward.settings
    hidden = reward.model.base_model(input_ids=torch.tensor([[*prompt, *completion]]))[0][0, -1]
    value = score_head(reward.model).weight[0] @ hidden
    if settings.lm_coef and completion:
        value = value + settings.lm_coef * plain_logps(policy, prompt, completion).mean()
    if settings.bound is not None:
        value = settings.bound * torch.tanh(value / settings.bound)
    return float(value - settings.mean)


@torch.no_grad()
def eager_weights(model: PreTrainedModel, prompt: list, completion: list) -> Tensor:
    """Last layer's weights, mean over heads, of one unpadded row: (L, L)."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *completion]])
    return eager.base_model(input_ids=ids, output_attentions=True).attentions[-1][0].mean(0)


def ask(reward: object, **changes: bool) -> TokenScores:
    wanted = {"prefixes": True, "attention": True, **changes}
    return score_tokens(reward, ScoreRequest(PROMPTS, COMPLETIONS, **wanted))


def check_rows(values: Tensor, expected: list[list[float]], width: int) -> None:
    """Each row of (B, width) is the expected list, then zeros."""
    assert values.shape == (len(expected), width)
    assert values.dtype == torch.float32
    for row, numbers in zip(values, expected, strict=True):
        assert row[: len(numbers)].tolist() == pytest.approx(numbers, abs=1e-5)
        assert not row[len(numbers) :].any()


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
@pytest.mark.parametrize("given_settings", [PLAIN, EVERYTHING], ids=["head", "all"])
def test_score_tokens_gives_rewards_prefixes_and_attention(
    arch: str, given_settings: RewardSettings, reward: Callable, tiny_model: MakeModel
) -> None:
    ours, policy = reward(arch, given_settings), tiny_model(arch)
    scores = ask(ours)
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))
    expected = [[alone(ours, policy, p, c[:t]) for t in range(len(c) + 1)] for p, c in pairs]
    longest = max(map(len, COMPLETIONS))
    check_rows(scores.prefixes, expected, longest + 1)
    assert scores.rewards.tolist() == pytest.approx([row[-1] for row in expected], abs=1e-5)
    rows = [eager_weights(ours.model, p, c)[-1, len(p) :].tolist() for p, c in pairs]
    torch.testing.assert_close(
        scores.attention,
        torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows]),
        atol=1e-6,
        rtol=0,
    )
    assert scores.rewards.std() > 0.1


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_score_tokens_gives_only_what_is_requested(wanted: tuple, reward: Callable) -> None:
    ours = reward("llama")
    prefixes, attention = wanted
    scores = ask(ours, prefixes=prefixes, attention=attention)
    torch.testing.assert_close(scores.rewards, ours.score_ids(PROMPTS, COMPLETIONS, None))
    assert (scores.prefixes is not None, scores.attention is not None) == wanted
    if prefixes:
        for row, values in enumerate(ours.prefix_scores_ids(PROMPTS, COMPLETIONS)):
            assert torch.equal(scores.prefixes[row, : len(values)], values)


def test_score_tokens_takes_one_pass_for_any_request(reward: Callable) -> None:
    """No second forward, and no more columns in it."""
    ours = reward("llama")
    seen: list[tuple] = []

    def note(module: object, args: tuple, kwargs: dict) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    ask(ours)  # the first use tries out whether the model is causal
    handle = ours.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    passes = []
    for prefixes, attention in ((False, False), (True, False), (False, True), (True, True)):
        seen.clear()
        ask(ours, prefixes=prefixes, attention=attention)
        passes.append(list(seen))
    handle.remove()
    assert passes[0] == passes[1] == passes[2] == passes[3]
    assert len(passes[0]) == 1


@pytest.mark.parametrize("arch", [*TINY_ARCHITECTURES, "qwen2"])
@pytest.mark.parametrize("given_settings", [PLAIN, EVERYTHING], ids=["head", "all"])
def test_score_tokens_eos_prefixes_equal_single_prefixes(
    arch: str, given_settings: RewardSettings, reward: Callable, tiny_model: MakeModel
) -> None:
    """In one pass; mistral's window of 8 and the 4 of qwen2's last layer are shorter than rows."""
    ours = reward(arch, given_settings)
    policy = qwen2() if arch == "qwen2" else tiny_model(arch)
    scores = ask(ours, eos_prefixes=True)
    expected = [
        [*(alone(ours, policy, p, [*c[:t], 2]) for t in range(len(c))), alone(ours, policy, p, c)]
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    check_rows(scores.prefixes, expected, max(map(len, COMPLETIONS)) + 1)
    plain = ask(ours)
    torch.testing.assert_close(scores.rewards, plain.rewards, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.attention, plain.attention, atol=1e-6, rtol=0)
    assert (scores.prefixes - plain.prefixes).abs().max() > 0.1


def test_score_tokens_uses_eager_attention_for_gemma(reward: Callable) -> None:
    ours = reward("gemma2")
    ours.model.set_attn_implementation("sdpa")
    scores = ask(ours, prefixes=False)
    assert ours.model.config._attn_implementation == "sdpa"
    for number, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = eager_weights(ours.model, p, c)[-1, len(p) :]
        torch.testing.assert_close(scores.attention[number, : len(c)], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_policy_attention_by_hand(arch: str, tiny_model: MakeModel) -> None:
    policy = tiny_model(arch)
    values = policy_attention(policy, PROMPTS, COMPLETIONS)
    longest = max(map(len, COMPLETIONS))
    expected = torch.zeros(len(PROMPTS), longest)
    for row, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        weights = eager_weights(policy, p, c)
        for s in range(len(c)):
            # Token t is chosen by the query of the token before it.
            steps = [weights[len(p) + t - 1, len(p) + s] for t in range(s + 1, len(c))]
            expected[row, s] = sum(steps) / len(steps) if steps else 0.0
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    assert not values[4].any(), "a completion of one token has no mass"
    assert policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_score_tokens_does_not_depend_on_the_batch(arch: str, reward: Callable) -> None:
    ours = reward(arch, RewardSettings(lm_coef=0.5))
    tokens = st.integers(0, 319)  # pad and EOS ids included
    pairs = st.lists(
        st.tuples(st.sampled_from(DISTINCT), st.lists(tokens, min_size=1, max_size=10)),
        min_size=2,
        max_size=6,
    )

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(pairs, st.sampled_from([1, 24, 4096]), st.booleans())
    def check(rows: list, max_batch_tokens: int, eos: bool) -> None:
        prompts, completions = [p for p, _ in rows], [c for _, c in rows]
        wanted = {"prefixes": True, "attention": True, "eos_prefixes": eos}
        ours.max_batch_tokens = max_batch_tokens
        together = score_tokens(ours, ScoreRequest(prompts, completions, **wanted))
        for row, (prompt, completion) in enumerate(rows):
            single = score_tokens(ours, ScoreRequest([prompt], [completion], **wanted))
            count = len(completion)
            for name, width in (("rewards", None), ("prefixes", count + 1), ("attention", count)):
                got, one = getattr(together, name)[row], getattr(single, name)[0]
                got = got if width is None else got[:width]
                torch.testing.assert_close(got, one, atol=2e-5, rtol=1e-5)

    check()


def test_score_tokens_of_no_rows_and_empty_completions(reward: Callable) -> None:
    ours = reward("llama")
    none = score_tokens(ours, ScoreRequest([], [], prefixes=True, attention=True))
    assert (none.rewards.shape, none.prefixes.shape) == ((0,), (0, 1))
    assert none.attention.shape == (0, 0)
    empty = score_tokens(ours, ScoreRequest([[5, 6]], [[]], prefixes=True, attention=True))
    assert empty.prefixes.tolist() == [empty.rewards.tolist()]
    assert empty.attention.shape == (1, 0)


def test_score_tokens_with_eos_as_padding(reward: Callable) -> None:
    ours = reward("llama")
    expected = ask(ours)
    ours.model.config.pad_token_id = ours.tokenizer.eos_token_id
    scores = ask(ours)
    assert torch.equal(scores.prefixes, expected.prefixes)
    assert torch.equal(scores.attention, expected.attention)


def test_score_tokens_keeps_the_mode(reward: Callable) -> None:
    ours = reward("llama")
    quiet = ask(ours)
    ours.model.train()
    for module in ours.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trained = ask(ours)
    assert ours.model.training
    assert torch.equal(quiet.prefixes, trained.prefixes)
    assert not trained.rewards.requires_grad


# --- other rewards, and what is refused -----------------------------------------------------------


def test_score_tokens_of_an_implicit_reward(tiny_model: MakeModel) -> None:
    policy, reference = tiny_model("llama"), tiny_model("qwen3")
    implicit = ImplicitReward(policy, [(1.0, reference)], beta=0.5)
    scores = ask(implicit, attention=False)
    expected = []
    with torch.no_grad():
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True):
            ratio = 0.5 * (plain_logps(policy, p, c) - plain_logps(reference, p, c))
            expected.append([0.0, *ratio.cumsum(0).tolist()])
    check_rows(scores.prefixes, expected, max(map(len, COMPLETIONS)) + 1)
    assert scores.rewards.tolist() == pytest.approx([row[-1] for row in expected], abs=1e-5)
    torch.testing.assert_close(
        ask(implicit, attention=False, prefixes=False).rewards, scores.rewards
    )
    with pytest.raises(UserError, match=r"ImplicitReward has no attention to split by"):
        ask(implicit)
    with pytest.raises(UserError, match=r"ImplicitReward does not score prefixes with EOS"):
        ask(implicit, attention=False, eos_prefixes=True)


class LengthReward:
    """A reward of a user's own."""

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        return torch.tensor([float(len(c)) for c in completions])

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        return [torch.arange(len(c) + 1.0) for c in completions]


def test_score_tokens_of_a_users_reward() -> None:
    scores = score_tokens(LengthReward(), ScoreRequest([[5], [6]], [[7, 8], [9]], prefixes=True))
    assert scores.rewards.tolist() == [2.0, 1.0]
    assert scores.prefixes.tolist() == [[0.0, 1.0, 2.0], [0.0, 1.0, 0.0]]


def test_score_tokens_refuses_scores_that_are_not_finite(reward: Callable) -> None:
    ours = reward("llama")
    with torch.no_grad():
        ours.model.get_input_embeddings().weight[7] = float("nan")
    for dense in (True, False):
        with pytest.raises(UserError, match=r"rewards of completion 1 are not finite"):
            score_tokens(
                ours, ScoreRequest([[5], [6]], [[8, 9], [7]], prefixes=dense, attention=dense)
            )


def test_score_tokens_refuses_bad_requests(reward: Callable) -> None:
    ours = reward("llama")
    with pytest.raises(UserError, match=r"prompt 1 has no tokens"):
        score_tokens(ours, ScoreRequest([[5], []], [[6], [7]], prefixes=True))
    with pytest.raises(UserError, match=r"eos_prefixes without prefixes"):
        ask(ours, prefixes=False, eos_prefixes=True)
    with pytest.raises(UserError, match=r"gemma2.*expected eos_prefixes: false"):
        ask(reward("gemma2"), eos_prefixes=True)
    ours.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no EOS token"):
        ask(ours, eos_prefixes=True)


def test_score_tokens_of_a_bidirectional_reward(
    reward: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder made to look both ways, as embedding models are."""
    ours = reward("llama")
    both_ways = AutoModelForSequenceClassification.from_config(ours.model.config)
    forward = both_ways.base_model.forward

    def look_ahead(input_ids: Tensor, **options: object) -> tuple[Tensor]:
        hidden = forward(input_ids=input_ids, **options)[0]
        return (hidden + hidden.mean(1, keepdim=True),)

    monkeypatch.setattr(both_ways.base_model, "forward", look_ahead)
    ours.model = both_ways
    assert ask(ours, prefixes=False, attention=False).rewards.shape == (len(PROMPTS),)
    for changes in ({"prefixes": False}, {"attention": False}):
        with pytest.raises(UserError, match=r"reads later tokens too, so a prefix has no score"):
            ask(ours, **changes)
