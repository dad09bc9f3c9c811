"""Running ahead: same items, bounded, errors in their place, and an end."""

import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.prefetch import Prefetch


@given(count=st.integers(0, 30), depth=st.integers(1, 5))
def test_items_come_in_order_and_then_the_end(count, depth):
    assert list(Prefetch(iter(range(count)), depth)) == list(range(count))


def test_no_more_than_the_depth_is_made_ahead():
    made = []

    def items():
        for number in itertools.count():
            made.append(number)
            yield number

    ahead = Prefetch(items(), 3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.2)
    assert len(made) <= 5 + 3 + 1
    ahead.close()
    assert not ahead._thread.is_alive()


def test_an_error_is_raised_after_the_items_before_it_and_again():
    def items():
        yield 1
        raise ValueError("broken")

    ahead = Prefetch(items(), 2)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(ahead)


def test_a_lost_iterator_ends_its_thread():
    ahead = Prefetch(itertools.count(), 2)
    next(ahead)
    thread = ahead._thread
    del ahead
    thread.join(5)
    assert not thread.is_alive() and threading.active_count() < 20
