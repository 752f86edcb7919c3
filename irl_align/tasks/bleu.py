"""Corpus BLEU and chrF over any number of references per completion, by sacrebleu."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from irl_align.errors import UserError


def corpus_bleu(
    completions: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = True
) -> float:
    """BLEU in percent, sacrebleu's default tokenisation and smoothing.

    completions: B texts. references: for each of them one or more texts; the numbers may differ.
    Raises UserError when the lengths differ or a completion has no reference.
    """
    streams = _streams("BLEU", completions, references)
    from sacrebleu.metrics.bleu import BLEU

    # Its annotation leaves the None out; its documentation asks for it.
    return float(BLEU(lowercase=lowercase).corpus_score(completions, streams).score)  # type: ignore[arg-type]


def corpus_chrf(
    completions: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = True
) -> float:
    """chrF2 in percent (Popovic 2015): F-score, with beta 2, of character n-grams up to 6.

    Of several references the best one of each completion counts. Arguments and errors as above.
    """
    streams = _streams("chrF", completions, references)
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF(lowercase=lowercase).corpus_score(completions, streams).score)  # type: ignore[arg-type]


def reference_metrics(
    completions: Sequence[str],
    references: Sequence[Sequence[str]],
    known: Collection[str] = (),
) -> dict[str, float]:
    """`bleu` and `chrf` in percent, lowercased, but for those that are known already.

    LogProbGap from a task's gold, since chrF takes seconds, too long for every update of PPO.
    """
    metrics = {"bleu": corpus_bleu, "chrf": corpus_chrf}
    return {n: score(completions, references) for n, score in metrics.items() if n not in known}


def _streams(
    name: str, completions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[str | None]]:
    """One stream per reference number, as sacrebleu wants it; None marks "no such reference"."""
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
