"""Functions of the user's own beside a learned reward, and ensembles of heads and of models."""

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import chat_tokenizer
from support.ppo_tools import Scripted, options
from support.rows import random_ids, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.data.decoding import TokenFormat
from irl_align.data.encoding import encode_completions, encode_prompts
from irl_align.data.rows import prompt_key
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion
from irl_align.policy.ppo.rollout import collate, score
from irl_align.reward.composed import (
    FunctionError,
    FunctionInputs,
    RewardEnsemble,
    call_arguments,
    composed,
    functions_key,
    load_fitted,
    load_functions,
    member_folder,
    part_scores,
    save_ensemble,
)
from irl_align.reward.fit import bootstrap_weights
from irl_align.reward.forward import score_head
from irl_align.reward.losses import pessimistic
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import ScoreRequest
from irl_align.reward.scoring import score_tokens
from irl_align.reward.settings import RewardSettings

HERE = "support.reward_functions"
PROMPTS = random_ids(2, 2, 9, seed=1)
PROMPTS = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
COMPLETIONS = random_ids(3, 2, 9, seed=2)
MakeReward = Callable[..., RewardModel]


@pytest.fixture
def reward(
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> MakeReward:
    """``reward(seed, heads, **settings)``: a fresh reward on a tiny Llama."""
    folder = save(tiny_model("llama"), tiny_tokenizer, tmp_path / "policy")

    def make(seed: int = 3, heads: int = 1, **values: Any) -> RewardModel:
        settings = RewardSettings(**values)
        return RewardModel.from_policy(folder, tiny_tokenizer, settings, seed, heads=heads)

    return make


@pytest.fixture
def inputs(tiny_tokenizer: PreTrainedTokenizerFast) -> FunctionInputs:
    """Texts of the tiny tokenizer, without columns."""
    return FunctionInputs(TokenFormat(tiny_tokenizer, RewardSettings(template="{prompt}")), {}, {})


def with_function(learned: object, name: str, inputs: FunctionInputs, weight: float = 1.0) -> Any:
    return composed(learned, [(f"{HERE}:{name}", weight)], inputs)


# --- the mathematics


def test_pessimistic_is_the_mean_minus_deviations_over_members() -> None:
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert pessimistic(scores, 0.5).tolist() == [2.0 - 0.5 * 1.0, 2.0]
    assert pessimistic(scores, 0.0).tolist() == [2.0, 2.0]


def test_bootstrap_weights_have_mean_one_and_are_never_zero() -> None:
    weights = torch.tensor(bootstrap_weights([1.0, 2.0] * 4000, 3, seed=0))
    assert weights.shape == (8000, 3)
    assert float(weights.min()) > 0.0
    assert torch.allclose(weights[::2].mean(0), torch.ones(3), atol=0.05)
    assert torch.allclose(weights[1::2].mean(0), torch.full((3,), 2.0), atol=0.1)


# --- ensembles


def by_hand(rewards: list[RewardModel], penalty: float) -> list[float]:
    """Mean minus deviations of single rewards, by the statistics module."""
    rows = zip(*(r.score_ids(PROMPTS, COMPLETIONS, None).tolist() for r in rewards), strict=True)
    return [statistics.mean(row) - penalty * statistics.pstdev(row) for row in rows]


def single_heads(reward: MakeReward, ensemble: RewardModel, **values: Any) -> list[RewardModel]:
    """Rewards with one of the heads each."""
    singles = []
    for weight in score_head(ensemble.model).weight:
        singles.append(reward(**values))
        score_head(singles[-1].model).weight.data = weight.detach()[None].clone()
    return singles


@pytest.mark.parametrize("values", [{}, {"bound": 1.0}, {"lm_coef": 0.5}, {"echo": True}])
def test_heads_score_as_single_heads_do(reward: MakeReward, values: dict[str, Any]) -> None:
    ensemble = reward(heads=3, penalty=0.7, **values)
    expected = by_hand(single_heads(reward, ensemble, **values), 0.7)
    assert ensemble.score_ids(PROMPTS, COMPLETIONS).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("eos", [False, True])
def test_heads_score_prefixes_in_the_same_pass(reward: MakeReward, eos: bool) -> None:
    ensemble = reward(heads=3, penalty=0.7, lm_coef=0.3)
    request = ScoreRequest(PROMPTS, COMPLETIONS, prefixes=True, eos_prefixes=eos)
    singles = [score_tokens(one, request) for one in single_heads(reward, ensemble, lm_coef=0.3)]
    scores = score_tokens(ensemble, request)
    assert scores.prefixes is not None
    stacked = torch.stack([one.prefixes for one in singles if one.prefixes is not None], -1)
    assert torch.allclose(scores.prefixes, pessimistic(stacked, 0.7), atol=1e-5)
    last = [scores.prefixes[i, len(c)] for i, c in enumerate(COMPLETIONS)]
    assert torch.allclose(torch.stack(last), scores.rewards, atol=1e-5)


def test_centre_removes_what_pairs_leave_free_of_each_head(reward: MakeReward) -> None:
    ensemble = reward(heads=2, penalty=1.0)
    ensemble.centre(PROMPTS, COMPLETIONS)
    heads = ensemble.head_scores_ids(PROMPTS, COMPLETIONS)
    assert heads.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    rewards = ensemble.score_ids(PROMPTS, COMPLETIONS)
    assert float(rewards.mean()) == pytest.approx(0.0, abs=1e-6)


def test_heads_are_saved_and_loaded(reward: MakeReward, tmp_path: Path) -> None:
    ensemble = reward(heads=2, penalty=0.5)  # transformers does not save two labels
    ensemble.centre(PROMPTS, COMPLETIONS)
    ensemble.save_pretrained(tmp_path / "saved")
    again = load_fitted(tmp_path / "saved")
    expected = ensemble.score_ids(PROMPTS, COMPLETIONS)
    assert torch.equal(again.score_ids(PROMPTS, COMPLETIONS), expected)


def test_models_are_saved_loaded_and_combined(reward: MakeReward, tmp_path: Path) -> None:
    members = [reward(seed=1), reward(seed=2)]
    for number, member in enumerate(members):
        member.save_pretrained(member_folder(tmp_path / "saved", number))
    expected = by_hand(members, 0.7)
    save_ensemble(members[1], 0.7, 0.25, tmp_path / "saved")
    ensemble = load_fitted(tmp_path / "saved")
    assert isinstance(ensemble, RewardEnsemble)
    scores = ensemble.score_ids(PROMPTS, COMPLETIONS) + 0.25
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)

    request = ScoreRequest(PROMPTS, COMPLETIONS, prefixes=True, attention=True)
    tokens = score_tokens(ensemble, request)
    assert tokens.prefixes is not None and tokens.attention is not None
    assert torch.allclose(tokens.rewards + 0.25, torch.tensor(expected), atol=1e-6)
    attention = [score_tokens(m, request).attention for m in members]
    assert torch.allclose(tokens.attention, sum(attention) / 2)
    prefixes = ensemble.prefix_scores_ids(PROMPTS, COMPLETIONS)
    assert torch.allclose(prefixes[1], tokens.prefixes[1, : len(prefixes[1])], atol=1e-5)


def test_part_scores_of_an_ensemble_have_its_deviation(reward: MakeReward) -> None:
    ensemble = reward(heads=3, penalty=0.7)
    parts = part_scores(ensemble, PROMPTS, COMPLETIONS)
    heads = ensemble.head_scores_ids(PROMPTS, COMPLETIONS)
    expected = [statistics.pstdev(row) for row in heads.tolist()]
    assert parts["deviation"].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(parts["reward"], ensemble.score_ids(PROMPTS, COMPLETIONS))


# --- functions


def test_composed_reward_adds_weighted_functions(inputs: FunctionInputs) -> None:
    learned = Scripted(lambda prompt, completion: float(len(completion)))
    paths = [(f"{HERE}:words", -0.5), (f"{HERE}:only_the_first", 2.0)]
    reward = composed(learned, paths, inputs)
    texts = [inputs.policy.tokenizer.decode(ids) for ids in COMPLETIONS]
    words = [float(len(text.split())) for text in texts]
    first = [3.0, 0.0, 0.0]  # None counts as 0
    expected = [
        len(ids) - 0.5 * w + 2.0 * f for ids, w, f in zip(COMPLETIONS, words, first, strict=True)
    ]
    assert reward.score_ids(PROMPTS, COMPLETIONS).tolist() == pytest.approx(expected)
    parts = part_scores(reward, PROMPTS, COMPLETIONS)
    assert list(parts) == ["reward", "learned", f"{HERE}:words", f"{HERE}:only_the_first"]
    assert parts["reward"].tolist() == pytest.approx(expected)
    assert parts[f"{HERE}:words"].tolist() == words
    assert composed(learned, [], inputs) is learned


def test_composed_reward_of_functions_only_has_no_prefixes(inputs: FunctionInputs) -> None:
    reward = with_function(None, "words", inputs, 2.0)
    parts = part_scores(reward, PROMPTS, COMPLETIONS)
    assert torch.equal(parts["reward"], 2.0 * parts[f"{HERE}:words"])
    assert torch.equal(reward.score_ids(PROMPTS, COMPLETIONS), parts["reward"])
    with pytest.raises(UserError, match="functions score whole completions only"):
        score_tokens(reward, ScoreRequest(PROMPTS, COMPLETIONS, prefixes=True))
    with pytest.raises(UserError, match="functions score whole completions only"):
        reward.prefix_scores_ids(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("credit", ["sparse", "uniform", "red", "abc", "random"])
def test_credit_distributes_the_learned_part_only(
    reward: MakeReward, inputs: FunctionInputs, credit: str
) -> None:
    """A function's value is on the last token, whatever the credit of the learned part."""
    learned = reward()
    total = with_function(learned, "words", inputs, 10.0)
    samples = collate(
        PROMPTS, [Completion(ids, torch.zeros(len(ids)).numpy(), False) for ids in COMPLETIONS]
    )

    def token_credit(function: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = options(credit=credit)
        return score(samples, function, learned.model, given, generator).credit

    added = token_credit(total) - token_credit(learned)
    words = part_scores(total, PROMPTS, COMPLETIONS)[f"{HERE}:words"]
    for row, (ids, count) in enumerate(zip(COMPLETIONS, words.tolist(), strict=True)):
        expected = [0.0] * added.shape[1]
        expected[len(ids) - 1] = 10.0 * count
        assert added[row].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised ZeroDivisionError: no words; expected a list of 3 numbers; it gets "),
        ("needs_answer", "missing 1 required positional argument: 'answer'"),
        ("one_short", "returned 2 values, expected a list of 3 numbers"),
        ("one_number", "returned float, expected a list of 3 numbers"),
        ("text", "returned 'good' for completion 0, expected a finite number"),
        ("nan", "returned nan for completion 0, expected a finite number"),
        ("infinite", "returned inf for completion 0, expected a finite number"),
    ],
)
def test_scores_refuse_what_is_not_a_number_each(
    inputs: FunctionInputs, name: str, message: str
) -> None:
    reward = with_function(None, name, inputs)
    with pytest.raises(FunctionError) as caught:
        reward.score_ids(PROMPTS, COMPLETIONS)
    text = str(caught.value)
    assert text.startswith(f"reward.functions: {HERE}:{name} ") and message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "cannot import no_such_module:f: No module named 'no_such_module'"),
        (f"{HERE}:none", f"cannot import {HERE}:none: module '{HERE}' has no attribute 'none'"),
        (f"{HERE}:number", f"found {HERE}:number, a int, expected a function"),
    ],
)
def test_load_functions_refuses_what_is_no_function(path: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^reward\.functions: ") as caught:
        load_functions([(path, 1.0)])
    assert message in str(caught.value)


def test_load_functions_tells_of_a_module_that_fails(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot import broken_rewards:f: SyntaxError: "):
        load_functions([("broken_rewards:f", 1.0)])


def test_functions_key_follows_the_source_path_weight_and_columns(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_rewards.py").write_text("def f(completions, **_):\n    return [0]\n")
    (tmp_path / "own_rewards.py").write_text("from helper_rewards import f\n")
    given = [("own_rewards:f", 1.0)]
    before = functions_key(given)
    assert functions_key(given) == before
    assert functions_key([("own_rewards:f", 2.0)]) != before
    assert functions_key([("helper_rewards:f", 1.0)]) != before
    assert functions_key(given, "columns") != before
    # The file that defines the function counts, not only the one that the path names.
    (tmp_path / "helper_rewards.py").write_text("def f(completions, **_):\n    return [1]\n")
    assert functions_key(given) != before


def test_functions_key_takes_functions_without_a_file(monkeypatch: Any) -> None:
    module = type(sys)("made_rewards")
    module.part = functools.partial(max, 1)
    monkeypatch.setitem(sys.modules, "made_rewards", module)
    assert functions_key([("made_rewards:part", 1.0)])
    assert functions_key([("math:sqrt", 1.0)]) != functions_key([("math:exp", 1.0)])


# --- what a function gets


def test_call_arguments_are_those_of_grpo() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    arguments = call_arguments(
        ["Hi", chat], ["a", "b"], [[5, 2], [6]], [{"answer": 1}, {"answer": 2}]
    )
    assert arguments == {
        "prompts": ["Hi", chat],
        "completions": ["a", [{"role": "assistant", "content": "b"}]],
        "completion_ids": [[5, 2], [6]],
        "answer": [1, 2],
    }


def test_function_inputs_are_texts_without_what_the_template_writes() -> None:
    tokenizer = chat_tokenizer("chatml")
    card = RewardSettings(template="chat")
    prompts = ["Hi", [{"role": "user", "content": "And?"}]]
    ids = encode_prompts(prompts, tokenizer, card)
    answers = encode_completions(prompts, ["Ho", "Yes"], ids, tokenizer, card)
    known = dict(zip(map(tuple, ids), prompts, strict=True))
    columns = {"answer": [7]}
    inputs = FunctionInputs(
        TokenFormat(tokenizer, card, known), {prompt_key("Hi"): columns}, {"answer": None}
    )
    arguments = inputs.arguments(ids, answers)
    assert arguments["prompts"] == prompts
    assert arguments["completions"] == ["Ho", [{"role": "assistant", "content": "Yes"}]]
    assert arguments["completion_ids"] == answers
    assert arguments["answer"] == [[7], None]
