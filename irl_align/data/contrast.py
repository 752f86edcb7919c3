"""Contrast pairs: the same text is worse under another prompt, a near neighbour or an edit.

Length and fluency are alike on both sides, so that only the match of prompt and text can tell.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from irl_align.data.loading import prompt_key
from irl_align.data.neighbours import nearest_prompts
from irl_align.data.pairs import Pairs, Row, by_prompt, finish_pairs, pair_row
from irl_align.errors import UserError

NEAREST = 6
"""A contrast prompt is drawn from so many nearest ones."""
_EDITS = 8  # draws until an edit gives a prompt that the demonstration is not an answer to
_PROMPTS = 48  # draws among which the prompt that an edit is crossed with is sought


def contrast_pairs(
    demonstrations: Iterable[Mapping[str, Any]],
    kind: Literal["neighbour", "edit"],
    *,
    per_demonstration: int = 1,
    edits: int = 1,
    crossed: bool = False,
    iteration: int = 0,
    seed: int = 0,
    edit: Callable[[str, random.Random], str] | None = None,
    encode: Callable[[list[str]], list[list[int]]] | None = None,
    context: int | None = None,
) -> Pairs:
    """(x, y) over (x', y) with another prompt x' for which y is not a demonstration.

    neighbour: x' is drawn from the NEAREST prompts by Jaccard overlap of their token sets. edit:
    x' = edit(x, rng), turned into ids by encode. With several edits in a row, x -> x' -> x'' ...,
    each further from x by its words, (x', y) over (x'', y) is a pair too: that no demonstration
    has such a prompt is then true of both sides. Where edits are crossed, each comes with
    (x', z) over (x, z), z demonstrating a prompt that has the words the edit brought and none that
    it took: edited prompts are then preferred as often as rejected, and only the match tells.
    context: most tokens of x' and y together. A demonstration with fewer such prompts than
    per_demonstration makes fewer pairs; what is short is counted as no_contrast.
    """
    groups = by_prompt(demonstrations)
    answers = {
        key: {tuple(row["completion_ids"]) for row in group} for key, group in groups.items()
    }
    if kind == "neighbour":
        rows = _neighbour_rows(groups, answers, per_demonstration, f"{seed}/{iteration}")
    else:
        if edit is None or encode is None:
            raise UserError("pairs.contrast: found edit, but the data card names no edit")
        draw = f"{seed}/{iteration}"
        chains = list(_edit_chains(groups, answers, per_demonstration, edits, draw, edit))
        rows = _chain_rows(chains, encode, _Crossing(groups, answers, draw) if crossed else None)
    if context is not None:
        rows = [
            row
            for row in rows
            if len(row["rejected_ids"])
            + max(len(row["prompt_ids"]), len(row["rejected_prompt_ids"]))
            <= context
        ]
    wanted = per_demonstration * edits * (1 + crossed) * sum(map(len, groups.values()))
    dropped = Counter({"no_contrast": wanted - len(rows)})
    return finish_pairs(rows, dropped, "demonstration/contrast", iteration, "", None)


def _neighbour_rows(
    groups: Mapping[str, list[Mapping[str, Any]]],
    answers: Mapping[str, set[tuple[int, ...]]],
    per_demonstration: int,
    seed: str,
) -> list[Row]:
    keys = list(groups)
    prompts = [list(groups[key][0]["prompt_ids"]) for key in keys]
    nearest = nearest_prompts(prompts, max(NEAREST, per_demonstration))
    rows = []
    for key, prompt_ids, others in zip(keys, prompts, nearest, strict=True):
        rng = random.Random(f"{seed}/neighbour/{key}")
        for demonstration in groups[key]:
            completion = list(demonstration["completion_ids"])
            free = [other for other in others if tuple(completion) not in answers[keys[other]]]
            drawn = rng.sample(free, min(per_demonstration, len(free)))
            for index, other in enumerate(drawn):
                rows.append(
                    pair_row(key, prompt_ids, completion, prompts[other], completion, index)
                )
    return rows


@dataclass(frozen=True)
class _Chain:
    """A demonstration's prompt and its edits, each further from it than the one before."""

    key: str
    prompt: str
    prompt_ids: list[int]
    completion: list[int]
    index: int
    edits: list[str]


def _edit_chains(
    groups: Mapping[str, list[Mapping[str, Any]]],
    answers: Mapping[str, set[tuple[int, ...]]],
    per_demonstration: int,
    edits: int,
    seed: str,
    edit: Callable[[str, random.Random], str],
) -> Iterator[_Chain]:
    for key, group in groups.items():
        rng = random.Random(f"{seed}/edit/{key}")
        for demonstration in group:
            completion = list(demonstration["completion_ids"])
            prompt = demonstration["prompt"]
            drawn: dict[str, list[str]] = {}

            def wrong(text: str, answer: tuple[int, ...] = tuple(completion)) -> bool:
                return answer not in answers.get(prompt_key(text), ())

            for _ in range(_EDITS * per_demonstration):
                text = edit(prompt, rng)
                if wrong(text):
                    drawn.setdefault(text, [text])
                if len(drawn) == per_demonstration:
                    break
            for index, chain in enumerate(drawn.values()):
                _lengthen(chain, edits, prompt, rng, edit, wrong)
                yield _Chain(key, prompt, list(group[0]["prompt_ids"]), completion, index, chain)


def _lengthen(
    chain: list[str],
    edits: int,
    prompt: str,
    rng: random.Random,
    edit: Callable[[str, random.Random], str],
    wrong: Callable[[str], bool],
) -> None:
    """Edit the last text until the chain has so many, where draws find one that is further from
    the prompt, and for which the completion is wrong."""
    for _ in range(_EDITS * (edits - 1)):
        if len(chain) == edits:
            return
        text = edit(chain[-1], rng)
        if wrong(text) and word_distance(prompt, text) > word_distance(prompt, chain[-1]):
            chain.append(text)


def word_distance(a: str, b: str) -> int:
    """How many words of either text the other lacks, each as often as it occurs."""
    here, there = Counter(a.split()), Counter(b.split())
    return (here - there).total() + (there - here).total()


def _chain_rows(
    chains: Sequence[_Chain],
    encode: Callable[[list[str]], list[list[int]]],
    crossing: _Crossing | None,
) -> list[Row]:
    encoded = iter(encode([text for chain in chains for text in chain.edits]))
    rows = []
    for chain in chains:
        before, before_ids = chain.prompt, chain.prompt_ids
        for after in chain.edits:
            ids = next(encoded)
            # Casing or white space alone may be lost in encoding, so that x' is x again.
            if ids != before_ids:
                text, index = chain.completion, chain.index
                rows.append(pair_row(chain.key, before_ids, text, ids, text, index))
                other = crossing.completion(before, after) if crossing is not None else None
                if other is not None:
                    rows.append(pair_row(chain.key, ids, other, before_ids, other, index))
            before, before_ids = after, ids
    return rows


def words_of(text: str) -> frozenset[str]:
    """Words between blanks, without the punctuation at their ends."""
    return frozenset(word.strip(",.;:!?") for word in text.split())


class _Crossing:
    """Finds demonstrations that answer an edited prompt better than the prompt it was made of."""

    def __init__(
        self,
        groups: Mapping[str, list[Mapping[str, Any]]],
        answers: Mapping[str, set[tuple[int, ...]]],
        seed: str,
    ) -> None:
        self.groups, self.answers, self.keys = groups, answers, list(groups)
        self.rng = random.Random(f"{seed}/crossed")
        self.words = {key: words_of(group[0]["prompt"]) for key, group in groups.items()}
        self.having: dict[str, list[str]] = {}
        for key in self.keys:
            for word in self.words[key]:
                self.having.setdefault(word, []).append(key)

    def completion(self, prompt: str, edited: str) -> list[int] | None:
        """A demonstration of a prompt that has all words the edit brought and none that it took,
        the nearest to the edited one by words of those drawn; None where none is found."""
        before, after = words_of(prompt), words_of(edited)
        brought, taken = sorted(after - before), before - after
        if not brought and not taken:
            return None
        pools = [self.having.get(word, []) for word in brought]
        pool = min(pools, key=len, default=self.keys)
        drawn = dict.fromkeys(self.rng.choices(pool, k=_PROMPTS) if pool else ())
        fit = [
            key
            for key in drawn
            if self.words[key].issuperset(brought) and self.words[key].isdisjoint(taken)
        ]
        if not fit:
            return None
        nearest = min(fit, key=lambda key: len(self.words[key] ^ after))
        found = list(self.rng.choice(self.groups[nearest])["completion_ids"])
        return found if tuple(found) not in self.answers.get(prompt_key(prompt), ()) else None
