"""The E2E checker on sentences written for this test, with errors counted by hand."""

import gzip
import itertools
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_align.errors import UserError
from irl_align.tasks import e2e, e2e_patterns
from irl_align.tasks.e2e_statements import normalise, statements

M, W, H = "missing", "wrong", "hallucinated"

# (prompt, text, errors)
CASES = [
    # Names and landmarks.
    (
        "name[The Rice Boat], eatType[restaurant], near[Express by Holiday Inn]",
        "The Rice Boat is a restaurant near Express by Holiday Inn",
        {},
    ),
    (
        "name[The Rice Boat], eatType[restaurant], near[Express by Holiday Inn]",
        "Express by Holiday Inn is a restaurant near The Rice Boat.",
        {"name": W, "near": W},
    ),
    (
        "name[Giraffe], eatType[pub], near[The Rice Boat]",
        "Next to the Rice Boat stands a pub by the name of Giraffe.",
        {},
    ),
    ("name[Giraffe], eatType[pub], near[The Rice Boat]", "Giraffe is a pub.", {"near": M}),
    (
        "name[Giraffe], eatType[pub], near[The Rice Boat]",
        "Giraffe is a pub beside Burger King.",
        {"near": W},
    ),
    ("name[Giraffe], eatType[pub]", "Giraffe is a pub close to Clare Hall.", {"near": H}),
    ("name[Giraffe], eatType[pub]", "Zizzi is a pub.", {"name": W}),
    ("name[Giraffe], eatType[pub]", "There is a pub that everybody talks about.", {"name": M}),
    ("name[Giraffe], eatType[pub]", "Giraffe is a pub, and so is Cotto.", {"name": W}),
    (
        "name[Zizzi], eatType[pub], near[Crowne Plaza Hotel]",
        "zizzi is a pub across from the crown plaza.",
        {},
    ),
    (
        "name[Fitzbillies], eatType[coffee shop], near[The Six Bells]",
        "Fitzbilly's coffee shop can be found not far from the Six Bells",
        {},
    ),
    (
        "name[The Cricketers], near[Café Sicilia], area[riverside]",
        "Cricketers, by the river, has Cafe Sicilia as a neighbour.",
        {},
    ),
    (
        "name[The Dandelion], near[Café Zürich], food[French]",
        "The Dandelion serves French food near Cafe Zurich.",
        {},
    ),
    (
        "name[The Dandelion], near[Café Zürich], food[French]",
        "The Sunflower serves French food near Café Zürich.",
        {"name": M},
    ),
    # A name is not a statement about food, price or area.
    ("name[The Golden Curry], food[French]", "The Golden Curry serves French food.", {}),
    ("name[The Golden Curry], food[Indian]", "Have a meal at The Golden Curry.", {"food": M}),
    ("name[Cotto], near[Raja Indian Cuisine]", "Cotto is next to Raja Indian Cuisine.", {}),
    ("name[Aromi], near[All Bar One]", "Aromi lies near All Bar One.", {}),
    (
        "name[Taste of Cambridge], near[Burger King], area[riverside]",
        "You will find Taste of Cambridge on the riverside near Burger King.",
        {},
    ),
    # eatType: a restaurant is any place to eat.
    ("name[Cocum], eatType[pub]", "Cocum is a pub and a fine restaurant.", {}),
    ("name[Cocum], eatType[pub]", "Cocum is a restaurant.", {"eatType": M}),
    ("name[Cocum], eatType[pub]", "Cocum is a coffee shop.", {"eatType": W}),
    ("name[Cocum], eatType[restaurant]", "Cocum is a pub.", {"eatType": W}),
    ("name[Cocum], food[Italian]", "Cocum is an Italian restaurant.", {}),
    ("name[Cocum], food[Italian]", "Cocum is an Italian coffee-shop.", {"eatType": H}),
    # Food.
    ("name[Strada], food[English]", "Strada cooks British dishes.", {}),
    ("name[Strada], food[Japanese]", "Sushi is what Strada does.", {}),
    ("name[Strada], food[Italian]", "Strada serves Chinese food.", {"food": W}),
    ("name[Strada], food[Italian]", "Strada serves Italian and Indian food.", {"food": W}),
    ("name[Strada], food[Fast food]", "Strada is a fast-food joint.", {}),
    ("name[Strada], area[riverside]", "Strada serves French food by the river.", {"food": H}),
    (
        "name[Strada], food[Fast food], priceRange[less than £20]",
        "Strada sells French fries and burgers for under 20 British pounds.",
        {},
    ),
    # Prices.
    ("name[Loch Fyne], priceRange[cheap]", "Loch Fyne has low prices.", {}),
    ("name[Loch Fyne], priceRange[cheap]", "Meals at Loch Fyne cost less than twenty pounds.", {}),
    ("name[Loch Fyne], priceRange[less than £20]", "Loch Fyne is an inexpensive place.", {}),
    ("name[Loch Fyne], priceRange[less than £20]", "Loch Fyne charges £20 or less.", {}),
    ("name[Loch Fyne], priceRange[£20-25]", "At Loch Fyne you pay between 20 and 25 pounds.", {}),
    ("name[Loch Fyne], priceRange[£20-25]", "Loch Fyne is moderately priced.", {}),
    ("name[Loch Fyne], priceRange[£20-25]", "Loch Fyne: mid-range, £20 - £25.", {}),
    ("name[Loch Fyne], priceRange[moderate]", "The average price at Loch Fyne is £20-25.", {}),
    ("name[Loch Fyne], priceRange[more than £30]", "Loch Fyne will cost you over £30.", {}),
    (
        "name[Loch Fyne], priceRange[more than £30]",
        "The average price at Loch Fyne is more than £30.",
        {},
    ),
    ("name[Loch Fyne], priceRange[high]", "Loch Fyne is in the upper price range.", {}),
    ("name[Loch Fyne], priceRange[high]", "Loch Fyne is cheap.", {"priceRange": W}),
    ("name[Loch Fyne], priceRange[cheap]", "Loch Fyne is not cheap.", {"priceRange": W}),
    ("name[Loch Fyne], priceRange[cheap]", "Loch Fyne is affordable.", {}),
    ("name[Loch Fyne], priceRange[moderate]", "Loch Fyne has reasonable prices.", {}),
    ("name[Loch Fyne], priceRange[high]", "Loch Fyne is reasonably priced.", {"priceRange": W}),
    ("name[Loch Fyne], food[English]", "Loch Fyne, cheap and English.", {"priceRange": H}),
    # Ratings.
    ("name[Wildwood], customer rating[5 out of 5]", "Wildwood is rated five out of five.", {}),
    ("name[Wildwood], customer rating[high]", "Wildwood is a 5-star venue.", {}),
    ("name[Wildwood], customer rating[high]", "Customers rate Wildwood highly.", {}),
    ("name[Wildwood], customer rating[high]", "Wildwood is highly acclaimed.", {}),
    ("name[Wildwood], eatType[pub]", "Wildwood is an acclaimed pub.", {}),
    ("name[Wildwood], customer rating[high]", "Wildwood is wild.", {"customer rating": M}),
    ("name[Wildwood], customer rating[5 out of 5]", "Wildwood is highly rated by guests.", {}),
    ("name[Wildwood], customer rating[3 out of 5]", "Wildwood got 3 of 5 stars.", {}),
    ("name[Wildwood], customer rating[3 out of 5]", "Wildwood has 3/5 in reviews.", {}),
    ("name[Wildwood], customer rating[low]", "Wildwood is poorly reviewed.", {}),
    ("name[Wildwood], customer rating[low]", "Wildwood does not have a good rating.", {}),
    ("name[Wildwood], customer rating[low]", "One star is all Wildwood has.", {}),
    (
        "name[Wildwood], customer rating[1 out of 5]",
        "Wildwood has an average customer rating of 1 out of 5.",
        {},
    ),
    (
        "name[Wildwood], customer rating[average]",
        "Wildwood has 4 out of 5 stars.",
        {"customer rating": W},
    ),
    ("name[Wildwood], eatType[pub]", "Wildwood, a five star pub.", {"customer rating": H}),
    # Prices beside ratings.
    (
        "name[Clowns], priceRange[cheap], customer rating[high]",
        "Clowns combines a low price with a high rating.",
        {},
    ),
    (
        "name[Clowns], priceRange[cheap], customer rating[high]",
        "Clowns combines a high price with a low rating.",
        {"priceRange": W, "customer rating": W},
    ),
    (
        "name[Clowns], priceRange[moderate], customer rating[low]",
        "Clowns has average prices and a low customer rating.",
        {},
    ),
    (
        "name[Clowns], priceRange[moderate], customer rating[average]",
        "Clowns has average prices.",
        {"customer rating": M},
    ),
    (
        "name[Clowns], priceRange[moderate], customer rating[average]",
        "Clowns has an average rating.",
        {"priceRange": M},
    ),
    (
        "name[Clowns], priceRange[high], customer rating[1 out of 5]",
        "Clowns: high price range and customer rating 1 out of 5.",
        {},
    ),
    (
        "name[Clowns], priceRange[£20-25], customer rating[high]",
        "Clowns has high customer ratings and a price range of £20-25.",
        {},
    ),
    (
        "name[Clowns], customer rating[low]",
        "Clowns has low prices.",
        {"priceRange": H, "customer rating": M},
    ),
    # Areas.
    ("name[Alimentum], area[city centre]", "Alimentum is in the center of the city.", {}),
    ("name[Alimentum], area[city centre]", "Alimentum is downtown.", {}),
    ("name[Alimentum], area[riverside]", "Alimentum sits on the banks of the river.", {}),
    ("name[Alimentum], area[riverside]", "Alimentum is in the riverside area of the city.", {}),
    ("name[Alimentum], area[riverside]", "Alimentum is in the city centre.", {"area": W}),
    ("name[Alimentum], area[riverside]", "Alimentum is outside the city centre.", {"area": M}),
    ("name[Alimentum], food[French]", "Alimentum: French food, riverside.", {"area": H}),
    # Families.
    ("name[Cotto], familyFriendly[yes]", "Cotto is kid friendly.", {}),
    ("name[Cotto], familyFriendly[yes]", "Bring the whole family to Cotto!", {}),
    ("name[Cotto], familyFriendly[yes]", "Children are welcome at Cotto.", {}),
    ("name[Cotto], familyFriendly[yes]", "Cotto is a child-friendly restaurant.", {}),
    ("name[Cotto], familyFriendly[yes]", "Cotto is customer friendly.", {"familyFriendly": M}),
    ("name[Cotto], familyFriendly[yes]", "Cotto is not family-friendly.", {"familyFriendly": W}),
    ("name[Cotto], familyFriendly[yes]", "Look no further than kid-friendly Cotto.", {}),
    ("name[Cotto], familyFriendly[yes]", "Not only is Cotto family friendly, it is fun.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto is a place for adults only.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto is not a good place to take the kids.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto isn't kid friendly.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto is child free.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto has no room for children.", {}),
    ("name[Cotto], familyFriendly[no]", "Children aren't allowed at Cotto.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto does not cater to families with children.", {}),
    ("name[Cotto], familyFriendly[no]", "Leave the kids at home when you go to Cotto.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto is a non-family-friendly venue.", {}),
    ("name[Cotto], familyFriendly[no]", "Cotto is great for kids.", {"familyFriendly": W}),
    (
        "name[Cotto], priceRange[cheap], familyFriendly[yes]",
        "Cotto is not expensive and it is family friendly.",
        {},
    ),
    (
        "name[Cotto], priceRange[high], familyFriendly[yes]",
        "Cotto is family friendly, not cheap though.",
        {},
    ),
    ("name[Cotto], food[Chinese]", "Cotto: Chinese food for families.", {"familyFriendly": H}),
    # Whole prompts, and texts that say little.
    (
        "name[The Eagle], eatType[coffee shop], food[Japanese], priceRange[less than £20], "
        "customer rating[low], area[riverside], familyFriendly[yes], near[Burger King]",
        "the eagle is a kid friendly japanese coffee shop on the riverside near burger king . it "
        "has a low customer rating and a price range of less than £20 .",
        {},
    ),
    (
        "name[The Eagle], eatType[coffee shop], food[Japanese], priceRange[less than £20], "
        "customer rating[low], area[riverside], familyFriendly[yes], near[Burger King]",
        "The Eagle is an expensive Japanese pub in the city centre near Burger King with five "
        "stars.",
        {
            "eatType": W,
            "priceRange": W,
            "customer rating": W,
            "area": W,
            "familyFriendly": M,
        },
    ),
    ("name[The Mill], food[Indian], area[riverside]", "", {"name": M, "food": M, "area": M}),
]


@pytest.mark.parametrize(("prompt", "text", "expected"), CASES)
def test_errors_by_hand(prompt, text, expected):
    assert e2e.errors(prompt, text) == expected
    assert e2e.errors(prompt.lower(), text.lower()) == expected


def test_gold_counts_and_divides():
    prompts = [
        "name[Cotto], food[Italian], area[riverside]",
        "name[Zizzi], eatType[pub]",
        "name[Aromi], priceRange[high], near[Clare Hall], familyFriendly[no]",
    ]
    completions = [
        "Cotto serves Italian food on the riverside.",
        "Zizzi is a cheap coffee shop.",  # type wrong, price hallucinated
        "Aromi is expensive and welcomes children.",  # family wrong, near missing
    ]
    result = e2e.gold(prompts, completions, [])
    assert result.rows[0] == {
        "slot_errors": 0.0,
        "slots": 3.0,
        "missing": 0.0,
        "wrong": 0.0,
        "hallucinated": 0.0,
        "fully_right": 1.0,
    }
    assert [row["slot_errors"] for row in result.rows] == [0.0, 2.0, 2.0]
    assert [row["hallucinated"] for row in result.rows] == [0.0, 1.0, 0.0]
    assert result.corpus == pytest.approx(
        {
            "slot_error_rate": 4 / 9,
            "fully_right": 1 / 3,
            "missing_rate": 1 / 9,
            "wrong_rate": 2 / 9,
            "hallucinated_rate": 1 / 9,
        }
    )
    assert e2e.gold.headline in result.corpus
    assert e2e.gold.lower_is_better


def test_gold_has_bleu_where_there_are_references():
    # All of the unigrams to 4-grams match but for the last word: see test_tasks_bleu.
    texts, references = ["cotto has good french food"], [["Cotto has good French meals"]]
    result = e2e.gold(["name[Cotto], food[French]"], texts, references)
    assert result.corpus["bleu"] == pytest.approx(100 * 0.2**0.25)


@pytest.mark.parametrize(
    ("prompt", "actual"),
    [
        ("name[Cotto], colour[red]", "colour"),
        ("name[Cotto], food[Thai]", "Thai"),
        ("name[Cotto] food[Thai", "food"),
        ("name[Cotto], name[Zizzi]", "name"),
        ("", "no slot"),
    ],
)
def test_prompt_of_another_task_is_refused(prompt, actual):
    with pytest.raises(UserError, match=actual) as error:
        e2e.errors(prompt, "text")
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_must_match():
    with pytest.raises(UserError, match="2 prompts and 1 completions"):
        e2e.gold(["name[Cotto]", "name[Zizzi]"], ["Cotto"], [])


VALUES = {slot: list(values) for slot, values in e2e_patterns.CLOSED.items()}
VALUES |= {"name": e2e_patterns.NAMES, "near": e2e_patterns.NEIGHBOURS}


PRICE_TEXT = {"cheap": "low", "moderate": "moderate", "high": "high"}


def template(mr):
    """A plain text that states every slot of a prompt and nothing else."""
    slots = e2e.slots_of(mr)
    near = f" near {slots['near']}" if "near" in slots else ""
    area = {"city centre": " in the city centre", "riverside": " in the riverside area"}
    where = area[slots["area"].lower()] if "area" in slots else ""
    sentences = [f"{slots.get('name', 'It')} is a {slots.get('eatType', 'place')}{where}{near}"]
    if "food" in slots:
        sentences.append(f"It serves {slots['food']} food")
    if "priceRange" in slots:
        price = slots["priceRange"].lower()
        sentences.append(f"Its prices are {PRICE_TEXT.get(price, price)}")
    if "customer rating" in slots:
        sentences.append(f"Its customer rating is {slots['customer rating']}")
    if "familyFriendly" in slots:
        negation = "" if slots["familyFriendly"].lower() == "yes" else "not "
        sentences.append(f"It is {negation}family friendly")
    return ". ".join(sentences) + "."


@st.composite
def prompts(draw):
    slots = draw(st.sets(st.sampled_from(e2e_patterns.ORDER[1:]), min_size=2))
    written = [slot for slot in e2e_patterns.ORDER if slot in slots or slot == "name"]
    chosen = {slot: draw(st.sampled_from(VALUES[slot])) for slot in written}
    if chosen.get("near") == chosen["name"]:
        chosen["near"] = "Clare Hall"
    return ", ".join(f"{slot}[{value}]" for slot, value in chosen.items())


@settings(max_examples=150, deadline=None)
@given(prompts(), st.integers(0, 2**32), st.booleans())
def test_edit_changes_the_meaning_of_one_slot(prompt, seed, lower):
    if lower:
        prompt = prompt.lower()
    edited = e2e.edit(prompt, random.Random(seed))
    assert edited == e2e.edit(prompt, random.Random(seed))
    assert (edited == edited.lower()) == lower
    before, after = e2e.slots_of(prompt), e2e.slots_of(edited)
    changed = {s for s in before.keys() | after.keys() if before.get(s) != after.get(s)}
    assert len(changed) == 1
    assert list(after) == [slot for slot in e2e_patterns.ORDER if slot in after]
    assert e2e.errors(prompt, template(prompt)) == {}
    assert e2e.errors(edited, template(edited)) == {}
    assert set(e2e.errors(edited, template(prompt))) == changed


def test_edit_values_changes_a_value_in_half_of_the_edits():
    prompt = "name[The Punter], eatType[pub], food[Indian], area[riverside]"
    before, count = e2e.slots_of(prompt), {"change": 0, "add": 0, "drop": 0}
    rng = random.Random(5)
    for _ in range(600):
        after = e2e.slots_of(e2e.edit_values(prompt, rng))
        grown = len(after) - len(before)
        count[{1: "add", -1: "drop", 0: "change"}[grown]] += 1
    assert 260 < count["change"] < 340  # 300, three standard deviations of 12
    assert 100 < count["add"] < 200 and 100 < count["drop"] < 200


def test_edit_adds_drops_and_changes_equally_often():
    prompt, rng = "name[Cotto], food[French], area[riverside]", random.Random(0)
    sizes = [len(e2e.slots_of(e2e.edit(prompt, rng))) for _ in range(300)]
    assert {size: 60 < sizes.count(size) < 140 for size in (2, 3, 4)} == {2: True, 3: True, 4: True}


TEXT = """
the a is are not no very low high average good cheap expensive inexpensive moderately
quite fairly reasonably price prices priced range rating rated customer customers star
stars 1 3 5 out of five £20 £30 25 less more than under over and or family kids child
friendly adults only children city centre river near by Cotto pub coffee shop costs a
lot , . - 20-25
"""
WORDS = TEXT.split()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=25), prompts())
def test_statements_have_known_meanings_for_any_text(words, prompt):
    stated = statements(normalise(" ".join(words)))
    meanings = {level for values in e2e_patterns.CLOSED.values() for level in values.values()}
    for statement in itertools.chain.from_iterable(stated.values()):
        assert statement.levels
        assert statement.levels <= meanings | {"off scale"}
    assert set(e2e.errors(prompt, " ".join(words)).values()) <= {M, W, H}


def _data(split):
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("IRL_ALIGN_DATA", root.parent / "shared" / "data"))
    path = folder / "e2e" / f"{split}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path}: set IRL_ALIGN_DATA to the folder that holds e2e/")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("split", "prompts"), [("train", 4862), ("dev", 547), ("test", 630)])
def test_errors_is_empty_for_a_full_statement_of_every_prompt(split, prompts):
    mrs = sorted({row["mr"] for row in _data(split)})
    assert len(mrs) == prompts
    assert [mr for mr in mrs if e2e.errors(mr, template(mr))] == []
    lower = [mr.lower() for mr in mrs]
    assert [mr for mr in lower if e2e.errors(mr, template(mr).lower())] == []


@pytest.mark.parametrize(
    ("split", "rate", "right"), [("dev", 0.0707, 0.7327), ("test", 0.0789, 0.6785)]
)
def test_gold_of_human_references_is_as_documented(split, rate, right):
    """The numbers of the module's documentation."""
    rows = _data(split)
    corpus = e2e.gold([row["mr"] for row in rows], [row["ref"] for row in rows], []).corpus
    assert corpus["slot_error_rate"] == pytest.approx(rate, abs=0.0002)
    assert corpus["fully_right"] == pytest.approx(right, abs=0.0002)
