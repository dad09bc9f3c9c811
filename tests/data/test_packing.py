"""Best-fit packing: everything once, nothing cut that fits, little room left."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.packing import fill, pack


@given(lengths=st.lists(st.integers(0, 40), max_size=60), capacity=st.integers(1, 16))
def test_every_token_is_packed_once_and_nothing_that_fits_is_cut(lengths, capacity):
    packed = pack(lengths, capacity)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    pieces = [0] * len(lengths)
    for window in range(len(packed)):
        numbers = range(packed.first[window], packed.first[window + 1])
        assert 0 < sum(packed.length[number] for number in numbers) <= capacity
        for number in numbers:
            document, offset = packed.document[number], packed.offset[number]
            seen[document][offset : offset + packed.length[number]] += 1
            pieces[document] += 1
    assert all((each == 1).all() for each in seen)
    assert pieces == [-(-length // capacity) for length in lengths]


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=60))
def test_no_two_windows_could_share_one(lengths):
    packed = pack(lengths, 8)
    sums = np.add.reduceat(packed.length, packed.first[:-1])
    assert sorted(sums)[:2] == [sums[0]] or sum(sorted(sums)[:2]) > 8


def test_short_documents_leave_little_room():
    lengths = np.random.default_rng(0).integers(1, 200, 5000)
    packed = pack(lengths, 256)
    assert lengths.sum() / (len(packed) * 256) > 0.99


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_a_window_is_filled_with_the_oldest_and_what_fits_beside_it(lengths):
    chosen = fill(lengths, 8)
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
    left = 8 - sum(lengths[index] for index in chosen)
    assert left >= 0 or chosen == [0]
    assert all(lengths[index] > left for index in range(len(lengths)) if index not in chosen)
