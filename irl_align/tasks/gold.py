"""The two parts of a task: a gold metric that judges completions, and an edit of prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from irl_align.errors import UserError
from irl_align.tasks.bleu import corpus_bleu

PromptEdit = Callable[[str, random.Random], str]
"""Turns a prompt into a neighbouring one that asks for something else (a slot is added, dropped or
changed), so that a demonstration of the first is wrong for the second."""

SlotError = Literal["missing", "wrong", "hallucinated"]
"""A slot is asked for and absent; has another value, or two; or is stated but not asked for."""


@dataclass(frozen=True)
class GoldResult:
    """Judgements of B completions."""

    corpus: dict[str, float]
    """Name -> value over all completions; rates and shares in [0, 1], BLEU in percent."""
    rows: list[dict[str, float]]
    """B dicts, one per completion, in their order."""


class GoldMetric(Protocol):
    """Judges completions by their prompts and references, for reports and never for selection."""

    @property
    def headline(self) -> str:
        """Name in GoldResult.corpus of the number that summarises the metric."""

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller headline is better."""

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> GoldResult:
        """Judge B completions. references is empty or has one list of texts per completion."""


@dataclass(frozen=True)
class SlotErrorRate:
    """Gold metric of a data-to-text task: errors over the slots that the prompts ask for.

    check(prompt, completion) returns the number of slots asked for and the slots in error.
    """

    check: Callable[[str, str], tuple[int, Mapping[str, SlotError]]]
    headline: str = "slot_error_rate"
    lower_is_better: bool = True

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> GoldResult:
        """Rows: slot_errors, slots, missing, wrong, hallucinated, fully_right (0 or 1).

        Corpus: slot_error_rate, fully_right, missing_rate, wrong_rate, hallucinated_rate, and
        bleu (lowercased) if there are references.
        """
        if not prompts or len(prompts) != len(completions):
            raise UserError(
                f"gold metric: found {len(prompts)} prompts and {len(completions)} completions, "
                "expected equal numbers, at least one"
            )
        rows = [self._row(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        total = {name: sum(row[name] for row in rows) for name in rows[0]}
        corpus = {"slot_error_rate": total["slot_errors"] / total["slots"]}
        corpus["fully_right"] = total["fully_right"] / len(rows)
        for kind in get_args(SlotError):
            corpus[f"{kind}_rate"] = total[kind] / total["slots"]
        if any(references):
            corpus["bleu"] = corpus_bleu(completions, references)
        return GoldResult(corpus, rows)

    def _row(self, prompt: str, completion: str) -> dict[str, float]:
        slots, errors = self.check(prompt, completion)
        kinds = list(errors.values())
        row = {"slot_errors": float(len(kinds)), "slots": float(slots)}
        row |= {kind: float(kinds.count(kind)) for kind in get_args(SlotError)}
        return row | {"fully_right": float(not kinds)}
