"""Windows of stored text: every token once an epoch, labels one further, borders where documents begin."""

import numpy as np
import pytest
from helpers_data import Bytes, stored, texts
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.stored_windows import DocumentWindows, StreamWindows
from ftc.data.tokens import Framing
from ftc.data.windows import IGNORED
from ftc.errors import FtcError, FtcFailure

tokenizers_st = st.sampled_from([Bytes(), Bytes(256, 257), Bytes(256, 256), Bytes(256, None), Bytes(None, None)])
common = {"seed": st.integers(0, 20), "seq_len": st.integers(2, 12), "tokenizer": tokenizers_st}


@given(count=st.integers(1, 12), longest=st.integers(1, 30), **common)
def test_an_epoch_of_the_stream_gives_each_of_its_tokens_once(count, longest, seed, seq_len, tokenizer):
    text = stored(texts(count, longest, seed) + ["x" * 2 * seq_len], tokenizer)
    whole = text.stream(tokenizer)
    windows = StreamWindows(text, tokenizer, seq_len, False, seed, "t")
    assert windows.num_tokens == len(whole)
    for epoch in (0, 3):
        offset = windows._generator(epoch)[0]
        for index in range(windows.num_windows(epoch)):
            window, start = windows.cut(epoch, index), offset + index * seq_len
            np.testing.assert_array_equal(window.inputs, whole[start : start + seq_len])
            np.testing.assert_array_equal(window.labels, whole[start + 1 : start + 1 + seq_len])
        assert offset + (windows.num_windows(epoch) + 1) * seq_len + 1 > len(whole)
    numbers = [windows._order(epoch) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(len(order))) for order in numbers)


@given(count=st.integers(1, 12), longest=st.integers(1, 30), **common)
def test_positions_in_a_stream_restart_with_each_document_and_no_label_crosses(count, longest, seed, seq_len, tokenizer):
    documents = texts(count, longest, seed) + ["x" * 2 * seq_len]
    windows = StreamWindows(stored(documents, tokenizer), tokenizer, seq_len, True, seed, "t")
    framing = Framing.of_stream(tokenizer)
    inside, owner = [], []
    for number, document in enumerate(documents):
        size = len(framing.before) + len(document) + len(framing.after)
        inside += range(size)
        owner += [number] * size
    for index in range(windows.num_windows(0)):
        window, start = windows.cut(0, index), windows._generator(0)[0] + index * seq_len
        for t in range(seq_len):
            at = start + t
            begins = max(start, at - inside[at])
            assert window.positions[t] == at - begins
            crosses = at + 1 >= len(owner) or owner[at + 1] != owner[at]
            if crosses and tokenizer.eos_id is not None and tokenizer.bos_id in (None, tokenizer.eos_id):
                assert window.labels[t] == tokenizer.eos_id
            else:
                assert (window.labels[t] == IGNORED) == crosses


@given(count=st.integers(1, 12), longest=st.integers(2, 30), **common)
def test_whole_documents_are_predicted_from_their_first_token_to_their_end(count, longest, seed, seq_len, tokenizer):
    documents = [text + "z" for text in texts(count, longest, seed)]
    windows = DocumentWindows(stored(documents, tokenizer), tokenizer, seq_len, True, seed, "t")
    framing = Framing.of_documents(tokenizer)
    pairs = []
    for index in range(windows.num_windows(0)):
        window = windows.cut(0, index)
        assert (window.labels[window.num_tokens :] == IGNORED).all()
        assert (window.labels[: window.num_tokens] != IGNORED).all()
        starts = [t for t in range(seq_len) if window.positions[t] == 0]
        assert window.num_tokens in starts or window.num_tokens == seq_len
        pairs += zip(window.inputs[: window.num_tokens], window.labels[: window.num_tokens], strict=True)
    expected = []
    for document in documents:
        ids = [*framing.before, *document.encode(), *framing.after]
        expected += zip(ids, ids[1:], strict=False)
    assert sorted(pairs) == sorted(expected)


def test_too_little_text_and_the_last_epoch_are_errors():
    with pytest.raises(FtcError, match="'t' has 21 tokens; windows of 16 need 32"):
        StreamWindows(stored(["x" * 19]), Bytes(), 16, False, 0, "t")
    with pytest.raises(FtcError, match="no document of two tokens"):
        DocumentWindows(stored(["a", "b"], Bytes(None, None)), Bytes(None, None), 16, False, 0, "t")
    windows = StreamWindows(stored(["x" * 100]), Bytes(), 16, False, 0, "t", max_epochs=2)
    total = windows.num_windows(0) + windows.num_windows(1)
    windows.window(total - 1)
    with pytest.raises(FtcFailure, match="'t' has been read 2 times, its max_epochs"):
        windows.window(total)
