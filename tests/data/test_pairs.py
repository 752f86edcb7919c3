"""Pairs: matching of demonstrations and samples, windows, numbers, storage."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.demonstrations import EOS, demo, demonstrations, tokens

from irl_align.data.contrast import contrast_pairs
from irl_align.data.pairs import (
    FEATURES,
    load_pairs,
    policy_pairs,
    sample_pairs,
    save_pairs,
    stats,
    window,
)
from irl_align.data.rows import prompt_key
from irl_align.errors import UserError

SAMPLING = SimpleNamespace(temperature=0.7, plain=False)
PLAIN = SimpleNamespace(temperature=1.0, plain=True)


def sample(*tokens: int, truncated: bool = False, stop: int | None = None) -> SimpleNamespace:
    ids = list(tokens) if truncated else [*tokens, EOS]
    logprobs = -np.asarray(ids, np.float32)
    return SimpleNamespace(token_ids=ids, truncated=truncated, logprobs=logprobs, stop=stop)


def make(demos: object, samples: dict[str, list[SimpleNamespace]], **options: object) -> object:
    by_key = {prompt_key(prompt): group for prompt, group in samples.items()}
    settings_ = {"iteration": 3, "generator": "abc", "sampling": SAMPLING, **options}
    return policy_pairs(demos, by_key, **settings_)


# ---------------------------------------------------------------- demonstrations over samples


def test_policy_pairs_fills_every_column() -> None:
    pairs, dropped = make([demo("ab", 7, 8)], {"ab": [sample(9)]})
    assert pairs.features == FEATURES
    assert pairs[0] == {
        "prompt_ids": [97, 98],
        "chosen_ids": [7, 8, EOS],
        "rejected_prompt_ids": [97, 98],
        "rejected_ids": [9, EOS],
        "source": "demonstration/policy",
        "iteration": 3,
        "sample_index": 0,
        "rejected_truncated": False,
        "generator": "abc",
        "temperature": pytest.approx(0.7),
        "rejected_logp": None,  # those of temperature 0.7 are not the model's own
        "prompt_key": prompt_key("ab"),
    }
    assert dropped == {"identical": 0, "overlong": 0, "truncated": 0}


def test_policy_pairs_keeps_log_probs_of_the_models_own_distribution() -> None:
    pairs, _ = make([demo("ab", 7, 8)], {"ab": [sample(9, 4)]}, sampling=PLAIN)
    assert pairs["rejected_logp"][:] == [-15.0]  # -(9 + 4 + EOS)


counts = st.integers(1, 7)


@settings(max_examples=30, deadline=None)
@given(counts, counts, st.integers(0, 99))
def test_policy_pairs_uses_demonstrations_and_samples_evenly(d: int, n: int, seed: int) -> None:
    demos = [demo("x", 100 + i) for i in range(d)]
    pairs, _ = make(demos, {"x": [sample(200 + j) for j in range(n)]}, seed=seed)
    assert len(pairs) == max(d, n)
    chosen = Counter(ids[0] for ids in pairs["chosen_ids"])
    rejected = Counter(ids[0] for ids in pairs["rejected_ids"])
    for used, number in ((chosen, d), (rejected, n)):
        assert len(used) == number and max(used.values()) - min(used.values()) <= 1
    assert [ids[0] - 200 for ids in pairs["rejected_ids"]] == pairs["sample_index"][:]


sampled = st.lists(
    st.builds(lambda a, b, cut: sample(a, b, truncated=cut), tokens, tokens, st.booleans()),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(demonstrations, sampled, sampled, st.sampled_from(["drop", "keep"]))
def test_policy_pairs_drops_only_pairs_of_equal_ids(
    demos: list[dict[str, object]],
    one: list[SimpleNamespace],
    other: list[SimpleNamespace],
    truncated: str,
) -> None:
    samples = {"a": one, "b": other}
    kept = {
        prompt: [s for s in group if truncated == "keep" or not s.truncated]
        for prompt, group in samples.items()
    }
    used = {prompt for prompt in samples if any(row["prompt"] == prompt for row in demos)}
    expected = sum(
        max(len(kept[prompt]), sum(row["prompt"] == prompt for row in demos))
        for prompt in used
        if kept[prompt]
    )
    try:
        pairs, dropped = make(demos, samples, truncated=truncated)
    except UserError as error:
        identical = int(str(error).split(" identical")[0].split()[-1])
        assert identical == expected
        return
    assert len(pairs) + dropped["identical"] == expected
    assert dropped["truncated"] == sum(len(samples[p]) - len(kept[p]) for p in used)
    for pair in pairs:
        assert pair["chosen_ids"] != pair["rejected_ids"]
        assert pair["prompt_ids"] == pair["rejected_prompt_ids"]
        assert pair["rejected_truncated"] == (pair["rejected_ids"][-1] != EOS)
        assert truncated == "keep" or not pair["rejected_truncated"]


def test_policy_pairs_counts_identical_pairs() -> None:
    pairs, dropped = make(
        [demo("x", 5), demo("y", 5)], {"x": [sample(5)], "y": [sample(6)], "z": [sample(1)]}
    )
    assert len(pairs) == 1 and dropped == {"identical": 1, "overlong": 0, "truncated": 0}


def test_policy_pairs_drops_or_keeps_truncated_samples() -> None:
    demos, samples = [demo("x", 5)], {"x": [sample(5, 6, truncated=True), sample(7)]}
    pairs, dropped = make(demos, samples)
    assert pairs["rejected_ids"][:] == [[7, EOS]] and dropped["truncated"] == 1
    pairs, dropped = make(demos, samples, truncated="keep")
    assert sorted(pairs["rejected_ids"]) == [[5, 6], [7, EOS]] and dropped["truncated"] == 0
    # Cut off just before EOS is not what was demonstrated.
    pairs, _ = make(demos, {"x": [sample(5, truncated=True)]}, truncated="keep")
    assert (pairs[0]["chosen_ids"], pairs[0]["rejected_ids"]) == ([5, EOS], [5])


def test_policy_pairs_drops_demonstrations_that_no_sample_could_be_as_long_as() -> None:
    demos = [demo("x", 5, 5, 5), demo("x", 6), demo("y", *range(40, 49))]
    samples = {"x": [sample(1), sample(2)], "y": [sample(3)]}
    pairs, dropped = make(demos, samples, max_tokens=3)
    assert sorted(pairs["rejected_ids"]) == [[1, EOS], [2, EOS]] and dropped["overlong"] == 2
    assert pairs["chosen_ids"][:] == [[6, EOS]] * 2
    pairs, dropped = make(demos, samples, max_tokens=10)  # the end of text counts
    assert len(pairs) == 3 and dropped["overlong"] == 0
    pairs, dropped = make(demos, samples, max_tokens=9)
    assert len(pairs) == 2 and dropped["overlong"] == 1
    with pytest.raises(UserError, match=r"gives no pair \(left out: 0 identical, 3 overlong, 0 tr"):
        make(demos, samples, max_tokens=1)


def test_policy_pairs_refuses_texts_that_end_in_different_ids() -> None:
    other = sample(7)
    other.token_ids[-1] = EOS + 1
    with pytest.raises(UserError, match=r"texts end in the token ids \[2\], .* in \[2, 3\]; exp"):
        make([demo("x", 5), demo("y", 5)], {"x": [other], "y": [sample(7)]})
    other.truncated = True  # then its last id is no end
    assert len(make([demo("x", 5)], {"x": [other]}, truncated="keep").rows) == 1


def test_policy_pairs_has_no_log_prob_of_a_sample_that_another_stop_id_ended() -> None:
    samples = {"x": [sample(1), sample(3, stop=9)]}
    pairs, _ = make([demo("x", 5)], samples, sampling=PLAIN)
    known = {
        ids[0]: logp
        for ids, logp in zip(pairs["rejected_ids"], pairs["rejected_logp"], strict=True)
    }
    assert known == {1: -1.0 - EOS, 3: None}


def test_policy_pairs_refuses_to_return_no_pair() -> None:
    with pytest.raises(UserError, match=r"demonstration/policy gives no pair \(left out: 1 identi"):
        make([demo("x", 5)], {"x": [sample(5)]})
    with pytest.raises(UserError, match=r"left out: 0 identical, 0 overlong, 2 truncated"):
        make([demo("x", 5)], {"x": [sample(5, truncated=True), sample(truncated=True)]})


def test_policy_pairs_limits_demonstrations_per_prompt() -> None:
    demos = [demo("x", 100 + i) for i in range(20)]
    seen = set()
    for seed in range(30):
        pairs, _ = make(demos, {"x": [sample(1)]}, demonstrations_per_prompt=2, seed=seed)
        assert len(pairs) == 2
        seen |= {ids[0] for ids in pairs["chosen_ids"]}
    assert len(seen) > 10  # the seed chooses which, not their place in the data


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(8)), st.integers(0, 5))
def test_policy_pairs_does_not_depend_on_order(order: list[int], seed: int) -> None:
    demos = [demo("ab"[i % 2], 100 + i, 100 - i) for i in range(8)]
    samples = {"a": [sample(1), sample(2), sample(3)], "b": [sample(4), sample(5)]}
    swapped = dict(reversed(samples.items()))
    one, _ = make(demos, samples, seed=seed)
    other, _ = make([demos[i] for i in order], swapped, seed=seed)
    assert one.to_dict() == other.to_dict()
    for kind in ({}, {"per_demonstration": 2}):
        a = contrast_pairs(demos, "neighbour", seed=seed, **kind).rows
        b = contrast_pairs([demos[i] for i in order], "neighbour", seed=seed, **kind).rows
        assert a.to_dict() == b.to_dict()


def test_policy_pairs_favours_no_sample_by_its_place() -> None:
    """Of two samples for three demonstrations either is, by the seed, the one used twice."""
    demos = [demo("x", 100 + i) for i in range(3)]
    twice = set()
    for seed in range(20):
        pairs, _ = make(demos, {"x": [sample(1), sample(2)]}, seed=seed)
        twice.add(Counter(pairs["sample_index"]).most_common(1)[0])
    assert twice == {(0, 2), (1, 2)}


def test_policy_pairs_depends_on_seed_and_iteration() -> None:
    demos = [demo("x", 100 + i) for i in range(8)]
    samples = {"x": [sample(200 + j) for j in range(8)]}

    def matching(**options: int) -> list[tuple[int, int]]:
        pairs, _ = make(demos, samples, **options)
        return sorted((row["chosen_ids"][0], row["rejected_ids"][0]) for row in pairs)

    assert matching(seed=1) == matching(seed=1)
    assert matching(seed=1) != matching(seed=2)
    assert matching(iteration=1) != matching(iteration=2)


def test_policy_pairs_takes_a_dataset() -> None:
    demos = [demo("x", 5), demo("y", 6)]
    samples = {"x": [sample(1)], "y": [sample(2)]}
    assert make(Dataset.from_list(demos), samples)[0].to_dict() == make(demos, samples)[0].to_dict()


# ---------------------------------------------------------------- samples over samples


def test_sample_pairs_prefers_samples_to_samples() -> None:
    key = prompt_key("x")
    chosen = {key: [sample(1), sample(2), sample(3, truncated=True)]}
    rejected = {key: [sample(4, truncated=True), sample(5)]}
    common = {"iteration": 0, "generator": "init", "sampling": SAMPLING}
    pairs, dropped = sample_pairs({key: [9]}, chosen, rejected, truncated="keep", **common)
    # A preferred text without its end would teach that ends do not matter.
    assert sorted(pairs["chosen_ids"]) == [[1, EOS], [2, EOS]] and dropped["truncated"] == 1
    assert sorted(pairs["rejected_ids"]) == [[4], [5, EOS]]
    assert set(pairs["source"]) == {"sft/init"} and pairs["prompt_ids"][:] == [[9], [9]]
    pairs, dropped = sample_pairs({key: [9]}, chosen, rejected, **common)
    assert set(map(tuple, pairs["rejected_ids"])) == {(5, EOS)} and dropped["truncated"] == 2


# ---------------------------------------------------------------- windows, numbers, storage


def iteration_of(k: int) -> Dataset:
    return make([demo("x", 1), demo("y", 1)], {"x": [sample(3)], "y": [sample(3)]}, iteration=k)[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6))
def test_window_returns_the_named_iterations(done: int, last: int) -> None:
    pairs = [iteration_of(k) for k in range(done)]
    assert sorted(set(window(pairs, "all")["iteration"])) == list(range(done))
    assert set(window(pairs, "latest")["iteration"]) == {done - 1}
    actual = window(pairs, f"last-{last}")["iteration"]
    assert sorted(set(actual)) == list(range(max(0, done - last), done))
    assert len(actual) == 2 * min(last, done)


def test_stats_counts_pairs_and_drops() -> None:
    pairs, dropped = make(
        [demo("x", 1), demo("y", 1, 1), demo("z", 7)],
        {"x": [sample(3, 3, 3)], "y": [sample(3, truncated=True)], "z": [sample(7)]},
        truncated="keep",
    )
    assert stats(pairs, dropped) == {
        "pairs": 2,
        "pairs/demonstration/policy": 2,
        "dropped/identical": 1,
        "dropped/overlong": 0,
        "dropped/truncated": 0,
        "mean_chosen_tokens": 2.5,  # 2 and 3, EOS included
        "mean_rejected_tokens": 2.5,  # 4 and 1
        "rejected_truncated": 1,
    }


def test_load_pairs_returns_what_save_pairs_wrote(tmp_path: Path) -> None:
    contrast = contrast_pairs([demo("a", 1), demo("b", 2)], "neighbour").rows
    pairs = window([iteration_of(0), contrast], "all")
    part = pairs.select([3, 0])  # an order of its own, which the file must have too
    save_pairs(part, tmp_path / "folder" / "pairs.parquet")
    loaded = load_pairs(tmp_path / "folder" / "pairs.parquet")
    assert loaded.features == FEATURES and loaded.to_list() == [pairs[3], pairs[0]]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["pairs.parquet"]
    save_pairs(part, tmp_path / "again.parquet")
    content = (tmp_path / "folder" / "pairs.parquet").read_bytes()
    assert (tmp_path / "again.parquet").read_bytes() == content


def test_load_pairs_names_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    with pytest.raises(UserError, match=r"pairs\.parquet: found no file, expected pairs"):
        load_pairs(path)
    save_pairs(iteration_of(0), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-3], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"pairs\.parquet: not a complete parquet file"):
            load_pairs(path)
    Dataset.from_dict({"text": ["x"]}).to_parquet(str(path))
    with pytest.raises(UserError, match=r"not a complete parquet file of pairs: .*prompt_ids"):
        load_pairs(path)
