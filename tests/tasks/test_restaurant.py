"""The built-in task: its texts say what was drawn, and its checker finds exactly that."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_align.errors import UserError
from irl_align.tasks import restaurant
from irl_align.tasks.mr import parse, render

PROMPT = "name[the green door], food[thai], price[cheap], area[riverside]"


@st.composite
def slot_sets(draw, fewest=3):
    optional = st.sets(st.sampled_from(restaurant.SLOTS[1:]), min_size=fewest - 1)
    chosen = draw(optional) | {"name"}
    return {
        slot: draw(st.sampled_from(list(restaurant.PHRASES[slot])))
        for slot in restaurant.SLOTS
        if slot in chosen
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the green door is a cheap thai place by the river.", {}),
        ("The  Green Door is an INEXPENSIVE place by the river. It offers pad thai.", {}),
        ("the green door is a cheap place by the river.", {"food": "missing"}),
        ("the green door is a cheap greek place by the river.", {"food": "wrong"}),
        ("the green door is a cheap thai and greek place by the river.", {"food": "wrong"}),
        (
            "the red lion is a pricey thai place by the river near the zoo.",
            {"name": "wrong", "price": "wrong", "near": "hallucinated"},
        ),
        (
            "there is a cheap thai place called the green door with a high rating.",
            {"rating": "hallucinated", "area": "missing"},
        ),
        (
            "nothing to see here.",
            dict.fromkeys(("name", "food", "price", "area"), "missing"),
        ),
        ("", dict.fromkeys(("name", "food", "price", "area"), "missing")),
    ],
)
def test_errors_by_hand(text, expected):
    assert restaurant.errors(PROMPT, text) == expected


def test_phrases_cannot_be_confused():
    """Alone and in every pair, a phrase states its own value and no other."""
    stated = {
        phrase: (slot, value)
        for slot, values in restaurant.PHRASES.items()
        for value, phrases in values.items()
        for phrase in ([value] if slot == "name" else itertools.chain(*phrases))
    }
    count = sum(
        1 if slot == "name" else len(list(itertools.chain(*phrases)))
        for slot, values in restaurant.PHRASES.items()
        for phrases in values.values()
    )
    assert len(stated) == count  # no phrase stands for two values
    for first, second in itertools.product(stated, stated):
        said: dict[str, set[str]] = {}
        for slot, value in (stated[first], stated[second]):
            said.setdefault(slot, set()).add(value)
        actual = restaurant.errors("name[the green door]", f"{first} {second}")
        names = said.pop("name", set())
        expected = dict.fromkeys(said, "hallucinated")
        if names != {"the green door"}:
            expected["name"] = "wrong" if names else "missing"
        assert actual == expected, (first, second)


@settings(max_examples=200, deadline=None)
@given(slot_sets(), slot_sets(), st.integers(0, 2**32))
def test_checker_is_exact(said, asked, seed):
    """A text of one set of slots, judged by another, has just the differences for errors."""
    text = restaurant.realise(said, random.Random(seed))
    assert text == text.lower()
    assert 1 <= text.count(".") <= 2
    expected = {}
    for slot in said.keys() | asked.keys():
        if slot not in said:
            expected[slot] = "missing"
        elif slot not in asked:
            expected[slot] = "hallucinated"
        elif said[slot] != asked[slot]:
            expected[slot] = "wrong"
    assert restaurant.errors(render(asked), text) == expected
    assert restaurant.errors(render(said), text) == {}


@settings(max_examples=100, deadline=None)
@given(slot_sets(), st.integers(0, 2**32))
def test_edit_asks_for_something_else(slots, seed):
    edited = parse(restaurant.edit(render(slots), random.Random(seed)))
    changed = {s for s in slots.keys() | edited.keys() if slots.get(s) != edited.get(s)}
    assert len(changed) == 1
    assert 3 <= len(edited) <= 7
    assert list(edited) == [slot for slot in restaurant.SLOTS if slot in edited]
    text = restaurant.realise(slots, random.Random(seed))
    assert set(restaurant.errors(render(edited), text)) == changed


def test_demonstrations_are_right_and_repeatable():
    rows = restaurant.demonstrations("train", 500, seed=1)
    assert rows == restaurant.demonstrations("train", 500, seed=1)
    assert rows != restaurant.demonstrations("train", 500, seed=2)
    assert rows[:20] == restaurant.demonstrations("train", 20, seed=1)
    assert {len(parse(row["prompt"])) for row in rows} == {3, 4, 5, 6, 7}
    prompts, completions = ([row[key] for row in rows] for key in ("prompt", "completion"))
    result = restaurant.gold(prompts, completions, [[text] for text in completions])
    assert result.corpus["slot_error_rate"] == 0.0
    assert result.corpus["fully_right"] == 1.0
    assert result.corpus["bleu"] == pytest.approx(100)


def test_demonstrations_never_change():
    """Runs made with other versions stay comparable."""
    assert restaurant.demonstrations("test", 1, seed=0) == [
        {
            "prompt": "name[the lucky seven], family[no], near[the opera]",
            "completion": "the lucky seven is a place without a children's menu next to the opera.",
        }
    ]


def test_splits_share_no_prompt():
    """Prompts of three slots are few enough to meet by chance."""
    prompts = {
        split: {
            row["prompt"] for seed in (0, 1) for row in restaurant.demonstrations(split, 1500, seed)
        }
        for split in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(prompts, 2):
        assert not prompts[one] & prompts[other]


def test_noise_is_one_error_in_that_share_of_rows():
    clean = restaurant.demonstrations("train", 1000, seed=3)
    noisy = restaurant.demonstrations("train", 1000, seed=3, noise=0.3)
    assert [row["prompt"] for row in clean] == [row["prompt"] for row in noisy]
    result = restaurant.gold(
        [row["prompt"] for row in noisy], [row["completion"] for row in noisy], []
    )
    errors = [row["slot_errors"] for row in result.rows]
    assert errors == [
        float(before["completion"] != after["completion"])
        for before, after in zip(clean, noisy, strict=True)
    ]
    assert 240 < sum(errors) < 360  # 300 in the mean, standard deviation 14.5
    for kind in ("missing", "wrong", "hallucinated"):
        assert sum(row[kind] for row in result.rows) > 60


def test_every_demonstration_errs_at_noise_one():
    rows = restaurant.demonstrations("validation", 300, seed=0, noise=1.0)
    result = restaurant.gold(
        [row["prompt"] for row in rows], [row["completion"] for row in rows], []
    )
    assert {row["slot_errors"] for row in result.rows} == {1.0}


def test_there_are_hundreds_of_wordings():
    slots = parse(PROMPT)
    texts = {restaurant.realise(slots, random.Random(seed)) for seed in range(2000)}
    assert len(texts) > 300
    assert {text.count(".") for text in texts} == {1, 2}


@pytest.mark.parametrize(
    ("arguments", "actual"),
    [
        ({"split": "dev"}, "'dev'"),
        ({"size": 0}, "size is 0"),
        ({"noise": 1.5}, "noise is 1.5"),
    ],
)
def test_mistakes_are_named(arguments, actual):
    with pytest.raises(UserError, match=actual):
        restaurant.demonstrations(**{"split": "train", "size": 1, "seed": 0, **arguments})


@pytest.mark.parametrize("prompt", ["name[the pink moon], food[thai]", "food[thai], colour[red]"])
def test_prompt_of_another_task_is_refused(prompt):
    with pytest.raises(UserError, match="expected slots name, food"):
        restaurant.errors(prompt, "text")
