"""Contrast pairs: neighbours, edits, chains of edits and crossed edits."""

import json
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.demonstrations import EOS, demo, demonstrations

from irl_align.data.cards import load_card
from irl_align.data.contrast import contrast_pairs, nearest_prompts, word_distance, words_of
from irl_align.data.loading import load_demonstrations
from irl_align.data.pairs import (
    FEATURES,
)
from irl_align.data.rows import prompt_key
from irl_align.errors import UserError
from irl_align.tasks import restaurant


def jaccard(one: list[int], other: list[int]) -> float:
    return len(set(one) & set(other)) / len(set(one) | set(other))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=2, max_size=14),
    st.integers(1, 5),
)
def test_nearest_prompts_equals_an_enumeration(prompts: list[list[int]], count: int) -> None:
    for i, actual in enumerate(nearest_prompts(prompts, count)):
        others = [j for j in range(len(prompts)) if j != i]
        others.sort(key=lambda j: (-jaccard(prompts[i], prompts[j]), j))
        assert actual == others[:count]


def test_nearest_prompts_works_over_several_blocks() -> None:
    rng = random.Random(0)
    prompts = [rng.sample(range(30), 5) for _ in range(600)]
    actual = nearest_prompts(prompts, 3)
    for i in (0, 255, 256, 511, 512, 599):
        others = sorted(
            (j for j in range(600) if j != i),
            key=lambda j: (-jaccard(prompts[i], prompts[j]), j),
        )
        assert actual[i] == others[:3]


def test_contrast_pairs_skips_neighbours_with_the_same_answer() -> None:
    # abcd and abce share 3 of 5 letters, and are far from the rest; "y" answers both.
    demos = [demo("abcd", 1), demo("abce", 1), demo("abce", 2), demo("uvwx", 3)]
    pairs, dropped = contrast_pairs(demos, "neighbour", per_demonstration=2, iteration=4)
    actual = sorted(
        ("".join(map(chr, row["prompt_ids"])), row["chosen_ids"][0],
         "".join(map(chr, row["rejected_prompt_ids"])))
        for row in pairs
    )  # fmt: skip
    assert actual == [
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


def test_contrast_pairs_draws_from_the_nearest_prompts() -> None:
    """Eight prompts of one family, eight of another: the six nearest are of the own family."""
    demos = [demo(f"abcdef{i}", i + 10) for i in range(8)]
    demos += [demo(f"uvwxyz{i}", i + 20) for i in range(8)]
    pairs, dropped = contrast_pairs(demos, "neighbour", per_demonstration=6)
    assert len(pairs) == 16 * 6 and dropped == {"no_contrast": 0}
    for row in pairs:
        assert row["prompt_ids"][0] == row["rejected_prompt_ids"][0]


@settings(max_examples=40, deadline=None)
@given(demonstrations, st.integers(1, 3), st.integers(0, 3))
def test_contrast_pairs_never_have_a_right_rejected_prompt(
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


def test_contrast_pairs_edits_the_prompt() -> None:
    demos = [demo("a", 1), demo("b", 1), demo("c", 2)]

    def edit(prompt: str, rng: random.Random) -> str:
        return rng.choice("abcd")

    pairs, dropped = contrast_pairs(
        demos, "edit", per_demonstration=2, edit=edit, encode=letters, seed=5
    )
    actual = sorted((row["prompt_ids"][0], row["rejected_prompt_ids"][0]) for row in pairs)
    # a and b have the same answer, so neither contrasts with the other.
    assert {chr(x) + chr(y) for x, y in actual} <= {"ac", "ad", "bc", "bd", "ca", "cb", "cd"}
    assert len(set(actual)) == len(actual) == 6 and dropped == {"no_contrast": 0}
    again = contrast_pairs(demos, "edit", per_demonstration=2, edit=edit, encode=letters, seed=5)
    assert again.rows.to_dict() == pairs.to_dict()


def test_contrast_pairs_edits_in_a_row_lead_away_from_the_prompt() -> None:
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
    actual = [(r["prompt_ids"], r["rejected_prompt_ids"]) for r in both]
    assert words(["p q t t"])[0] not in [rejected for _, rejected in actual]
    assert len(actual) == 2 and short == {"no_contrast": 2}
    first = contrast_pairs([row], "edit", per_demonstration=2, edit=edit, encode=words).rows
    assert len(first) == 2  # one edit: no chain


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("a b", "a b", 0), ("a b", "a c", 2), ("a b", "a", 1), ("a a", "a", 1), ("", "a b", 2)],
)
def test_word_distance_counts_words(a: str, b: str, distance: int) -> None:
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


def test_contrast_pairs_crosses_edits_as_by_hand() -> None:
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
def test_contrast_pairs_crosses_edits_of_the_built_in_task(seed: int) -> None:
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


def test_contrast_pairs_ignores_an_edit_without_effect() -> None:
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


def test_contrast_pairs_fits_the_context() -> None:
    demos = [demo("a", 1), demo("ab", 2), demo("abcdef", 3)]
    pairs, dropped = contrast_pairs(demos, "neighbour", per_demonstration=2, context=7)
    assert all(len(r["rejected_prompt_ids"]) + len(r["rejected_ids"]) <= 7 for r in pairs)
    assert all(len(r["prompt_ids"]) + len(r["chosen_ids"]) <= 7 for r in pairs)
    assert len(pairs) == 2 and dropped == {"no_contrast": 4}  # none with "abcdef", 6 and 3


def test_contrast_pairs_edits_the_last_turn_of_a_conversation() -> None:
    """The edit sees that turn only, and the edited prompt stays a conversation."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    prompts: dict[int, list[dict[str, str]]] = {
        n: [*turns, {"role": "user", "content": text}] for n, text in ((1, "a, p"), (4, "b, r"))
    }

    def encode(given: list[Any]) -> list[list[int]]:
        assert all(prompt[:2] == turns for prompt in given)
        return by_word([prompt[2]["content"] for prompt in given])

    demos = [
        {
            **worded(prompt[2]["content"], n),
            "prompt": "shown to people",
            "messages": json.dumps(prompt),
            "prompt_key": prompt_key(prompt),
        }
        for n, prompt in prompts.items()
    ]
    steps = {"a, p": "b, r", "b, r": "b, s"}
    pairs = contrast_pairs(
        demos, "edit", crossed=True, edit=lambda text, rng: steps[text], encode=encode
    ).rows
    rows = [
        ("".join(map(chr, r["prompt_ids"])), "".join(map(chr, r["rejected_prompt_ids"])), text)
        for r in pairs
        for text in r["chosen_ids"][:1]
    ]
    assert sorted(rows) == [("ap", "br", 1), ("br", "ap", 4), ("br", "bs", 4)]
