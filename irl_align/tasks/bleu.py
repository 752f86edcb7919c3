"""Corpus BLEU over any number of references per completion, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

from irl_align.errors import UserError


def corpus_bleu(
    completions: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = True
) -> float:
    """BLEU in percent, sacrebleu's default tokenisation and smoothing.

    completions: B texts. references: for each of them one or more texts; the numbers may differ.
    Raises UserError when the lengths differ or a completion has no reference.
    """
    if len(completions) != len(references):
        raise UserError(
            f"BLEU: references has {len(references)} rows, expected one per completion, "
            f"{len(completions)}"
        )
    if not completions:
        raise UserError("BLEU: completions is empty, expected at least one text")
    empty = next((row for row, texts in enumerate(references) if not texts), None)
    if empty is not None:
        raise UserError(f"BLEU: references[{empty}] is empty, expected at least one text")
    from sacrebleu.metrics.bleu import BLEU

    # sacrebleu wants one stream per reference number; None marks "no such reference".
    most = max(map(len, references))
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
    # Its annotation leaves the None out; its documentation asks for it.
    return float(BLEU(lowercase=lowercase).corpus_score(completions, streams).score)  # type: ignore[arg-type]
