"""Contrast pairs: the same text is worse under another prompt, a near neighbour or an edit.

Length and fluency are alike on both sides, so that only the match of prompt and text can tell.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from irl_align.data import prompt_key
from irl_align.errors import UserError
from irl_align.neighbours import nearest_prompts
from irl_align.pairs import Pairs, Row, by_prompt, finish_pairs, pair_row

NEAREST = 6
"""A contrast prompt is drawn from so many nearest ones."""
_EDITS = 8  # draws until an edit gives a prompt that the demonstration is not an answer to
_PROMPTS = 48  # draws among which the prompt that an edit is crossed with is sought


def contrast_pairs(
    demonstrations: Iterable[Mapping[str, Any]],
    kind: Literal["neighbour", "edit"],
    *,
    per_demonstration: int = 1,
    crossed: bool = False,
    iteration: int = 0,
    seed: int = 0,
    edit: Callable[[str, random.Random], str] | None = None,
    encode: Callable[[list[str]], list[list[int]]] | None = None,
    context: int | None = None,
) -> Pairs:
    """(x, y) over (x', y) with another prompt x' for which y is not a demonstration.

    neighbour: x' is drawn from the NEAREST prompts by Jaccard overlap of their token sets. edit:
    x' = edit(x, rng), turned into ids by encode. An edited prompt is none that was demonstrated, so
    a reward can learn that in place of the match. Where edits are crossed, each comes with
    (x', z) over (x, z), z demonstrating a prompt that has the words the edit brought and none that
    it took: on either side there are then as many edited prompts, and only the match tells.
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
        edits = list(_edits(groups, answers, per_demonstration, draw, edit))
        rows = _edit_rows(edits, encode, _Crossing(groups, answers, draw) if crossed else None)
    if context is not None:
        rows = [
            row
            for row in rows
            if len(row["rejected_ids"])
            + max(len(row["prompt_ids"]), len(row["rejected_prompt_ids"]))
            <= context
        ]
    wanted = per_demonstration * (1 + crossed) * sum(map(len, groups.values()))
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
class _Edit:
    """A demonstration, and an edit of its prompt that it does not answer."""

    key: str
    prompt: str
    prompt_ids: list[int]
    completion: list[int]
    index: int
    edited: str


def _edits(
    groups: Mapping[str, list[Mapping[str, Any]]],
    answers: Mapping[str, set[tuple[int, ...]]],
    per_demonstration: int,
    seed: str,
    edit: Callable[[str, random.Random], str],
) -> Iterator[_Edit]:
    for key, group in groups.items():
        rng = random.Random(f"{seed}/edit/{key}")
        for demonstration in group:
            completion, prompt = list(demonstration["completion_ids"]), demonstration["prompt"]
            drawn: dict[str, None] = {}
            for _ in range(_EDITS * per_demonstration):
                text = edit(prompt, rng)
                if tuple(completion) not in answers.get(prompt_key(text), ()):
                    drawn[text] = None
                if len(drawn) == per_demonstration:
                    break
            for index, text in enumerate(drawn):
                yield _Edit(key, prompt, list(group[0]["prompt_ids"]), completion, index, text)


def _edit_rows(
    edits: Sequence[_Edit],
    encode: Callable[[list[str]], list[list[int]]],
    crossing: _Crossing | None,
) -> list[Row]:
    rows = []
    encoded = encode([edit.edited for edit in edits])
    for edit, ids in zip(edits, encoded, strict=True):
        own, text = edit.prompt_ids, edit.completion
        if ids == own:  # casing or white space alone may be lost in encoding
            continue
        rows.append(pair_row(edit.key, own, text, ids, text, edit.index))
        other = crossing.completion(edit) if crossing is not None else None
        if other is not None:
            rows.append(pair_row(edit.key, ids, other, own, other, edit.index))
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

    def completion(self, edit: _Edit) -> list[int] | None:
        """A demonstration of a prompt that has all words the edit brought and none that it took,
        the nearest by words of those drawn; None where none is found."""
        after, before = words_of(edit.edited), self.words[edit.key]
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
        return found if tuple(found) not in self.answers[edit.key] else None
