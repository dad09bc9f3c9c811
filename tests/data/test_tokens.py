"""Tokens: the ids of each text, what stands between texts, parts of long ones, and what is stored."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.bpe import train_bpe
from ftc.data.tokenizer import load_tokenizer
from ftc.data.tokens import TokenizedText, join, load, start_id, store, text_ids, text_parts


def tokenizer(bos=None, eos=None, prepends=False):
    encode = lambda text: ([bos] if prepends else []) + list(text.encode())  # noqa: E731
    return SimpleNamespace(bos_id=bos, eos_id=eos, encode=encode)


@pytest.mark.parametrize("special", [{"bos": 256, "eos": 257}, {"eos": 257}, {"bos": 256, "eos": 256}, {}])
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_the_stream_holds_every_document_between_its_borders(special, lengths):
    ids = np.arange(sum(lengths), dtype=np.int32)
    text = TokenizedText(ids, np.array(lengths), num_bytes=1)
    stream = text.stream(tokenizer(**special)).tolist()
    assert [i for i in stream if i < 256] == ids.tolist()
    if "eos" in special:
        both = special.get("bos") not in (None, special["eos"])
        assert stream.count(special["eos"]) == len(lengths) + (0 if both else 1)
        assert stream[-1] == special["eos"]
        assert stream[0] == (special["bos"] if both else special["eos"])


def test_a_prepended_start_token_is_left_out():
    plain, prepending = tokenizer(bos=256), tokenizer(bos=256, prepends=True)
    assert text_ids(plain, "ab") == text_ids(prepending, "ab") == [97, 98]
    assert start_id(plain) == 256 and start_id(tokenizer(eos=7)) == 7 and start_id(tokenizer()) is None


@given(text=st.text(st.sampled_from("ab \n\t.é日"), max_size=200), size=st.integers(2, 20))
def test_parts_of_a_text_are_the_text(text, size):
    parts = list(text_parts(text, size))
    assert "".join(parts) == text and all(0 < len(part) <= size for part in parts[:-1])


def test_parts_are_tokenized_like_the_whole(tmp_path):
    text = Path(json.__file__).read_text() + Path(pytest.__file__).read_text()
    bpe = load_tokenizer(train_bpe([text], 400, tmp_path))
    parts = list(text_parts(text, 500))
    assert len(parts) > 20
    assert [i for part in parts for i in text_ids(bpe, part)] == text_ids(bpe, text)


@given(lengths=st.lists(st.integers(0, 5), max_size=6))
def test_stored_tokens_come_back_and_only_for_the_same_input(tmp_path_factory, lengths):
    folder = tmp_path_factory.mktemp("stored") / "tokens"
    text = TokenizedText(np.arange(sum(lengths), dtype=np.int32), np.array(lengths, dtype=np.int64), num_bytes=7)
    store(folder, "print", {"a/train": text, "b/train": text})
    assert load(folder, "other") is None and load(folder / "absent") is None
    for again in load(folder, "print").values():
        np.testing.assert_array_equal(again.ids, text.ids)
        np.testing.assert_array_equal(again.lengths, text.lengths)
        assert again.num_bytes == 7
    both = join(list(load(folder).values()))
    assert both.ids.tolist() == text.ids.tolist() * 2 and both.num_bytes == 14
