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


def contrast_pairs(
    demonstrations: Iterable[Mapping[str, Any]],
    kind: Literal["neighbour", "edit"],
    *,
    per_demonstration: int = 1,
    edits: int = 1,
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
    has such a prompt is then true of both sides, and cannot be what the reward learns. context:
    most tokens of x' and y together. A demonstration with fewer such prompts than
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
        chains = _edit_chains(groups, answers, per_demonstration, edits, draw, edit)
        rows = _chain_rows(list(chains), encode)
    if context is not None:
        rows = [
            row
            for row in rows
            if len(row["rejected_ids"])
            + max(len(row["prompt_ids"]), len(row["rejected_prompt_ids"]))
            <= context
        ]
    wanted = per_demonstration * edits * sum(map(len, groups.values()))
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
                yield _Chain(key, list(group[0]["prompt_ids"]), completion, index, chain)


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
    chains: Sequence[_Chain], encode: Callable[[list[str]], list[list[int]]]
) -> list[Row]:
    encoded = iter(encode([text for chain in chains for text in chain.edits]))
    rows = []
    for chain in chains:
        before = chain.prompt_ids
        for _ in chain.edits:
            after = next(encoded)
            # Casing or white space alone may be lost in encoding, so that x' is x again.
            if after != before:
                text = chain.completion
                rows.append(pair_row(chain.key, before, text, after, text, chain.index))
            before = after
    return rows
