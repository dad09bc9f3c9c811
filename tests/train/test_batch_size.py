"""Batches that ranks cannot share are named before anything is built."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.train.batch_size import check_batch


def training(local=4, whole=-1, seq_len=32):
    return SimpleNamespace(local_batch_size=local, global_batch_size=whole, seq_len=seq_len)


@given(local=st.integers(1, 9), degree=st.integers(1, 9), whole=st.integers(1, 200))
def test_a_batch_is_refused_exactly_where_ranks_cannot_share_it(local, degree, whole):
    check_batch(training(local), degree)
    try:
        check_batch(training(local, whole), degree)
        refused = ""
    except FtcError as error:
        refused = str(error)
    assert bool(refused) == bool(whole % (local * degree))
    if refused:
        assert f"global_batch_size = {whole} " in refused and f"multiple of {local * degree}," in refused
        check_batch(training(local, int(refused.rsplit(" ", 1)[1])), degree)  # what it proposes is valid


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"local": 0}, "training.local_batch_size = 0; use a whole number of 1 or more"),
        ({"seq_len": -3}, "training.seq_len = -3"),
        ({"whole": 0}, "training.global_batch_size = 0 cannot be shared out"),
    ],
)
def test_batches_and_windows_of_nothing_are_refused(values, words):
    with pytest.raises(FtcError, match=words):
        check_batch(training(**values), 1)
