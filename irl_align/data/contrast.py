"""Contrast pairs: the same text is worse under another prompt, a near neighbour or an edit.

Length and fluency are equal on both sides, so only the match of prompt and text tells them apart.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from irl_align.data.pairs import PairRow, Pairs, by_prompt, finish_pairs, pair_row
from irl_align.data.rows import Prompt, last_text, prompt_key, stored_prompt, with_last_text
from irl_align.errors import UserError

NEAREST = 6
"""A neighbour is drawn from so many nearest prompts."""
_EDITS = 8  # draws of an edit that gives a prompt for which the completion is wrong
_PROMPTS = 48  # prompts drawn to find one that an edit can be crossed with

Edit = Callable[[str, random.Random], str]


def contrast_pairs(
    demonstrations: Iterable[Mapping[str, Any]],
    kind: Literal["neighbour", "edit"],
    *,
    per_demonstration: int = 1,
    edits: int = 1,
    crossed: bool = False,
    iteration: int = 0,
    seed: int = 0,
    edit: Edit | None = None,
    encode: Callable[[list[Prompt]], list[list[int]]] | None = None,
    context: int | None = None,
) -> Pairs:
    """(x, y) over (x', y), where y is no demonstration of the other prompt x'.

    neighbour: x' is drawn from the NEAREST prompts by Jaccard overlap of their token sets.

    edit: x' = edit(x, rng), turned into ids by encode. The last turn of a conversation is edited.
    With several `edits` in a row, x -> x' -> x'' ..., each further from x by its words, (x', y)
    over (x'', y) is a pair too. So both sides of a pair may have a prompt that no demonstration
    has. If the edits are `crossed`, each also makes (x', z) over (x, z), where z demonstrates a
    prompt that has all words that the edit added and none that it removed. Then edited prompts are
    preferred as often as rejected, and only the match of prompt and text tells the sides apart.

    context: the limit for the tokens of prompt and text together. A demonstration that has fewer
    such prompts than per_demonstration makes fewer pairs; the missing pairs are counted as
    no_contrast. Raises UserError: there is no edit, one prompt only, or no pair.
    """
    known = _Demonstrations.of(demonstrations)
    draw = f"{seed}/{iteration}"
    if kind == "neighbour":
        rows = _neighbour_rows(known, per_demonstration, draw)
    else:
        if edit is None or encode is None:
            raise UserError("pairs.contrast: found edit, but the data card names no edit")
        chains = list(_edit_chains(known, per_demonstration, edits, draw, edit))
        rows = _chain_rows(known, chains, encode, _Crossing(known, draw) if crossed else None)
    if context is not None:
        rows = [row for row in rows if _tokens(row) <= context]
    wanted = per_demonstration * edits * (1 + crossed) * sum(map(len, known.groups.values()))
    dropped = Counter({"no_contrast": wanted - len(rows)})
    return finish_pairs(rows, dropped, "demonstration/contrast", iteration, "", None)


def _tokens(row: PairRow) -> int:
    """Tokens of the longer side of a pair; both sides have the same text."""
    prompts = (row["prompt_ids"], row["rejected_prompt_ids"])
    return len(row["rejected_ids"]) + max(map(len, prompts))


@dataclass(frozen=True)
class _Demonstrations:
    groups: dict[str, list[Mapping[str, Any]]]
    """Prompt key -> its demonstrations."""
    answers: dict[str, set[tuple[int, ...]]]
    """Prompt key -> the ids of its completions."""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> _Demonstrations:
        groups = by_prompt(rows)
        return cls(
            groups,
            {key: {tuple(row["completion_ids"]) for row in group} for key, group in groups.items()},
        )

    def have(self, prompt: Prompt, completion: list[int]) -> bool:
        """Whether a completion demonstrates a prompt."""
        return tuple(completion) in self.answers.get(prompt_key(prompt), ())


# ---- neighbours


def _neighbour_rows(known: _Demonstrations, per_demonstration: int, draw: str) -> list[PairRow]:
    keys = list(known.groups)
    prompts = [list(group[0]["prompt_ids"]) for group in known.groups.values()]
    nearest = nearest_prompts(prompts, max(NEAREST, per_demonstration))
    rows = []
    for key, prompt_ids, others in zip(keys, prompts, nearest, strict=True):
        rng = random.Random(f"{draw}/neighbour/{key}")
        for demonstration in known.groups[key]:
            completion = list(demonstration["completion_ids"])
            free = [
                other for other in others if tuple(completion) not in known.answers[keys[other]]
            ]
            drawn = rng.sample(free, min(per_demonstration, len(free)))
            rows += [
                pair_row(key, prompt_ids, completion, prompts[other], completion, index)
                for index, other in enumerate(drawn)
            ]
    return rows


def nearest_prompts(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """For each of U prompts, the numbers of the `count` nearest others, nearest first.

    Near means a large Jaccard overlap of the sets of token ids; of equals, the lower number comes
    first. Raises UserError: there is only one prompt.
    """
    if len(prompts) < 2:
        raise UserError("pairs.contrast: found one prompt, a neighbour needs at least two")
    count = min(count, len(prompts) - 1)
    sets = [np.unique(np.asarray(ids, dtype=np.int64)) for ids in prompts]
    sizes = torch.tensor([len(ids) for ids in sets], dtype=torch.float64)
    owner = np.repeat(np.arange(len(sets)), [len(ids) for ids in sets])
    used, token = np.unique(np.concatenate(sets), return_inverse=True)
    has = torch.sparse_coo_tensor(  # (U, tokens in use)
        torch.from_numpy(np.stack([owner, token])),
        torch.ones(len(token), dtype=torch.float64),
        (len(sets), len(used)),
        check_invariants=False,
    ).coalesce()
    nearest: list[list[int]] = []
    for start in range(0, len(sets), 256):
        stop = min(start + 256, len(sets))
        block = torch.zeros(stop - start, len(used), dtype=torch.float64)
        within = (owner >= start) & (owner < stop)
        block[owner[within] - start, token[within]] = 1.0
        common = torch.sparse.mm(has, block.T).T  # (256, U)
        overlap = common / (sizes[start:stop, None] + sizes[None, :] - common)
        overlap[torch.arange(stop - start), torch.arange(start, stop)] = -1.0  # not itself
        nearest += _largest(overlap.numpy(), count)
    return nearest


def _largest(values: np.ndarray, count: int) -> list[list[int]]:
    """Columns of each row's `count` largest values, in descending order, then by column."""
    least = np.partition(values, -count, axis=1)[:, -count]
    chosen = []
    for row, bound in zip(values, least, strict=True):
        candidates = np.flatnonzero(row >= bound)
        order = np.lexsort((candidates, -row[candidates]))
        chosen.append([int(column) for column in candidates[order[:count]]])
    return chosen


# ---- edits


@dataclass(frozen=True)
class _Chain:
    """A demonstration's prompt and its edits, each further from it than the one before."""

    key: str
    prompt: Prompt
    prompt_ids: list[int]
    completion: list[int]
    index: int
    edits: list[str]
    """Text of the prompt, or of its last turn, after each edit."""

    def after(self, text: str) -> Prompt:
        """The prompt with this text."""
        return with_last_text(self.prompt, text)


def _edit_chains(
    known: _Demonstrations, per_demonstration: int, edits: int, draw: str, edit: Edit
) -> Iterator[_Chain]:
    for key, group in known.groups.items():
        rng = random.Random(f"{draw}/edit/{key}")
        for demonstration in group:
            completion, prompt = list(demonstration["completion_ids"]), stored_prompt(demonstration)
            firsts: dict[str, None] = {}
            for _ in range(_EDITS * per_demonstration):
                text = edit(last_text(prompt), rng)
                if not known.have(with_last_text(prompt, text), completion):
                    firsts[text] = None
                if len(firsts) == per_demonstration:
                    break
            for index, first in enumerate(firsts):
                chain = _Chain(
                    key, prompt, list(group[0]["prompt_ids"]), completion, index, [first]
                )
                _lengthen(chain, edits, known, rng, edit)
                yield chain


def _lengthen(
    chain: _Chain, edits: int, known: _Demonstrations, rng: random.Random, edit: Edit
) -> None:
    """Edit the last text until the chain has `edits` texts, or the draws run out.

    A new text must be further from the prompt, and the completion must be wrong for it.
    """
    first = last_text(chain.prompt)
    for _ in range(_EDITS * (edits - 1)):
        if len(chain.edits) == edits:
            return
        last = chain.edits[-1]
        text = edit(last, rng)
        further = word_distance(first, text) > word_distance(first, last)
        if further and not known.have(chain.after(text), chain.completion):
            chain.edits.append(text)


def word_distance(a: str, b: str) -> int:
    """How many words of either text the other lacks; a repeated word counts as often."""
    here, there = Counter(a.split()), Counter(b.split())
    return (here - there).total() + (there - here).total()


def _chain_rows(
    known: _Demonstrations,
    chains: Sequence[_Chain],
    encode: Callable[[list[Prompt]], list[list[int]]],
    crossing: _Crossing | None,
) -> list[PairRow]:
    encoded = iter(encode([chain.after(text) for chain in chains for text in chain.edits]))
    answers: dict[tuple[int, ...], set[tuple[int, ...]]] = {
        tuple(group[0]["prompt_ids"]): known.answers[key] for key, group in known.groups.items()
    }
    rows = []
    for chain in chains:
        before, before_ids = last_text(chain.prompt), chain.prompt_ids
        text, index = chain.completion, chain.index
        for after in chain.edits:
            ids = next(encoded)
            # An edit of casing or white space may be lost in encoding, so that x' equals x, or a
            # prompt that y demonstrates.
            if ids != before_ids and tuple(text) not in answers.get(tuple(ids), ()):
                rows.append(pair_row(chain.key, before_ids, text, ids, text, index))
                other = None
                if crossing is not None:
                    other = crossing.completion(chain.after(before), chain.after(after))
                if other is not None:
                    rows.append(pair_row(chain.key, ids, other, before_ids, other, index))
            before, before_ids = after, ids
    return rows


def words_of(text: str) -> frozenset[str]:
    """Words between blanks, without the punctuation at their ends."""
    return frozenset(word.strip(",.;:!?") for word in text.split())


class _Crossing:
    """Finds demonstrations that answer an edited prompt better than the prompt before the edit."""

    def __init__(self, known: _Demonstrations, draw: str) -> None:
        self.known, self.keys = known, list(known.groups)
        self.rng = random.Random(f"{draw}/crossed")
        self.words = {
            key: words_of(last_text(stored_prompt(group[0]))) for key, group in known.groups.items()
        }
        self.having: dict[str, list[str]] = {}
        """Word -> keys of the prompts that have it."""
        for key in self.keys:
            for word in self.words[key]:
                self.having.setdefault(word, []).append(key)

    def completion(self, prompt: Prompt, edited: Prompt) -> list[int] | None:
        """A demonstration of a prompt that has all words added by the edit and none removed by it.

        Of the prompts drawn, the one nearest to the edited prompt by words; None if none fits.
        """
        before, after = words_of(last_text(prompt)), words_of(last_text(edited))
        added, removed = sorted(after - before), before - after
        if not added and not removed:
            return None
        pools = [self.having.get(word, []) for word in added]
        pool = min(pools, key=len, default=self.keys)
        drawn = dict.fromkeys(self.rng.choices(pool, k=_PROMPTS) if pool else ())
        fit = [
            key
            for key in drawn
            if self.words[key].issuperset(added) and self.words[key].isdisjoint(removed)
        ]
        if not fit:
            return None
        nearest = min(fit, key=lambda key: len(self.words[key] ^ after))
        ids = list(self.rng.choice(self.known.groups[nearest])["completion_ids"])
        return None if self.known.have(prompt, ids) else ids
