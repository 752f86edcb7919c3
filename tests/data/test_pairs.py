"""Pairs: how demonstrations and samples are matched, contrast prompts, windows, storage."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_align.data.cards import load_card
from irl_align.data.contrast import contrast_pairs, nearest_prompts, word_distance, words_of
from irl_align.data.loading import load_demonstrations
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
from irl_align.tasks import restaurant

SAMPLING = SimpleNamespace(temperature=0.7, plain=False)
PLAIN = SimpleNamespace(temperature=1.0, plain=True)
EOS = 2


def demo(prompt: str, *tokens: int) -> dict[str, object]:
    """A demonstration whose prompt ids are its letters."""
    return {
        "prompt": prompt,
        "prompt_key": prompt_key(prompt),
        "prompt_ids": [ord(letter) for letter in prompt],
        "completion_ids": [*tokens, EOS],
    }


def sample(*tokens: int, truncated: bool = False) -> SimpleNamespace:
    ids = list(tokens) if truncated else [*tokens, EOS]
    logprobs = -np.asarray(ids, np.float32)
    return SimpleNamespace(token_ids=ids, truncated=truncated, logprobs=logprobs)


def make(demos: object, samples: dict[str, list[SimpleNamespace]], **options: object) -> object:
    by_key = {prompt_key(prompt): group for prompt, group in samples.items()}
    settings_ = {"iteration": 3, "generator": "abc", "sampling": SAMPLING, **options}
    return policy_pairs(demos, by_key, **settings_)


# ---------------------------------------------------------------- demonstrations over samples


def test_one_pair_has_every_column() -> None:
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
    assert dropped == {"identical": 0, "truncated": 0}


def test_a_sample_brings_its_log_prob_where_it_is_the_models_own() -> None:
    pairs, _ = make([demo("ab", 7, 8)], {"ab": [sample(9, 4)]}, sampling=PLAIN)
    assert pairs["rejected_logp"][:] == [-15.0]  # -(9 + 4 + EOS)


counts = st.integers(1, 7)


@settings(max_examples=30, deadline=None)
@given(counts, counts, st.integers(0, 99))
def test_demonstrations_and_samples_are_used_evenly(d: int, n: int, seed: int) -> None:
    demos = [demo("x", 100 + i) for i in range(d)]
    pairs, _ = make(demos, {"x": [sample(200 + j) for j in range(n)]}, seed=seed)
    assert len(pairs) == max(d, n)
    chosen = Counter(ids[0] for ids in pairs["chosen_ids"])
    rejected = Counter(ids[0] for ids in pairs["rejected_ids"])
    for used, number in ((chosen, d), (rejected, n)):
        assert len(used) == number and max(used.values()) - min(used.values()) <= 1
    assert [ids[0] - 200 for ids in pairs["rejected_ids"]] == pairs["sample_index"][:]


tokens = st.integers(10, 13)
demonstrations = st.lists(
    st.builds(demo, st.sampled_from(["a", "b", "ab"]), tokens, tokens), min_size=1, max_size=12
)
sampled = st.lists(
    st.builds(lambda a, b, cut: sample(a, b, truncated=cut), tokens, tokens, st.booleans()),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(demonstrations, sampled, sampled, st.sampled_from(["drop", "keep"]))
def test_no_pair_is_of_equal_ids_and_none_is_lost(
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


def test_identical_pairs_are_counted() -> None:
    pairs, dropped = make(
        [demo("x", 5), demo("y", 5)], {"x": [sample(5)], "y": [sample(6)], "z": [sample(1)]}
    )
    assert len(pairs) == 1 and dropped == {"identical": 1, "truncated": 0}


def test_truncated_samples() -> None:
    demos, samples = [demo("x", 5)], {"x": [sample(5, 6, truncated=True), sample(7)]}
    pairs, dropped = make(demos, samples)
    assert pairs["rejected_ids"][:] == [[7, EOS]] and dropped["truncated"] == 1
    pairs, dropped = make(demos, samples, truncated="keep")
    assert sorted(pairs["rejected_ids"]) == [[5, 6], [7, EOS]] and dropped["truncated"] == 0
    # Cut off just before EOS is not what was demonstrated.
    pairs, _ = make(demos, {"x": [sample(5, truncated=True)]}, truncated="keep")
    assert (pairs[0]["chosen_ids"], pairs[0]["rejected_ids"]) == ([5, EOS], [5])


def test_no_pair_left_is_an_error() -> None:
    with pytest.raises(UserError, match=r"demonstration/policy gives no pair \(left out: 1 identi"):
        make([demo("x", 5)], {"x": [sample(5)]})
    with pytest.raises(UserError, match=r"left out: 0 identical, 2 truncated"):
        make([demo("x", 5)], {"x": [sample(5, truncated=True), sample(truncated=True)]})


def test_at_most_so_many_demonstrations_of_a_prompt() -> None:
    demos = [demo("x", 100 + i) for i in range(20)]
    seen = set()
    for seed in range(30):
        pairs, _ = make(demos, {"x": [sample(1)]}, demonstrations_per_prompt=2, seed=seed)
        assert len(pairs) == 2
        seen |= {ids[0] for ids in pairs["chosen_ids"]}
    assert len(seen) > 10  # the seed chooses which, not their place in the data


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(8)), st.integers(0, 5))
def test_order_of_rows_and_dicts_does_not_matter(order: list[int], seed: int) -> None:
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


def test_no_sample_is_favoured_by_its_place() -> None:
    """Of two samples for three demonstrations either is, by the seed, the one used twice."""
    demos = [demo("x", 100 + i) for i in range(3)]
    twice = set()
    for seed in range(20):
        pairs, _ = make(demos, {"x": [sample(1), sample(2)]}, seed=seed)
        twice.add(Counter(pairs["sample_index"]).most_common(1)[0])
    assert twice == {(0, 2), (1, 2)}


def test_seed_and_iteration_change_the_matching() -> None:
    demos = [demo("x", 100 + i) for i in range(8)]
    samples = {"x": [sample(200 + j) for j in range(8)]}

    def matching(**options: int) -> list[tuple[int, int]]:
        pairs, _ = make(demos, samples, **options)
        return sorted((row["chosen_ids"][0], row["rejected_ids"][0]) for row in pairs)

    assert matching(seed=1) == matching(seed=1)
    assert matching(seed=1) != matching(seed=2)
    assert matching(iteration=1) != matching(iteration=2)


def test_rows_of_a_dataset_are_taken_too() -> None:
    demos = [demo("x", 5), demo("y", 6)]
    samples = {"x": [sample(1)], "y": [sample(2)]}
    assert make(Dataset.from_list(demos), samples)[0].to_dict() == make(demos, samples)[0].to_dict()


# ---------------------------------------------------------------- samples over samples


def test_samples_over_samples() -> None:
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


# ---------------------------------------------------------------- contrast


def jaccard(one: list[int], other: list[int]) -> float:
    return len(set(one) & set(other)) / len(set(one) | set(other))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=2, max_size=14),
    st.integers(1, 5),
)
def test_nearest_prompts_by_enumeration(prompts: list[list[int]], count: int) -> None:
    for i, found in enumerate(nearest_prompts(prompts, count)):
        others = [j for j in range(len(prompts)) if j != i]
        others.sort(key=lambda j: (-jaccard(prompts[i], prompts[j]), j))
        assert found == others[:count]


def test_nearest_prompts_over_more_than_one_block() -> None:
    rng = random.Random(0)
    prompts = [rng.sample(range(30), 5) for _ in range(600)]
    found = nearest_prompts(prompts, 3)
    for i in (0, 255, 256, 511, 512, 599):
        others = sorted(
            (j for j in range(600) if j != i),
            key=lambda j: (-jaccard(prompts[i], prompts[j]), j),
        )
        assert found[i] == others[:3]


def test_neighbour_is_the_nearest_that_is_not_answered_alike() -> None:
    # abcd and abce share 3 of 5 letters, and are far from the rest; "y" answers both.
    demos = [demo("abcd", 1), demo("abce", 1), demo("abce", 2), demo("uvwx", 3)]
    pairs, dropped = contrast_pairs(demos, "neighbour", per_demonstration=2, iteration=4)
    found = sorted(
        ("".join(map(chr, row["prompt_ids"])), row["chosen_ids"][0],
         "".join(map(chr, row["rejected_prompt_ids"])))
        for row in pairs
    )  # fmt: skip
    assert found == [
        ("abcd", 1, "uvwx"),
        ("abce", 1, "uvwx"),
        ("abce", 2, "abcd"),
        ("abce", 2, "uvwx"),
        ("uvwx", 3, "abcd"),
        ("uvwx", 3, "abce"),
    ]
    assert dropped == {"no_contrast": 2}
    assert pairs.features == FEATURES and set(pairs["iteration"]) == {4}
    assert set(pairs["source"]) == {"demonstration/contrast"}
    assert set(pairs["temperature"]) == {None} and set(pairs["generator"]) == {""}
    assert set(pairs["rejected_logp"]) == {None}


def test_neighbours_are_near() -> None:
    """Eight prompts of one family, eight of another: the six nearest are of the own family."""
    demos = [demo(f"abcdef{i}", i + 10) for i in range(8)]
    demos += [demo(f"uvwxyz{i}", i + 20) for i in range(8)]
    pairs, dropped = contrast_pairs(demos, "neighbour", per_demonstration=6)
    assert len(pairs) == 16 * 6 and dropped == {"no_contrast": 0}
    for row in pairs:
        assert row["prompt_ids"][0] == row["rejected_prompt_ids"][0]


@settings(max_examples=40, deadline=None)
@given(demonstrations, st.integers(1, 3), st.integers(0, 3))
def test_contrast_is_never_with_itself(
    demos: list[dict[str, object]], per_demonstration: int, seed: int
) -> None:
    answers = {(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in demos}
    try:
        pairs, dropped = contrast_pairs(
            demos, "neighbour", per_demonstration=per_demonstration, seed=seed
        )
    except UserError as error:
        assert "needs at least two" in str(error) or "gives no pair" in str(error)
        return
    assert len(pairs) + dropped["no_contrast"] == per_demonstration * len(demos)
    for row in pairs:
        assert row["chosen_ids"] == row["rejected_ids"]
        assert (tuple(row["prompt_ids"]), tuple(row["chosen_ids"])) in answers
        assert (tuple(row["rejected_prompt_ids"]), tuple(row["rejected_ids"])) not in answers


def letters(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def test_edits() -> None:
    demos = [demo("a", 1), demo("b", 1), demo("c", 2)]

    def edit(prompt: str, rng: random.Random) -> str:
        return rng.choice("abcd")

    pairs, dropped = contrast_pairs(
        demos, "edit", per_demonstration=2, edit=edit, encode=letters, seed=5
    )
    found = sorted((row["prompt_ids"][0], row["rejected_prompt_ids"][0]) for row in pairs)
    # a and b have the same answer, so neither contrasts with the other.
    assert {chr(x) + chr(y) for x, y in found} <= {"ac", "ad", "bc", "bd", "ca", "cb", "cd"}
    assert len(set(found)) == len(found) == 6 and dropped == {"no_contrast": 0}
    again = contrast_pairs(demos, "edit", per_demonstration=2, edit=edit, encode=letters, seed=5)
    assert again.rows.to_dict() == pairs.to_dict()


def test_edits_in_a_row_lead_away_from_the_prompt() -> None:
    """x over x', x' over x'', and so on; each further from x, each with the same text."""

    def edit(prompt: str, rng: random.Random) -> str:
        words = prompt.split()
        words[rng.randrange(len(words))] = rng.choice("pqrst")
        return " ".join(words)

    def words(texts: list[str]) -> list[list[int]]:
        return [[ord(word) for word in text.split()] for text in texts]

    prompt = "p q r s"
    row = {**demo(prompt, 1), "prompt_ids": words([prompt])[0]}
    pairs, dropped = contrast_pairs(
        [row], "edit", per_demonstration=2, edits=3, edit=edit, encode=words
    )
    assert len(pairs) + dropped["no_contrast"] == 6 and len(pairs) >= 4
    assert {tuple(r["chosen_ids"]) for r in pairs} == {(1, EOS)}
    assert [r["chosen_ids"] for r in pairs] == [r["rejected_ids"] for r in pairs]

    def distance(ids: list[int]) -> int:
        here, there = Counter(row["prompt_ids"]), Counter(ids)
        return (here - there).total() + (there - here).total()

    chains = [[r for r in pairs if r["sample_index"] == index] for index in (0, 1)]
    for chain in chains:
        assert chain[0]["prompt_ids"] == row["prompt_ids"]
        for before, after in pairwise(chain):
            assert before["rejected_prompt_ids"] == after["prompt_ids"]
            assert distance(after["rejected_prompt_ids"]) > distance(after["prompt_ids"])
    assert chains[0][0]["rejected_prompt_ids"] != chains[1][0]["rejected_prompt_ids"]
    # Nor does a chain come to a prompt that has the same demonstration.
    other = {**demo("p q t t", 1), "prompt_ids": words(["p q t t"])[0]}
    steps = {"p q r s": "p q r t", "p q r t": "p q t t", "p q t t": "t t t t"}
    both, short = contrast_pairs(
        [row, other], "edit", edits=2, edit=lambda text, rng: steps.get(text, text), encode=words
    )
    found = [(r["prompt_ids"], r["rejected_prompt_ids"]) for r in both]
    assert words(["p q t t"])[0] not in [rejected for _, rejected in found]
    assert len(found) == 2 and short == {"no_contrast": 2}
    first = contrast_pairs([row], "edit", per_demonstration=2, edit=edit, encode=words).rows
    assert len(first) == 2  # one edit: no chain


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("a b", "a b", 0), ("a b", "a c", 2), ("a b", "a", 1), ("a a", "a", 1), ("", "a b", 2)],
)
def test_word_distance(a: str, b: str, distance: int) -> None:
    assert word_distance(a, b) == word_distance(b, a) == distance


def by_word(texts: list[str]) -> list[list[int]]:
    return [[ord(word) for word in text.replace(",", "").split()] for text in texts]


def worded(prompt: str, answer: int) -> dict[str, object]:
    return {**demo(prompt, answer), "prompt_ids": by_word([prompt])[0]}


CROSSED = [worded("a, p", 1), worded("a, q", 2), worded("b, q", 3), worded("b, r", 4)]


def crossed(
    demos: list[dict[str, object]], steps: dict[str, str], edits: int = 1
) -> list[tuple[str, str, int]]:
    """Preferred prompt, rejected prompt and the text of both, of crossed edits."""
    pairs = contrast_pairs(
        demos,
        "edit",
        edits=edits,
        crossed=True,
        edit=lambda text, rng: steps.get(text, text),
        encode=by_word,
    ).rows
    assert pairs["chosen_ids"] == pairs["rejected_ids"]
    return [
        ("".join(map(chr, r["prompt_ids"])), "".join(map(chr, r["rejected_prompt_ids"])), text)
        for r in pairs
        for text in r["chosen_ids"][:1]
    ]


def test_crossed_edits_by_hand() -> None:
    """With another value: the only demonstration with r and without p is the fourth. One word
    more: that with q, whose prompt is nearest. One word less: one without a, the nearest."""
    assert crossed(CROSSED, {"a, p": "a, r"}) == [("ap", "ar", 1), ("ar", "ap", 4)]
    assert crossed(CROSSED, {"a, p": "a, p, q"}) == [("ap", "apq", 1), ("apq", "ap", 2)]
    assert crossed(CROSSED, {"b, q": "q"}) == [("bq", "q", 3), ("q", "bq", 2)]
    # In a row every edit is crossed.
    both = crossed(CROSSED, {"a, p": "a, r", "a, r": "b, r"}, edits=2)
    assert both == [("ap", "ar", 1), ("ar", "ap", 4), ("ar", "br", 1), ("br", "ar", 4)]
    # Nobody demonstrates what the edit brings; or only with what it takes; or the words are the
    # same; or the found demonstration is the prompt's own too: the pair stays alone.
    assert crossed(CROSSED, {"a, p": "a, s"}) == [("ap", "as", 1)]
    assert crossed(CROSSED, {"b, q": "r, q"}) == [("bq", "rq", 3)]
    assert crossed(CROSSED, {"a, p": "p, a"}) == [("ap", "pa", 1)]
    twice = [*CROSSED, worded("a, p", 4)]
    assert crossed(twice, {"a, p": "a, r"}) == [("ap", "ar", 1), ("ap", "ar", 4)]


@pytest.mark.parametrize("seed", range(3))
def test_crossed_edits_of_the_built_in_task(seed: int) -> None:
    """Edited prompts are on either side equally often; what crosses fits the edit by its words."""
    rows = load_demonstrations(
        load_card("restaurant"), "train", task_args={"size": 150, "noise": 0.0}
    )
    demos = [
        {**demo(row["prompt"], n), "prompt_ids": letters([row["prompt"]])[0]}
        for n, row in enumerate(rows)
    ]
    prompts = {n: str(row["prompt"]) for n, row in enumerate(rows)}
    kind = {"edit": restaurant.edit, "encode": letters, "seed": seed}
    pairs, dropped = contrast_pairs(demos, "edit", crossed=True, **kind)
    assert len(pairs) + dropped["no_contrast"] == 300 and dropped["no_contrast"] < 30
    sides = Counter()
    for row in pairs:
        preferred, rejected = (
            "".join(map(chr, row[side])) for side in ("prompt_ids", "rejected_prompt_ids")
        )
        sides[preferred] += 1
        sides[rejected] -= 1
        brought, taken = (
            words_of(one) - words_of(other)
            for one, other in ((preferred, rejected), (rejected, preferred))
        )
        shown = words_of(prompts[row["chosen_ids"][0]])
        assert shown >= brought and not shown & taken
    assert sum(map(abs, sides.values())) <= 2 * dropped["no_contrast"]
    alone = contrast_pairs(demos, "edit", **kind).rows.to_list()
    assert [row for row in pairs.to_list() if row in alone] == alone
    assert contrast_pairs(demos, "edit", crossed=True, **kind).rows.to_list() == pairs.to_list()


def test_edit_that_changes_nothing_makes_no_pair() -> None:
    with pytest.raises(UserError, match=r"contrast gives no pair \(left out: 1 no_contrast\)"):
        contrast_pairs([demo("a", 1)], "edit", edit=lambda text, rng: text, encode=letters)
    # A change that encoding loses is none either.
    with pytest.raises(UserError, match="gives no pair"):
        contrast_pairs(
            [demo("a", 1)],
            "edit",
            edit=lambda text, rng: text.upper(),
            encode=lambda texts: letters([text.lower() for text in texts]),
        )
    with pytest.raises(UserError, match=r"pairs\.contrast: found edit, but the data card names no"):
        contrast_pairs([demo("a", 1)], "edit")


def test_contrast_fits_the_context() -> None:
    demos = [demo("a", 1), demo("ab", 2), demo("abcdef", 3)]
    pairs, dropped = contrast_pairs(demos, "neighbour", per_demonstration=2, context=7)
    assert all(len(r["rejected_prompt_ids"]) + len(r["rejected_ids"]) <= 7 for r in pairs)
    assert all(len(r["prompt_ids"]) + len(r["chosen_ids"]) <= 7 for r in pairs)
    assert len(pairs) == 2 and dropped == {"no_contrast": 4}  # none with "abcdef", 6 and 3


# ---------------------------------------------------------------- windows, numbers, storage


def iteration_of(k: int) -> Dataset:
    return make([demo("x", 1), demo("y", 1)], {"x": [sample(3)], "y": [sample(3)]}, iteration=k)[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6))
def test_windows(done: int, last: int) -> None:
    pairs = [iteration_of(k) for k in range(done)]
    assert sorted(set(window(pairs, "all")["iteration"])) == list(range(done))
    assert set(window(pairs, "latest")["iteration"]) == {done - 1}
    found = window(pairs, f"last-{last}")["iteration"]
    assert sorted(set(found)) == list(range(max(0, done - last), done))
    assert len(found) == 2 * min(last, done)


def test_stats() -> None:
    pairs, dropped = make(
        [demo("x", 1), demo("y", 1, 1), demo("z", 7)],
        {"x": [sample(3, 3, 3)], "y": [sample(3, truncated=True)], "z": [sample(7)]},
        truncated="keep",
    )
    assert stats(pairs, dropped) == {
        "pairs": 2,
        "pairs/demonstration/policy": 2,
        "dropped/identical": 1,
        "dropped/truncated": 0,
        "mean_chosen_tokens": 2.5,  # 2 and 3, EOS included
        "mean_rejected_tokens": 2.5,  # 4 and 1
        "rejected_truncated": 1,
    }


def test_saved_pairs_come_back(tmp_path: Path) -> None:
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


def test_broken_pairs_are_named(tmp_path: Path) -> None:
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
