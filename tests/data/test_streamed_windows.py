"""Streams: nothing lost, nothing repeated, shuffled, bounded in memory, and every way in which they end."""

from collections import Counter
from itertools import islice

import pytest
from helpers_data import Bytes, Corpus, stream, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.data import document_stream
from ftc.data.document_stream import Dealer, DocumentStream
from ftc.data.lanes import LANES, samples
from ftc.data.sources import BadRecord
from ftc.data.streamed_windows import StreamedWindows
from ftc.data.tokens import Framing
from ftc.data.windows import IGNORED
from ftc.errors import FtcError, FtcFailure


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(document_stream, "BLOCK_DOCUMENTS", 16)


def pairs_of(documents, tokenizer):
    framing = Framing.of_documents(tokenizer)
    framed = [[*framing.before, *document.encode(), *framing.after] for document in documents]
    return Counter(pair for ids in framed for pair in zip(ids, ids[1:], strict=False))


@settings(max_examples=15)
@given(seed=st.integers(0, 9), count=st.integers(LANES, 150), longest=st.integers(1, 60), size=st.integers(2, 20))
def test_each_epoch_of_whole_documents_is_given_once(small_blocks_for_all, seed, count, longest, size):
    tokenizer = Bytes(256, 257)
    documents = texts(count, longest, seed)
    source = StreamedWindows(stream(documents, seed), tokenizer, size, True, True)
    expected, seen = pairs_of(documents, tokenizer), Counter()
    for sample in samples([source], [1.0], size, 0, 1):
        used = sample.window.labels != IGNORED
        seen.update(zip(sample.window.inputs[used].tolist(), sample.window.labels[used].tolist(), strict=True))
        if seen.total() >= 6 * expected.total() + LANES * size * 8:
            break
    for pair, times in expected.items():  # lanes run apart by what they hold back: each epoch is given once all the same
        assert 4 * times <= seen[pair]
    assert set(seen) == set(expected)


@pytest.fixture(scope="module")
def small_blocks_for_all():
    before = document_stream.BLOCK_DOCUMENTS
    document_stream.BLOCK_DOCUMENTS = 16
    yield
    document_stream.BLOCK_DOCUMENTS = before


@settings(max_examples=15)
@given(seed=st.integers(0, 9), count=st.integers(LANES, 200), longest=st.integers(1, 40))
def test_blocks_deal_out_every_document_once_an_epoch_and_can_begin_anywhere(small_blocks_for_all, seed, count, longest):
    documents = texts(count, longest, seed)
    blocks = list(islice(stream(documents, seed).blocks(), 40))
    dealt = [each for block in blocks for each in block]
    assert [each.number for each in dealt] == list(range(len(dealt)))
    for epoch in range(len(dealt) // count):
        assert Counter(each.text for each in dealt[epoch * count : (epoch + 1) * count]) == Counter(documents)
    given_bytes = Counter()
    for each in dealt:
        given_bytes[each.lane] += len(each.text)
    assert max(given_bytes.values()) - min(given_bytes[lane] for lane in range(LANES)) <= longest
    start = seed + 1
    assert list(islice(stream(documents, seed).blocks(blocks[start][0].block), 3)) == blocks[start : start + 3]


@settings(max_examples=15)
@given(seed=st.integers(0, 9), longest=st.integers(1, 30), size=st.integers(2, 12))
def test_a_lane_reads_one_stream_whose_windows_touch(seed, longest, size):
    documents = texts(LANES, longest, seed)
    source = StreamedWindows(stream(documents), Bytes(), size, False, False)
    cursor = source.cursors([3], {})[3]
    windows = [cursor.next() for _ in range(30)]
    for one, next_one in zip(windows, windows[1:], strict=False):
        assert one.labels[-1] == next_one.inputs[0]
    ids = [i for window in windows for i in window.inputs.tolist()]
    dealer = Dealer(stream(documents), [3], cursor.block.__class__())
    expected = []
    while len(expected) < len(ids):
        expected += [257, *dealer.next(3).text.encode()]
    assert ids == expected[: len(ids)]


def test_what_waits_in_memory_is_bounded(small_blocks):
    generator = (texts(1, 400, seed)[0] for seed in range(3000))
    source = StreamedWindows(stream(list(generator)), Bytes(), 16, True, True)
    most = 0
    for sample in islice(samples([source], [1.0], 16, 0, 1), 12_000):
        if sample.index % 500 == 0:
            waiting = sum(len(each.text) for lane in source.dealer._waiting.values() for each in lane)
            most = max(most, waiting)
    assert most < LANES * 3 * 400  # of 600,000 characters, hardly more than the longest document a lane


def test_a_long_document_is_tokenized_part_by_part(small_blocks):
    lengths = []

    class Counting(Bytes):
        def encode(self, text):
            lengths.append(len(text))
            return super().encode(text)

    documents = ["word " * 100_000] + texts(80, 20)
    source = StreamedWindows(stream(documents), Counting(), 64, True, True)
    for sample in islice(samples([source], [1.0], 64, 0, 1), 2000):
        assert sample.window.num_tokens > 0
    assert max(lengths) <= 1 << 16


def test_a_stream_ends_or_is_wrong_in_words():
    def windows(documents, **options):
        source = StreamedWindows(stream(documents, **options), Bytes(), 8, False, False)
        return list(islice(samples([source], [1.0], 8, 0, 1), 2000))

    with pytest.raises(FtcError, match="'stream' holds 5 documents, and a stream needs at least 64"):
        windows(texts(5, 9))
    with pytest.raises(FtcFailure, match="has been read once, its max_epochs"):
        windows(texts(100, 9), max_epochs=1)
    bad = [*texts(70, 9), BadRecord("file:7: broken")]
    with pytest.raises(FtcError, match="file:7: broken"):
        windows(bad)


def test_bad_records_that_are_left_out_are_logged(caplog):
    good, bad = texts(70, 9), [BadRecord(f"file:{number}: broken") for number in range(9)]
    skipping = StreamedWindows(stream(good + bad, skip_bad=True), Bytes(), 8, True, False)
    plain = StreamedWindows(DocumentStream(Corpus(good), "stream", 0), Bytes(), 8, True, False)
    seen, expected = (
        {tuple(sample.window.inputs.tolist()) for sample in islice(samples([source], [1.0], 8, 0, 1), 400)}
        for source in (skipping, plain)
    )
    assert {i for ids in seen for i in ids} == {i for ids in expected for i in ids}
    assert len(caplog.messages) == 5 and "further ones are not named" in caplog.messages[-1]
