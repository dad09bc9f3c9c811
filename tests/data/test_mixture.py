"""Several held sources as one stream: where each window stands in it, which a stored teacher is asked by."""

import numpy as np
from helpers_data import Bytes, stored, texts
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.mixture import mixture
from ftc.data.prepare import Prepared, PreparedSource
from ftc.data.source_table import Source
from ftc.data.tokens import EMPTY

tokenizers_st = st.sampled_from([Bytes(), Bytes(256, 257), Bytes(256, 256), Bytes(256, None), Bytes(None, None)])


def prepared(parts, tokenizer):
    """A run whose sources hold these lists of documents."""
    sources = [
        PreparedSource(Source(f"{number}.txt"), stored(part, tokenizer), EMPTY) for number, part in enumerate(parts)
    ]
    return Prepared(tokenizer, None, tuple(sources))


@given(tokenizer=tokenizers_st, counts=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_a_window_of_any_source_stands_at_its_place_in_the_stream_of_all(tokenizer, counts, seed):
    size = 5
    run = prepared([[*texts(count, 9, seed + n), "x" * 2 * size] for n, count in enumerate(counts)], tokenizer)
    whole = run.train.stream(tokenizer)
    mixed, seen = mixture(run, size, seed=seed), set()
    for windows in mixed.windows:
        for index in range(windows.num_windows(0)):
            window = windows.cut(0, index)
            np.testing.assert_array_equal(window.inputs, whole[window.place : window.place + size])
            np.testing.assert_array_equal(window.labels, whole[window.place + 1 : window.place + size + 1])
            seen.add(window.place)
    assert len(seen) == sum(windows.num_windows(0) for windows in mixed.windows)


def test_windows_of_whole_documents_have_no_place():
    (windows,) = mixture(prepared([texts(9, 9)], Bytes()), 8, packing="documents").windows
    assert windows.cut(0, 0).place is None
