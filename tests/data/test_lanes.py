"""The mixture: exact shares in every lane and in all of them, and who reads which lane."""

import pytest
from helpers_data import Bytes, stored, stream, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.data.lanes import LANES, first_debts, lanes_of, samples
from ftc.data.stored_windows import DocumentWindows, StreamWindows
from ftc.data.streamed_windows import StreamedWindows

SIZE = 8
weights_st = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5)


class Windows:
    """A source whose windows hold fewer and fewer tokens, and then many again."""

    def __init__(self, least):
        self.least = least

    def cursors(self, lanes, states):
        return {lane: Cursor(self.least, lane) for lane in lanes}


class Cursor:
    def __init__(self, least, lane):
        self.least, self.count = least, lane

    def next(self):
        self.count += 1
        return type("Window", (), {"num_tokens": max(self.least, SIZE - self.count % SIZE)})

    def state(self):
        return self.count


def given_tokens(sources, shares, count):
    tokens, sequence = [0] * len(sources), samples(sources, shares, SIZE, 0, 1)
    for _ in range(count):
        sample = next(sequence)
        tokens[sample.source] += sample.window.num_tokens
    return tokens


@settings(max_examples=20)
@given(weights=weights_st, data=st.data())
def test_shares_of_the_tokens_are_those_of_the_weights(weights, data):
    shares = [weight / sum(weights) for weight in weights]
    sources = [Windows(data.draw(st.integers(1, SIZE))) for _ in shares]
    tokens = given_tokens(sources, shares, 9600)  # as many samples as the quickstart sees
    for share, count in zip(shares, tokens, strict=True):
        assert abs(count / sum(tokens) - share) < 0.005


@given(weights=weights_st)
def test_windows_of_one_size_are_given_out_evenly_at_any_moment(weights):
    shares = [weight / sum(weights) for weight in weights]
    counts, sequence = [0] * len(shares), samples([Windows(SIZE)] * len(shares), shares, SIZE, 0, 1)
    for number in range(1, 4 * LANES + 1):
        counts[next(sequence).source] += 1
        assert number > LANES or all(abs(c - number * s) < len(shares) for c, s in zip(counts, shares, strict=True))
    assert all(abs(c - number * s) <= LANES / 4 for c, s in zip(counts, shares, strict=True))


def test_lanes_begin_with_different_sources():
    debts = first_debts([0.5, 0.3, 0.2])
    first = [max(range(3), key=lambda s, d=debt: d[s] + (0.5, 0.3, 0.2)[s]) for debt in debts]
    assert [first.count(source) for source in range(3)] == [32, 19, 13]


@given(world_size=st.integers(1, 200), rank=st.data())
def test_a_process_has_the_lanes_of_its_samples(world_size, rank):
    rank = rank.draw(st.integers(0, world_size - 1))
    own = {number % LANES for number in range(rank, rank + world_size * LANES, world_size)}
    assert set(lanes_of(rank, world_size)) >= own
    assert len(lanes_of(rank, world_size)) == max(LANES // world_size, 1) or LANES % world_size


KINDS = {
    "stored stream": lambda documents: StreamWindows(stored(documents), Bytes(), SIZE, False, 0, "t"),
    "stored documents": lambda documents: DocumentWindows(stored(documents), Bytes(), SIZE, True, 0, "t"),
    "streamed stream": lambda documents: StreamedWindows(stream(documents), Bytes(), SIZE, False, False),
    "streamed documents": lambda documents: StreamedWindows(stream(documents), Bytes(), SIZE, True, True),
}


def content(sample):
    window = sample.window
    return sample.index, window.inputs.tolist(), window.labels.tolist(), None if window.positions is None else window.positions.tolist()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(world_size=st.sampled_from([1, 2, 3, 4, 6, 8, 64, 96]), stop=st.integers(0, 150), again=st.sampled_from([1, 2, 3, 5, 32]))
def test_any_number_of_processes_reads_one_sequence_and_any_other_goes_on(kind, world_size, stop, again):
    documents = texts(90, 30)
    make = [KINDS[kind], KINDS["stored stream"]]
    shares, total = [0.7, 0.3], stop + 120
    sequence = samples([each(documents) for each in make], shares, SIZE, 0, 1)
    whole = [content(next(sequence)) for _ in range(total)]

    def taken(ranks, first, last, states):
        found, left = [], {}
        for rank in range(ranks):
            mine = {lane: state for lane, state in states.items() if lane in lanes_of(rank, ranks)}
            left |= mine
            for sample in samples([each(documents) for each in make], shares, SIZE, rank, ranks, first, mine):
                if sample.index >= last:
                    break
                left[sample.lane] = sample.state
                found += [content(sample)] if sample.window is not None else []
        return sorted(found), left

    before, states = taken(world_size, 0, stop, {})
    after, _ = taken(again, stop, total, states)
    assert before + after == whole
