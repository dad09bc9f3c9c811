"""The Kneser-Ney trigram against a written-out definition, and as a distribution."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.ngram import Trigram, _discounts
from ftc.errors import FtcError

documents_st = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=5)
VOCAB, BOUNDARY = 7, 6


def brute_force(documents, u, v, w):
    """p(w | u v) by the recursion as written, over tuples and dictionaries."""
    trigrams = Counter()
    for document in documents:
        padded = [BOUNDARY, BOUNDARY, *document, BOUNDARY]
        trigrams.update(zip(padded, padded[1:], padded[2:], strict=False))
    bigrams = Counter((b, c) for _, b, c in trigrams)
    unigrams = Counter((c,) for _, c in bigrams)
    p = 1 / VOCAB
    for table, context in ((unigrams, ()), (bigrams, (v,)), (trigrams, (u, v))):
        discount = _discounts(np.array(list(table.values())))
        inside = {gram: count for gram, count in table.items() if gram[:-1] == context}
        if not inside:
            continue
        total = sum(inside.values())
        mass = sum(discount[min(count, 3)] for count in inside.values())
        count = inside.get((*context, w), 0)
        p = (count - discount[min(count, 3)]) / total + mass / total * p
    return p


@given(documents=documents_st, context=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_probabilities_equal_the_written_out_definition(documents, context):
    model = Trigram(documents, VOCAB, BOUNDARY)
    u, v = context
    words = np.arange(VOCAB)
    got = model.probability(np.full(VOCAB, u), np.full(VOCAB, v), words)
    np.testing.assert_allclose(got, [brute_force(documents, u, v, w) for w in words], rtol=1e-12, atol=0)


@given(documents=documents_st)
def test_every_context_sums_to_one_and_no_word_is_impossible(documents):
    model = Trigram(documents, VOCAB, BOUNDARY)
    u, v, w = np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), np.arange(VOCAB), indexing="ij")
    p = model.probability(u, v, w)
    assert p.min() > 0
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-12)


def test_a_trigram_beats_the_uniform_on_text_like_its_own():
    text = [[0, 1, 2, 3, 4, 5] * 20]
    model = Trigram(text, VOCAB, BOUNDARY)
    assert model.nats(text) < 0.2 * 120 * np.log(VOCAB)
    assert model.bits_per_byte(text, 120) == pytest.approx(model.nats(text) / np.log(2) / 120)


def test_ids_outside_the_vocabulary_and_empty_text_are_errors():
    with pytest.raises(FtcError, match="outside the vocabulary"):
        Trigram([[9]], VOCAB, BOUNDARY)
    for nothing in ([], [[]]):
        with pytest.raises(FtcError, match="no tokens"):
            Trigram(nothing, VOCAB, BOUNDARY)
