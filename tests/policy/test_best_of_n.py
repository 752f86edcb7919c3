"""Best-of-N's choices by hand, the identity's one condition, and what names a policy."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import plain_logps
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import BestOfNOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.generation.samples import SampleSet
from irl_align.models.loading import load_model
from irl_align.models.trl import Training
from irl_align.policy import Demonstrations, Policy, Ranking, Reward, UpdateRequest
from irl_align.policy.best_of_n import (
    BestOfN,
    best_against_worst,
    best_columns,
    choose_prompts,
    score_report,
)
from irl_align.policy.identity import Identity
from irl_align.policy.roles import Role
from irl_align.reward.ranking import rank_samples, sample_rewards

INF = float("inf")


def completion(
    ids: list[int], logprobs: list[float] | None = None, cut: bool = False
) -> Completion:
    values = np.array(logprobs or [-1.0] * len(ids), np.float32)
    return Completion(ids, values, truncated=cut)


class Sum:
    """A reward function: the sum of the completion's ids, less the prompt's first."""

    def score_ids(self, prompts: Any, completions: Any) -> torch.Tensor:
        return torch.tensor(
            [float(sum(c) - p[0]) for p, c in zip(prompts, completions, strict=True)]
        )

    def prefix_scores_ids(self, prompts: Any, completions: Any) -> list[torch.Tensor]:
        raise NotImplementedError


SAMPLES = SampleSet(
    [[10], [20]],
    [
        [
            completion([5, 2], [-1, -2]),
            completion([9, 2], [-3, -3]),
            completion([99], [-0.1], True),
        ],
        [
            completion([30, 2], [-2, -4]),
            completion([3, 2], [-1, -1]),
            completion([40, 2], [-4, -2]),
        ],
    ],
)


# --- ranking --------------------------------------------------------------------------------------


def test_rank_by_reward() -> None:
    got = rank_samples(SAMPLES, sample_rewards(SAMPLES, Sum()), "reward")
    assert got.tolist() == [[-3.0, 1.0, -INF], [12.0, -15.0, 22.0]]


def test_rank_by_mean_logprob_needs_no_reward() -> None:
    got = rank_samples(SAMPLES, None, "logprob")
    assert got.tolist() == [[-1.5, -3.0, -INF], [-3.0, -1.0, -3.0]]


def test_rank_by_mean_logprob_of_the_policy_and_not_of_top_p() -> None:
    """A policy gives -1 to every token but 9, so that the log-probs of its sampler do not rank."""

    def of_policy(prompts: Any, completions: Any) -> list[np.ndarray]:
        assert [list(p) for p in prompts] == [list(p) for p in SAMPLES.prompts for _ in range(3)]
        return [np.array([-5.0 if i == 9 else -1.0 for i in row]) for row in completions]

    got = rank_samples(SAMPLES, None, "logprob", of_policy)
    assert got.tolist() == [[-1.0, -3.0, -INF], [-1.0, -1.0, -1.0]]


def test_rank_by_both_brings_each_to_variance_1_over_the_finished() -> None:
    rewards, logps = [-3.0, 1.0, 12.0, -15.0, 22.0], [-1.5, -3.0, -3.0, -1.0, -3.0]

    def std(values: list[float]) -> float:
        mean = sum(values) / 5
        return (sum((v - mean) ** 2 for v in values) / 5) ** 0.5

    both = [r / std(rewards) + q / std(logps) for r, q in zip(rewards, logps, strict=True)]
    got = rank_samples(SAMPLES, sample_rewards(SAMPLES, Sum()), "both")
    assert got[np.isfinite(got)].tolist() == pytest.approx(both)
    assert got[0, 2] == -INF


def test_rank_by_both_of_equal_rewards_is_the_logprobs() -> None:
    same = SampleSet([[1]], [[completion([4, 2], [-1, -1]), completion([4, 2], [-2, -2])]])
    got = rank_samples(same, sample_rewards(same, Sum()), "both")
    assert got[0, 0] - got[0, 1] == pytest.approx(2.0)  # -1 and -2 have standard deviation 1/2


def test_rank_where_nothing_is_finished() -> None:
    cut = SampleSet([[1]], [[completion([4], cut=True), completion([5], cut=True)]])
    for score in ("reward", "logprob", "both"):
        assert rank_samples(cut, sample_rewards(cut, Sum()), score).tolist() == [[-INF, -INF]]


def test_rank_without_the_reward_it_needs() -> None:
    for score in ("reward", "both"):
        with pytest.raises(ValueError, match=f"score {score} needs a reward"):
            rank_samples(SAMPLES, None, score)


# --- what is trained on ---------------------------------------------------------------------------

GROUP = SampleSet(
    [[10], [20], [30]],
    [
        [completion([5, 2]), completion([6, 2]), completion([6, 2]), completion([7, 2])],
        [completion([8, 2]), completion([9], cut=True), completion([1, 2]), completion([8, 2])],
        [completion([4], cut=True)] * 4,
    ],
)
SCORES = np.array([[1.0, 3.0, 3.0, 2.0], [0.5, -INF, 0.5, 0.5], [-INF] * 4])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, [[10, 6, 2], [20, 8, 2]]),
        (2, [[10, 6, 2], [10, 7, 2], [20, 8, 2], [20, 1, 2]]),
        (9, [[10, 6, 2], [10, 7, 2], [10, 5, 2], [20, 8, 2], [20, 1, 2]]),
    ],
)
def test_best_columns_keep_the_best_distinct_finished(keep: int, expected: list[list[int]]) -> None:
    # Ties go to the earlier sample; a prompt whose samples are all cut gives no row.
    columns = best_columns(GROUP, SCORES, keep)
    assert columns["input_ids"] == expected
    assert columns["labels"] == [[-100, *row[1:]] for row in expected]


def test_best_against_worst_takes_the_ends_of_what_is_finished() -> None:
    pairs = best_against_worst(GROUP, np.array([[1.0, 3.0, 3.0, 2.0], [1, -INF, 2, 0], [-INF] * 4]))
    assert pairs.to_list() == [
        {
            "prompt_ids": [10],
            "chosen_ids": [6, 2],
            "rejected_prompt_ids": [10],
            "rejected_ids": [5, 2],
            "chosen_logp": -2.0,
            "rejected_logp": -2.0,
        },
        {
            "prompt_ids": [20],
            "chosen_ids": [1, 2],
            "rejected_prompt_ids": [20],
            "rejected_ids": [8, 2],
            "chosen_logp": -2.0,
            "rejected_logp": -2.0,
        },
    ]


def test_best_against_worst_pairs_inwards_and_never_a_sample_with_itself() -> None:
    group = [completion([i, 2]) for i in (3, 4, 5)] + [completion([6], cut=True)]
    pairs = best_against_worst(SampleSet([[10]], [group]), np.array([[2.0, 9.0, 1.0, -INF]]), 2)
    assert [(row["chosen_ids"], row["rejected_ids"]) for row in pairs.to_list()] == [
        ([4, 2], [5, 2])
    ]
    four = SampleSet([[10]], [[completion([i, 2]) for i in (3, 4, 5, 6)]])
    pairs = best_against_worst(four, np.array([[2.0, 9.0, 1.0, 4.0]]), 2)
    got = [(row["chosen_ids"][0], row["rejected_ids"][0]) for row in pairs.to_list()]
    assert got == [(4, 5), (6, 3)]


def test_best_against_worst_keeps_the_samplers_log_probs() -> None:
    group = [completion([3, 2], [-0.25, -0.5]), completion([4, 2], [-1.0, -2.0])]
    row = best_against_worst(SampleSet([[10]], [group]), np.array([[1.0, 2.0]])).to_list()[0]
    assert (row["chosen_logp"], row["rejected_logp"]) == (-3.0, -0.75)


def test_best_against_worst_needs_two_different_samples_somewhere() -> None:
    same = SampleSet([[10]], [[completion([5, 2]), completion([5, 2]), completion([6], cut=True)]])
    with pytest.raises(UserError, match="no prompt has two different finished samples"):
        best_against_worst(same, np.array([[1.0, 2.0, -INF]]))


def test_score_report_by_hand() -> None:
    report = score_report(SCORES)
    assert report == pytest.approx(
        {
            "score_mean": (1 + 3 + 3 + 2 + 1.5) / 7,
            "score_best": (3 + 0.5) / 2,
            "truncated": 5 / 12,
        }
    )
    nothing = score_report(np.full((2, 3), -INF))
    assert nothing == {"score_mean": 0.0, "score_best": 0.0, "truncated": 1.0}


# --- prompts --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), unique_by=tuple, max_size=20),
    st.integers(1, 20),
    st.integers(0, 19),
)
def test_fewer_prompts_are_a_subset_of_more_and_keep_their_order(
    prompts: list[list[int]], many: int, less: int
) -> None:
    more = choose_prompts(prompts, many)
    fewer = choose_prompts(prompts, max(1, many - less))
    assert len(more) == min(many, len(prompts))
    assert [p for p in prompts if p in more] == more
    assert [p for p in more if p in fewer] == fewer
    assert choose_prompts(prompts, None) == prompts


def test_prompts_are_chosen_by_their_ids_and_not_by_their_place() -> None:
    prompts = [[i, i + 1] for i in range(40)]
    chosen = choose_prompts(prompts, 10)
    assert sorted(choose_prompts(prompts[::-1], 10)) == chosen
    assert chosen != prompts[:10]


def test_distinct_prompts_keep_the_first_rows_order() -> None:
    rows = Demonstrations([[3], [1, 2], [3], [0]], [[5], [6], [7], [8]], "sum")
    assert rows.distinct_prompts() == [[3], [1, 2], [0]]


# --- updates --------------------------------------------------------------------------------------

START = Policy(Path("start"), "key-start")
REWARD = Reward("explicit", Path("reward"), "key-reward")
ROWS = Demonstrations([[3]], [[5, 2]], "sum")


def test_select_trains_nothing_and_returns_a_ranking() -> None:
    options = BestOfNOptions(kind="best_of_n", use="select", n=16, score="both", temperature=0.7)
    context: Any = None  # not one stage is asked for
    got = BestOfN(options)(context, UpdateRequest(0, START, START, REWARD, ROWS))
    assert got == Policy(Path("start"), "key-start", Ranking(REWARD, 16, "both", 0.7))
    # A policy that ranks already is ranked anew, not twice.
    again = BestOfN(options)(context, UpdateRequest(1, got, START, REWARD, ROWS))
    assert again == got


def test_best_of_n_needs_a_reward() -> None:
    context: Any = None
    with pytest.raises(UserError, match="best_of_n needs a reward"):
        BestOfN(BestOfNOptions(kind="best_of_n"))(
            context, UpdateRequest(0, START, START, None, ROWS)
        )


class Bench:
    """A context on a tiny model: samples are given, a stage is built at once."""

    device = torch.device("cpu")
    adapted: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, work: Path):
        self.model, self.tokenizer, self.work = model, tokenizer, work
        self.seen: dict[str, Any] = {}
        self.models = self.sampler = self

    def sampling(self, n: int, temperature: float) -> Sampling:
        return Sampling(n=n, temperature=temperature)

    def sample(self, policy: Policy, prompts: Any, sampling: Sampling, use: str) -> SampleSet:
        self.seen |= {"sampled": policy, "prompts": prompts, "sampling": sampling, "use": use}
        return GROUP

    def load_trainable(self, path: Path) -> PreTrainedModel:
        self.seen["start"] = path
        return copy.deepcopy(self.model)

    def load_reward(self, reward: Reward) -> Sum:
        return Sum()

    def training(self, work: Path, label: str) -> Training:
        return Training(work, seed=0, device=self.device, label=label)

    def stage(self, role: Role, name: str, settings: Any, inputs: Any, build: Any) -> Any:
        self.seen |= {"name": (role, name), "inputs": inputs, "metrics": build(self.work)}
        return SimpleNamespace(path=self.work, key="key-new")


@pytest.mark.parametrize(("start", "path"), [("current", "start"), ("initial", "sft")])
@pytest.mark.parametrize("use", ["sft", "dpo"])
@torch.no_grad()
def test_training_on_the_best_makes_them_likelier(
    use: str,
    start: str,
    path: str,
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    options = BestOfNOptions(
        kind="best_of_n",
        use=use,
        start=start,
        n=4,
        temperature=0.8,
        args={"learning_rate": 1e-3, "max_steps": 5, "lr_scheduler_type": "constant"},
    )
    before = tiny_model("llama")
    bench: Any = Bench(before, tiny_tokenizer, tmp_path)
    rows = Demonstrations([[10], [20], [10], [30]], [[5, 2]] * 4, "key-rows")
    ranked = Policy(Path("start"), "key-start", Ranking(REWARD, 16, "both", 0.7))
    initial = Policy(Path("sft"), "key-sft")
    with torch.enable_grad():
        got = BestOfN(options)(bench, UpdateRequest(1, ranked, initial, REWARD, rows))
    assert got == Policy(tmp_path / "model", "key-new")
    seen = bench.seen
    assert seen["sampled"] == START  # its plain samples, not the best of 16 of them
    assert seen["prompts"] == [[10], [20], [30]]
    assert seen["sampling"] == Sampling(n=4, temperature=0.8)
    assert seen["start"] == Path(path)
    assert seen["inputs"] == {
        "policy": "key-start",
        "start": f"key-{path}",
        "reward": "key-reward",
        "demonstrations": "key-rows",
    }
    assert seen["metrics"]["truncated"] == pytest.approx(5 / 12)
    # By Sum the best of prompt 10 is [7, 2] and the worst [5, 2]; of prompt 20 [8, 2] and [1, 2].
    after = load_model(tmp_path / "model")

    def gain(prompt: int, ids: list[int]) -> float:
        new, old = (plain_logps(model, [prompt], ids).sum().item() for model in (after, before))
        return new - old

    assert min(gain(10, [7, 2]), gain(20, [8, 2])) > 0.1
    assert gain(10, [7, 2]) > gain(10, [5, 2])
    assert gain(20, [8, 2]) > gain(20, [1, 2])


def test_everything_that_ranks_is_in_a_policys_identity() -> None:
    base = Ranking(REWARD, 8, "reward", 1.0)
    other = Reward("explicit", Path("reward"), "key-other")
    rankings = [
        None,
        base,
        Ranking(other, 8, "reward", 1.0),
        Ranking(REWARD, 4, "reward", 1.0),
        Ranking(REWARD, 8, "both", 1.0),
        Ranking(REWARD, 8, "reward", 0.5),
    ]
    names = {Policy(Path("start"), "key", ranking).identity for ranking in rankings}
    assert len(names) == len(rankings)
    assert Policy(Path("elsewhere"), "key", base).identity in names  # a key, not a place


def test_the_identity_gives_the_model_that_the_implicit_fit_left() -> None:
    context: Any = None
    implicit = Reward("implicit", Path("theta"), "key-theta", beta=0.1)
    got = Identity()(context, UpdateRequest(0, START, START, implicit, ROWS))
    assert got == Policy(Path("theta"), "key-theta")
    for reward in (REWARD, None):
        with pytest.raises(UserError, match=r"identity needs reward\.kind: implicit"):
            Identity()(context, UpdateRequest(0, START, START, reward, ROWS))
