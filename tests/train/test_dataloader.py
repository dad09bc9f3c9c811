"""The packed loader: the seed decides the order, a stop loses and repeats nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError

pytest.importorskip("torchtitan")
from ftc.train import device  # noqa: E402

device.install()
from ftc.train.dataloader import PackedDataLoader  # noqa: E402


def take(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def ids(batches):
    return [batch["input"].tolist() for batch, _ in batches]


sizes = {"batch": st.integers(1, 4), "seq_len": st.integers(1, 8), "seed": st.integers(0, 50)}


@settings(deadline=None, max_examples=40)
@given(stop=st.integers(0, 12), **sizes)
def test_a_resumed_loader_continues_with_the_batches_that_were_left(stop, batch, seq_len, seed):
    stream = np.arange(150, dtype=np.int32)
    whole = take(PackedDataLoader(stream, batch, seq_len, seed), stop + 6)
    first = PackedDataLoader(stream, batch, seq_len, seed)
    take(first, stop)
    second = PackedDataLoader(stream, batch, seq_len, seed)
    second.load_state_dict(first.state_dict())
    assert ids(take(second, 6)) == ids(whole[stop:])


@settings(deadline=None, max_examples=40)
@given(**sizes)
def test_an_epoch_gives_each_window_once_and_labels_are_shifted_inputs(batch, seq_len, seed):
    stream = np.arange(200, dtype=np.int32)
    loader = PackedDataLoader(stream, batch, seq_len, seed)
    seen, epoch = [], []
    for inputs, labels in loader:
        if loader.epoch > 0:
            break
        assert (labels == inputs["input"] + 1).all()
        epoch.append(inputs["input"])
    seen = [i for window in epoch for i in window.flatten().tolist()]
    assert len(set(seen)) == len(seen) >= len(stream) - (batch + 1) * seq_len - 1


@settings(deadline=None, max_examples=20)
@given(**sizes)
def test_two_ranks_together_read_what_one_reads(batch, seq_len, seed):
    stream = np.arange(300, dtype=np.int32)
    whole = ids(take(PackedDataLoader(stream, 2 * batch, seq_len, seed), 3))
    halves = [ids(take(PackedDataLoader(stream, batch, seq_len, seed, rank, 2), 3)) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*halves, strict=True)]


def test_epochs_and_seeds_differ():
    stream = np.arange(1000, dtype=np.int32)
    one, other = (PackedDataLoader(stream, 2, 8, seed) for seed in (0, 1))
    assert ids(take(one, 5)) != ids(take(other, 5))


def test_text_for_less_than_a_step_is_an_error():
    with pytest.raises(FtcError, match="has 20 tokens"):
        PackedDataLoader(np.arange(20), 4, 8, 0)


def test_labels_can_travel_with_the_inputs():
    (inputs, labels), *_ = take(PackedDataLoader(np.arange(100), 1, 4, 0, with_labels=True), 1)
    assert (inputs["labels"] == labels).all()
