"""Corpus BLEU and chrF by sacrebleu, with any number of references per completion."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from irl_align.errors import UserError


def corpus_bleu(completions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Lowercased BLEU in percent, with sacrebleu's default tokenisation and smoothing.

    completions: B texts. references: one or more texts for each completion; their numbers may
    differ. Raises UserError: the lengths differ, or a completion has no reference.
    """
    streams = _streams("BLEU", completions, references)
    from sacrebleu.metrics.bleu import BLEU

    # sacrebleu's annotation lacks the None that its documentation asks for.
    return float(BLEU(lowercase=True).corpus_score(completions, streams).score)  # type: ignore[arg-type]


def corpus_chrf(completions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Lowercased chrF2 in percent (Popovic 2015): F-score with beta 2 of character n-grams up to 6.

    The best of several references counts. Arguments and errors are those of corpus_bleu.
    """
    streams = _streams("chrF", completions, references)
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF(lowercase=True).corpus_score(completions, streams).score)  # type: ignore[arg-type]


def reference_metrics(
    completions: Sequence[str],
    references: Sequence[Sequence[str]],
    known: Collection[str] = (),
) -> dict[str, float]:
    """`bleu` and `chrf` in percent, except those whose names are in `known`.

    They are no part of a task's gold metric: chrF takes seconds, too long for every PPO update.
    """
    metrics = {"bleu": corpus_bleu, "chrf": corpus_chrf}
    return {n: score(completions, references) for n, score in metrics.items() if n not in known}


def _streams(
    name: str, completions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[str | None]]:
    """One stream per reference number, as sacrebleu expects; None marks a missing reference."""
    if len(completions) != len(references):
        raise UserError(
            f"{name}: references has {len(references)} rows, expected one per completion, "
            f"{len(completions)}"
        )
    if not completions:
        raise UserError(f"{name}: completions is empty, expected at least one text")
    empty = next((row for row, texts in enumerate(references) if not texts), None)
    if empty is not None:
        raise UserError(f"{name}: references[{empty}] is empty, expected at least one text")
    most = max(map(len, references))
    return [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
