"""How English states the slots of the E2E NLG challenge: values, names and regular expressions.

All patterns are for text that :func:`irl_align.tasks.e2e_statements.normalise` returns, with names
masked by ``@``: lower case, no accents, blanks in place of hyphens between words.
"""

from __future__ import annotations

import re

ORDER = (
    "name",
    "eatType",
    "food",
    "priceRange",
    "customer rating",
    "area",
    "familyFriendly",
    "near",
)
"""The slots, in the order in which E2E writes them."""

# Values with the same meaning are one level. A text may leave two levels open ("affordable").
LOW, MID, HIGH = frozenset({"low"}), frozenset({"mid"}), frozenset({"high"})
OFF_SCALE = frozenset({"off scale"})  # "2 out of 5": E2E never asks for it

CLOSED: dict[str, dict[str, str]] = {
    "eatType": {"pub": "pub", "restaurant": "restaurant", "coffee shop": "coffee shop"},
    "food": {
        food: food.lower()
        for food in ("Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese")
    },
    "priceRange": {
        "cheap": "low",
        "less than £20": "low",
        "moderate": "mid",
        "£20-25": "mid",
        "high": "high",
        "more than £30": "high",
    },
    "customer rating": {
        "low": "low",
        "1 out of 5": "low",
        "average": "mid",
        "3 out of 5": "mid",
        "high": "high",
        "5 out of 5": "high",
    },
    "area": {"city centre": "city centre", "riverside": "riverside"},
    "familyFriendly": {"yes": "yes", "no": "no"},
}
"""Slot -> value -> meaning, for the slots whose values E2E fixes."""

# fmt: off
NAMES = [
    "Alimentum", "Aromi", "Bibimbap House", "Blue Spice", "Browns Cambridge", "Clowns", "Cocum",
    "Cotto", "Fitzbillies", "Giraffe", "Green Man", "Loch Fyne", "Midsummer House", "Strada",
    "Taste of Cambridge", "The Cambridge Blue", "The Cricketers", "The Dumpling Tree",
    "The Eagle", "The Golden Curry", "The Golden Palace", "The Mill", "The Olive Grove",
    "The Phoenix", "The Plough", "The Punter", "The Rice Boat", "The Twenty Two", "The Vaults",
    "The Waterman", "The Wrestlers", "Travellers Rest Beefeater", "Wildwood", "Zizzi",
]
# fmt: on
"""Venues that E2E describes; a prompt may name others."""

# fmt: off
NEIGHBOURS = [
    "All Bar One", "Avalon", "Burger King", "Café Adriatic", "Café Brazil", "Café Rouge",
    "Café Sicilia", "Clare Hall", "Crowne Plaza Hotel", "Express by Holiday Inn",
    "Rainbow Vegetarian Café", "Raja Indian Cuisine", "Ranch", "The Bakers",
    "The Portland Arms", "The Rice Boat", "The Six Bells", "The Sorrento", "Yippee Noodle Bar",
]
# fmt: on
"""Venues that E2E uses as landmarks; a prompt may name others."""

# Other spellings, as normalised regular expressions; "the" and a genitive s are always optional.
ALIASES = {
    "Bibimbap House": r"bibimbap",
    "Browns Cambridge": r"brown'?s(?: of)? cambridge|brown'?s",
    "Crowne Plaza Hotel": r"crowne? plaza",
    "Express by Holiday Inn": r"(?:express (?:by|at|of) )?(?:the )?holiday inn(?: express)?",
    "Fitzbillies": r"fitz ?bill(?:ies|y'?s?|ie'?s)",
    "Midsummer House": r"mid ?summer'?s? house",
    "Rainbow Vegetarian Café": r"rainbow(?: vegetarian| cafe)*",
    "Raja Indian Cuisine": r"raja(?: indian)?(?: cuisine| restaurant)?",
    "Taste of Cambridge": r"taste of (?:the )?cambridge",
    "The Bakers": r"bakers?",
    "The Cricketers": r"cricketers?",
    "The Six Bells": r"(?:six|6) bells?",
    "The Twenty Two": r"(?:twenty[ -]two|22)",
    "The Vaults": r"vaults?",
    "The Waterman": r"water ?m[ae]n",
    "The Wrestlers": r"wrestlers?",
    "Travellers Rest Beefeater": r"travell?er'?s'? rest(?: beef ?eater)?",
    "Yippee Noodle Bar": r"yippee(?: noodles?)?(?: bar)?",
}

PROXIMITY = (
    r"(?:near(?:s|by|est)?(?: to| by| of)?|clos(?:e|er|est|ely)(?: by)? to|close by|close|next to|"
    r"next door to|by|opposite|beside|besides|behind|around|across from|"
    r"across the (?:street|road|way) from|adjacent to|alongside|along from|not far from|"
    r"far from|down from|up from|minutes from|walk from|distance (?:of|from|to)|away from|"
    r"(?:vicinity|proximity|area|neighbou?rhood) (?:of|to|with)|neighbou?r(?:s|ing|to| to)?|"
    r"in front of|round the corner from|corner from|outside|past|block from|"
    r"street from|road from|door to|side of|right by|off)"
)
"""Words before a landmark."""

_COUNT = r"(?:[1-5]|one|two|three|four|five)"
_RATING = (
    r"(?:rat(?:ings?|ed|e|es|eing)|reviews?|reviewed|feedback|satisfaction(?: scores?| levels?)?|"
    r"scores?|scored|approval|stars?|rank(?:ings?|ed|s)|marks|opinions?|reputation|recommendations?)\b"
)
_RATER = (
    r"(?:(?:in |for |from |by |with |on )?(?:its |their |our |the |a )?"
    r"(?:customers?'?s?|consumers?'?|costumer|users?|guests?|diners?'?|visitors?|patrons?|clients?|"
    r"overall|quality|service|food|public|online|general|5 star|five star)(?: and)? )*"
)
_PRICE = (
    r"(?:(?:price|cost|pricing) ?(?:range[ds]?|level|point|bracket|category)|"
    r"pric(?:e|es|ed|ing|ings)|costs?|costing|priced range|menu prices)\b"
)
_PRICER = (
    r"(?:in |on )?(?:its |their |the |a )?(?:(?:menu|food|meal|overall|"
    r"quality and|to \w+) )?"
)
_IS = (
    r"(?: ?[:(,-] ?| )(?:(?:@|place|venue|restaurant|is|are|was|of|at|as|in|on|from|being|be|has|"
    r"have|been|it|its|they|by|customers?|which|that|range|level|around|about|just|only|considered|"
    r"listed|for|with|falls?|ranges?|and|out|to|run|runs|category|the|a|an|very|quite|fairly|"
    r"rather|pretty|also|relatively|somewhat|tends?|service|food|all) )*"
)

# "An average price of £30" is an average and does not call the price average.
_AVERAGE = (
    r"average(?:ly|d)?(?![^.;]{0,30}?(?:£|\b(?:20|25|30|[1-5] out|one out|three out|five out)\b))"
)

RATING_WORDS = {
    LOW: r"below average|lower|lowly|lowest|low|poor(?:ly)?|bad(?:ly)?|terribl[ey]|awful|negative|"
    r"unfavou?rabl[ey]|(?:not|\w+n't) (?:\w+ ){0,3}?(?:well|high(?:ly)?|good|great)",
    MID: rf"{_AVERAGE}|moderate(?:ly)?|medium|mid(?:dle|dling)?(?: range)?|decent(?:ly)?|"
    r"fair(?:ly)?|okay|ok|so so|satisfactory|acceptable|reasonabl[ey]|adequate(?:ly)?",
    HIGH: r"higher|highest|highly|high|excellent(?:ly)?|great|top|best|outstanding|perfect|superb|"
    r"exceptional(?:ly)?|fantastic|amazing|rave|wonderful",
    LOW | MID: r"mediocre",
    MID | HIGH: r"above average|good|well|positive(?:ly)?|favou?rabl[ey]|solid",
}
"""Adjectives of a customer rating and the levels that they leave open."""

PRICE_WORDS = {
    LOW | MID: r"affordabl[ey]|(?:reasonabl[ey]|fair(?:ly)?)(?: cheap(?:ly)?| inexpensive(?:ly)?)?|"
    r"decent(?:ly)?|acceptabl[ey]|less expensive|"
    r"not (?:too |very |so |that )?(?:high(?:ly)?|expensive)",
    MID | HIGH: r"not (?:too |very |so |that |the )?(?:low|cheap)(?:est)?|moderately high|"
    r"(?:quite|fairly|reasonably) (?:expensive|high)|above average",
    LOW: r"cheap(?:er|est|ly)?|low(?:er|est|ly)?|inexpensive(?:ly)?|below average|small|bargain|"
    r"budget|economical",
    MID: rf"{_AVERAGE}|moderate(?:ly)?(?: (?:cheap|expensive|inexpensive)(?:ly)?)?|medium|"
    r"mid(?:dle|dling)?(?: range| level)?|intermediate|standard|modest(?:ly)?|normal|"
    r"mid(?:dle)? of the road",
    HIGH: r"high(?:er|est|ly)?|(?:more )?expensive(?:ly)?|steep|hefty|premium|costly|pricey|"
    r"upper|exclusive|(?:costs?|charges?) a lot",
}
"""Adjectives of a price and the levels that they leave open."""

_RATING_WORD = "|".join(RATING_WORDS.values())
_PRICE_WORD = "|".join(PRICE_WORDS.values())
_NO_RATING_NEXT = rf"(?!,? (?:(?:customer|costumer|consumer|user|overall|quality) ?)*{_RATING})"
_NO_PRICE_NEXT = rf"(?! (?:{_PRICER}{_PRICE}|end\b|family|kid|child|quality))"
# "low prices and ratings" is a low rating; "a low price range and customer rating of 5" is not.
_NO_VALUE_NEXT = r"(?! (?:is|are|of|at|:)\b)"

_OUT_OF = (
    r"(?:\.0)?(?: ?stars?)?(?: ?(?:out ?of|out|of|/|in))(?: a| the)?(?: possible)?"
    r" ?(?:5|five)\b(?: ?stars?\b)?"
)
RATING = re.compile(
    rf"\b(?:(?P<count>{_COUNT}){_OUT_OF}(?: {_RATER}{_RATING})?"
    rf"|(?P<stars>{_COUNT}) ?stars?\b(?: {_RATER}{_RATING})?"
    rf"|(?P<before>{_RATING_WORD}) (?:{_RATER}{_RATING}{_NO_VALUE_NEXT}|{_PRICE} and "
    rf"(?:customer )?{_RATING}{_NO_VALUE_NEXT}(?! (?:{_COUNT}|{_RATING_WORD})\b))"
    rf"|{_RATING}{_IS}(?:(?P<points>{_COUNT})\b(?:{_OUT_OF})?"
    rf"|(?P<after>(?:{_RATING_WORD})\b){_NO_PRICE_NEXT}))"
)
"""A customer rating that the text states."""

_AMOUNT = (
    r"(?:[£$€#efl] ?)?(?:20|25|30|twenty[ -]five|twenty|thirty)(?: ?(?:pounds?|quid|gbp|£))?(?!\w)"
)
_LESS = (
    r"(?:less|lower|cheaper|fewer|smaller)(?: tha[nt]| then)?|under|below|beneath|up to|"
    r"(?:not?|never) (?:more|higher|greater|over)(?: than)?|at most|within|max(?:imum)?(?: of)?|<"
)
_MORE = (
    r"(?:not?|never) (?:less|lower|under|below)(?: than)?|"
    r"(?:more|greater|higher|larger|upwards?)(?: than| of| from)?|over|above|exceed(?:s|ing)?|"
    r"at least|from|(?:start|begin)\w*(?: at| from)?|in excess of|min(?:imum)?(?: of)?|>|beyond"
)
PRICE = re.compile(
    rf"(?:(?<![\w£])(?P<range>{_AMOUNT} ?(?:-|to|and|through|or|/)? ?{_AMOUNT})"
    rf"|(?<!\w)(?:(?P<less>{_LESS}) (?:an? |the )?(?:average )?(?:of )?(?P<most>{_AMOUNT})"
    rf"|(?P<more>{_MORE}) (?:an? |the )?(?:average )?(?:of )?(?P<least>{_AMOUNT}))"
    rf"|(?<![\w£])(?P<amount>{_AMOUNT})(?P<onward> ?\+| plus| (?:and|or) "
    rf"(?:up|more|above|over|higher))?(?P<downward> (?:and|or) (?:less|under|below|lower))?"
    rf"|\b(?P<before>{_PRICE_WORD}) (?:{_PRICER}{_PRICE}{_NO_VALUE_NEXT}|"
    rf"(?:customer )?rat(?:ing|ings|ed) and {_PRICE}{_NO_VALUE_NEXT}(?! (?:£|from|{_PRICE_WORD})))"
    rf"|\b{_PRICE}{_IS}(?P<after>(?:{_PRICE_WORD})\b){_NO_RATING_NEXT}"
    rf"|\b(?P<alone>not (?:too |very |so |that |the )?cheap(?:est)?|"
    rf"not (?:too |very |so |that )?expensive|affordabl[ey]|economical|"
    rf"(?:less|more|quite|fairly|reasonably) expensive|(?:reasonab|fair)ly (?:cheap|inexpensive)|"
    rf"moderately (?:cheap|expensive|inexpensive)|(?:in)?expensive(?:ly)?|cheap(?:er|est|ly)?|"
    rf"pricey|costly|(?:costs?|charges?) a lot|"
    rf"(?:mid(?:dle)? range|moderate(?:ly)?){_NO_RATING_NEXT})\b)"
)
"""A price that the text states."""

_TOWN = r"(?:the |a )?(?:city|town|cambridge)"
AREA = re.compile(
    r"(?P<out>\b(?:outside(?: of)?|out of|outskirts of|away from|(?:edge|end) of|far from|not in|"
    r"(?:north|south|east|west)\w* of|(?:blocks?|miles?|minutes?) from)(?: the)? )?"
    rf"\b(?:(?P<weak_centre>(?:near(?:by| to| by)?|close to|by)(?: the)? (?:city|town) "
    rf"cent(?:re|er)|in {_TOWN}(?!'?s? cent)|central(?:ly)?|(?<!of the )city(?! cent)|"
    rf"cent(?:re|er)(?! (?:of|in)))|"
    rf"(?P<centre>(?:city|town|cambridge)'?s? ?cent(?:re|er|ral)s?|downtown|inner city|"
    rf"cent(?:re|er) (?:of|in|city)(?: {_TOWN})?|(?:heart|middle) of {_TOWN})|"
    r"(?P<river>river ?(?:side|bank|front)s?|rivers?|water ?(?:side|front)|thames|quayside))\b"
)
"""Where a venue is."""

EAT_TYPE = re.compile(
    r"\b(?:(?P<coffee>coffee ?(?:shop|house|bar|place|store|joint|spot|cafe)s?)|"
    r"(?P<pub>pubs?|public house|tavern|ale ?house|gastro ?pub)|(?P<restaurant>restaurants?)|"
    r"(?P<weak_coffee>cafes?|coffees?|coffee\w+)|(?P<weak_pub>bars?|inn|beers?|pints?)|"
    r"(?P<weak_restaurant>eater(?:y|ies)|diners?|bistro|dining|eating|brasserie|(?:to|and) eat))\b"
)
"""What kind of venue it is. A restaurant is any place to eat, so it contradicts nothing."""

FOOD = re.compile(
    r"\b(?:(?P<chinese>chinese|china)|(?P<english>english|british(?! pounds?)|britain|england)|"
    r"(?P<fast>fast ?foods?)|(?P<french>french(?! fr(?:y|ies))|france)|(?P<indian>indian)|"
    r"(?P<italian>italian|italy)|(?P<japanese>japanese|japan)|"
    r"(?P<weak_fast>burgers?|hamburgers?|fries|drive thr\w+)|"
    r"(?P<weak_japanese>sushi|sashimi|ramen)|(?P<weak_italian>pastas?|pizzas?|spaghetti|lasagn\w+)|"
    r"(?P<weak_french>wines?|cheeses?|croissants?|crepes?)|"
    r"(?P<weak_english>fish (?:and|&) chips|roasts?)|(?P<weak_indian>curry|curries|tandoori)|"
    r"(?P<weak_chinese>noodles?|dim sum))\b"
)
"""Cuisines. A dish supports its cuisine but contradicts no other."""

_FAMILY = (
    r"(?:famil(?:y'?s?|ies)|kids?|kiddos?|child(?:ren)?s?|toddlers?|youngsters?|young ones|"
    r"little ones|(?:all|any) ages?|babies)"
)
_NOT = (
    r"(?:\bnot|n't|\b(?:is|does|are|do|was|ca|wo)nt|\bnon|\bno|\bnever|\bwithout|\bcannot|"
    r"\bnone|\bneither|\bnor|\banti|\bavoid|\bun|\bunsuitable|\bunfriendly|\binappropriate|"
    r"\bunwelcoming|\bdiscourag\w+|\black(?:s|ing)?)"
)
# Between a negation and the negated family: no other clause, at most 45 characters.
_DENIED = r"(?:(?!\b(?:and|but|yet|while|though)\b)[^.,;!?]){0,45}?"
_NOT_ONLY = r"(?! (?:only|just|further|far|more|less|longer|to mention)\b)"
_MORE_FAMILY = rf"(?:(?: (?:with|of|and|or|nor|&)| ?/)(?: (?:your|young|small|any))? ?{_FAMILY}\b)"
_WELCOME = (
    r"(?:allowed|welcomed?|permitted|friendly|recommended|suitable|catered|accepted|encouraged|"
    r"included|invited|advised|admitted|appropriate|be|go|visit|come|enter|bring)"
)
FAMILY = re.compile(
    rf"(?P<no>{_NOT}\b{_NOT_ONLY}{_DENIED}\b{_FAMILY}\b{_MORE_FAMILY}*"
    rf"|\bleave (?:\w+ ){{0,3}}{_FAMILY}\b"
    rf"|\b{_FAMILY} (?:\w+ ){{0,3}}?(?:not|no|\w+n't) (?:\w+ )?{_WELCOME}\b"
    rf"|\b{_FAMILY}(?: friendly| oriented)? ?[:?-]? ?no\b"
    rf"|\b{_FAMILY} (?:\w+ ){{0,2}}un(?:welcome|friendly)\b"
    rf"|\b{_FAMILY} free\b|\bmature\b|\bover 18s?\b|\b18 ?\+|\bgrown ?ups?\b"
    rf"|\badults?\b(?! and (?:kid|child)))"
    rf"|(?P<yes>\b{_FAMILY}\b)|(?P<weak_yes>\beveryone\b)"
)
"""Whether families are welcome."""

WEAK_RATING = re.compile(
    r"\b(?:(?P<high>highly recommended|popular|(?:high|excellent|top|great|best) quality|"
    r"excellent|best|good|well (?:received|liked|loved|regarded|reviewed)|acclaimed|"
    r"praised|top notch)|"
    r"(?P<mid>average|averagely|decent|mediocre|okay|ok)|"
    r"(?P<low>(?:low|poor) quality|poor(?:ly)?|bad|below average|not (?:highly )?recommended))\b"
)
"""Words that support a rating without naming one."""

WEAK_PRICE = re.compile(
    r"\b(?:(?P<high>high end|upscale|up ?market|fine dining|fancy|luxur\w+|high class|exclusive|"
    r"high range)|"
    r"(?P<mid>mid(?:dle)?|medium)|(?P<low>budget|bargain|value|low end))\b"
)
"""Words that support a price without naming one."""
