"""The E2E checker on sentences written for this test, with errors counted by hand."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_align.errors import UserError
from irl_align.tasks import e2e

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
    ("name[Wildwood], customer rating[high]", "Customers rate Wildwood highly.", {"customer rating": M}),
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


def test_there_are_many_cases():
    assert len({text for _, text, _ in CASES}) >= 60
