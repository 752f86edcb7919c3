"""Corpus BLEU and chrF against values worked out by hand and sacrebleu's own functions."""

import pytest
import sacrebleu

from irl_align.errors import UserError
from irl_align.tasks.bleu import corpus_bleu, corpus_chrf, reference_metrics


def test_one_reference_by_hand():
    # Of 5, 4, 3, 2 n-grams 4, 3, 2, 1 match; as long as the reference, so no brevity penalty.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert corpus_bleu(["a b c d e"], [["a b c d f"]]) == pytest.approx(expected)


def test_corpus_bleu_takes_different_numbers_of_references():
    # The second text finds its fifth word in its second reference: 9 of 10 words match.
    expected = 100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25
    references = [["a b c d f"], ["a b c d f", "x x x x e"]]
    assert corpus_bleu(["a b c d e", "a b c d e"], references) == pytest.approx(expected)


def test_corpus_bleu_ignores_case():
    assert corpus_bleu(["A b C d"], [["a B c D"]]) == pytest.approx(100)


def test_scores_equal_those_of_sacrebleu():
    texts = ["The Mill is a cheap pub.", "Cotto serves French food near the river, cheaply."]
    references = [
        ["The Mill is an inexpensive pub.", "A cheap pub is The Mill."],
        ["Cotto is a French place near the river.", "Near the river, Cotto serves French food."],
    ]
    streams = [list(stream) for stream in zip(*references, strict=True)]
    expected = sacrebleu.corpus_bleu(texts, streams, lowercase=True).score
    assert corpus_bleu(texts, references) == pytest.approx(expected)
    lowered = [text.lower() for text in texts]
    streams = [[text.lower() for text in stream] for stream in streams]
    chrf = sacrebleu.corpus_chrf(lowered, streams).score
    assert corpus_chrf(texts, references) == pytest.approx(chrf)
    assert reference_metrics(texts, references) == pytest.approx({"bleu": expected, "chrf": chrf})
    assert reference_metrics(texts, references, {"bleu": 0.0}) == pytest.approx({"chrf": chrf})


def test_corpus_chrf_equals_a_hand_count():
    # n-grams of 1 and 2 characters: of "abcd" a, b, c and ab, bc are in "abcx"; of 3 abc. Longer
    # ones: none match; 5 and 6 do not exist, and do not count. F2 with P = R is P.
    precisions = (3 / 4, 2 / 3, 1 / 2, 0)
    assert corpus_chrf(["ab cd"], [["abcx"]]) == pytest.approx(100 * sum(precisions) / 4)
    assert corpus_chrf(["ABCD"], [["zzzz", "abcd"]]) == pytest.approx(100)  # the better one


@pytest.mark.parametrize(
    ("texts", "references", "actual"),
    [
        (["a"], [], "0 rows"),
        (["a", "b"], [["a"], []], r"references\[1\] is empty"),
        ([], [], "completions is empty"),
    ],
)
def test_mistakes_are_named(texts, references, actual):
    with pytest.raises(UserError, match=actual):
        corpus_bleu(texts, references)
    with pytest.raises(UserError, match=f"chrF.*{actual}"):
        corpus_chrf(texts, references)
