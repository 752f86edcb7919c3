"""The division by prompt: disjoint, nested and independent of the order of rows."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.own_card import DEMOS, write_card

from irl_align.config.data import DataOptions
from irl_align.data.rows import prompt_key
from irl_align.data.splits import carve, choose_prompts, data_checksum, divide, merged_keys
from irl_align.errors import UserError


def demos(numbers: list[int]) -> list[dict[str, str]]:
    return [{"prompt": f"p{n % 61}", "completion": f"c{n}"} for n in numbers]


def options(**values: object) -> DataOptions:
    return DataOptions(card="own", **{"held_out": 0.3, **values})


def prompts_of(rows: list[dict[str, str]]) -> set[str]:
    return {row["prompt"] for row in rows}


NUMBERS = st.permutations(range(183))


@settings(max_examples=20, deadline=None)
@given(NUMBERS, st.integers(0, 99), st.sampled_from(["same", "disjoint"]))
def test_divide_is_disjoint_by_prompt_and_complete(
    numbers: list[int], seed: int, reward_data: str
) -> None:
    rows = demos(numbers)
    parts = divide(rows, options(reward_data=reward_data), seed)
    held_out, sft, reward = map(prompts_of, (parts.held_out, parts.sft, parts.reward))
    assert not held_out & sft and not held_out & reward
    own = parts.sft + parts.held_out
    if reward_data == "disjoint":
        assert not sft & reward
        own = own + parts.reward
    else:
        assert parts.reward == parts.sft
    assert sorted(row["completion"] for row in own) == sorted(row["completion"] for row in rows)
    # Each part keeps the order of the rows; which part a row is in does not depend on the order.
    again = divide(
        sorted(rows, key=lambda row: row["completion"]), options(reward_data=reward_data), seed
    )
    for part in ("sft", "reward", "held_out"):
        assert sorted(getattr(parts, part), key=str) == sorted(getattr(again, part), key=str)
    assert parts.sft == [row for row in rows if row["prompt"] in sft]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 0.99), st.floats(0.5, 0.99))
def test_divide_nests_smaller_shares_part_by_part(seed: int, one: float, other: float) -> None:
    rows = demos(list(range(183)))
    settings_ = {"reward_data": "disjoint"}
    small = divide(rows, options(share=min(one, other), **settings_), seed)
    large = divide(rows, options(share=max(one, other), **settings_), seed)
    whole = divide(rows, options(**settings_), seed)
    for part in ("sft", "reward", "held_out"):
        names = [prompts_of(getattr(division, part)) for division in (small, large, whole)]
        assert names[0] <= names[1] <= names[2]


def test_divide_keeps_prompts_together_that_are_read_as_the_same() -> None:
    """Three spellings of each prompt; in the middle of the rows the spelling changes."""
    texts = [spelling(f"Prompt {n}") for spelling in (str, str.lower, str.upper) for n in range(60)]
    rows = [{"prompt": text, "completion": "c"} for text in texts]
    same = merged_keys(texts, map(str.lower, texts))
    values = options(reward_data="disjoint", share=0.9)
    parts = divide(rows, values, 0, same)
    read = [
        {p.lower() for p in prompts_of(getattr(parts, x))} for x in ("sft", "reward", "held_out")
    ]
    assert not read[0] & read[1] and not read[0] & read[2] and not read[1] & read[2]
    names = ("sft", "reward", "held_out")
    assert [parts.counts(same)[f"{name}_prompts"] for name in names] == list(map(len, read))
    apart = divide(rows, values, 0)
    assert {p.lower() for p in prompts_of(apart.sft)} & {
        p.lower() for p in prompts_of(apart.held_out)
    }
    # A prompt that has no other spelling is where it would be without the others.
    alone = [{"prompt": "alone", "completion": "c"}, *rows]
    part = {
        name: "alone" in prompts_of(getattr(divide(alone, values, 0, same), name)) for name in names
    }
    assert part == {
        name: "alone" in prompts_of(getattr(divide(alone, values, 0), name)) for name in names
    }


def test_merged_keys_gives_the_smallest_key_in_any_order() -> None:
    texts, read = ["A", "a", "b", "A"], [1, 1, 2, 1]
    first = min(prompt_key("A"), prompt_key("a"))
    other = max(prompt_key("A"), prompt_key("a"))
    assert merged_keys(texts, read) == {other: first}
    assert merged_keys(texts[::-1], read[::-1]) == {other: first}


def test_divide_does_not_depend_on_other_prompts() -> None:
    rows = demos(list(range(183)))
    values = options(share=0.8, reward_data="disjoint")
    whole, half = divide(rows, values, 0), divide(rows[:31], values, 0)
    own = prompts_of(rows[:31])
    for part in ("sft", "reward", "held_out"):
        assert prompts_of(getattr(half, part)) == prompts_of(getattr(whole, part)) & own


def test_divide_has_the_asked_sizes_and_depends_on_the_seed() -> None:
    rows = [{"prompt": f"p{n}", "completion": "c"} for n in range(4000)]
    parts = divide(
        rows, options(share=0.5, held_out=0.1, reward_data="disjoint", reward_share=0.25), 0
    )
    # 2000, of which 200; of the other 1800 a quarter. Four standard deviations of each count.
    counts = parts.counts()
    assert abs(counts["held_out_prompts"] - 200) < 56
    assert abs(counts["reward_prompts"] - 450) < 80
    assert abs(counts["sft_prompts"] - 1350) < 120
    assert counts["sft_rows"] == len(parts.sft)
    assert prompts_of(parts.sft) != prompts_of(divide(rows, options(share=0.5), 1).sft)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0001}, r"data\.share: of 9 demonstrations none is left for sft"),
        ({"held_out": 0.0001}, r"data\.held_out: of 9 demonstrations none is left for held_out"),
        (
            {"reward_data": "disjoint", "reward_share": 0.0001},
            r"data\.reward_share: of 9 demonstrations none is left for reward",
        ),
    ],
)
def test_divide_refuses_an_empty_part(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        divide(demos(list(range(9))), options(**values), 0)


def test_prompt_key_and_data_checksum_depend_on_the_content() -> None:
    talk = [{"role": "user", "content": "Hi"}]
    assert prompt_key(talk) == prompt_key([{"content": "Hi", "role": "user"}]) != prompt_key("Hi")
    # The definition, by hashlib itself.
    assert prompt_key("Hé") == hashlib.sha256("Hé".encode()).hexdigest()[:16]
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    swapped = [{"completion": "b", "prompt": "a"}, {"completion": "d", "prompt": "c"}]
    content = b'{"completion":"b","prompt":"a"}\n{"completion":"d","prompt":"c"}\n'
    assert data_checksum(rows) == data_checksum(swapped) == hashlib.sha256(content).hexdigest()
    assert data_checksum(rows[::-1]) != data_checksum(rows)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.text(max_size=4), min_size=1), st.integers(0, 9), st.integers(1, 20))
def test_choose_prompts_nests_smaller_counts(keys: set[str], seed: int, count: int) -> None:
    chosen = choose_prompts(sorted(keys), count, seed)
    assert len(chosen) == min(count, len(keys)) and chosen <= keys
    assert chosen <= choose_prompts(sorted(keys, reverse=True), count + 1, seed)
    assert choose_prompts(keys, None, seed) == keys


def chats(greetings: int) -> list[dict[str, Any]]:
    """Sixty conversations of different questions that open with so many greetings."""
    turns = (("user", "hi {1}"), ("assistant", "yes?"), ("user", "question {0}"))
    return [
        {
            "prompt": [
                {"role": role, "content": text.format(n, n % greetings)} for role, text in turns
            ],
            "completion": f"c{n}",
        }
        for n in range(60)
    ]


@pytest.mark.parametrize(("greetings", "apart"), [(1, False), (30, True)])
def test_divide_keeps_conversations_that_open_alike_together_if_all_parts_have_rows(
    greetings: int, apart: bool
) -> None:
    parts = divide(chats(greetings), options(), 0)
    assert parts.sft and parts.held_out
    sft, held_out = (
        {row["prompt"][0]["content"] for row in part} for part in (parts.sft, parts.held_out)
    )
    assert sft.isdisjoint(held_out) == apart


@pytest.mark.parametrize(("greetings", "apart"), [(1, False), (30, True)])
def test_carve_gives_every_split_rows_of_its_own(
    greetings: int, apart: bool, tmp_path: Path
) -> None:
    card = write_card(
        tmp_path,
        DEMOS.replace(
            "{train: {files: demos.*}}", "{train: {files: demos.*}, dev: {from: train, share: 0.3}}"
        ),
    )
    rows = chats(greetings)
    train, dev = (carve(card, split, rows) for split in ("train", "dev"))
    assert train and dev and sorted(map(str, train + dev)) == sorted(map(str, rows))
    openings = ({row["prompt"][0]["content"] for row in part} for part in (train, dev))
    assert set.isdisjoint(*openings) == apart
