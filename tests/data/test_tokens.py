"""Preparing a run's data: ids of each document, the stream between them, and reuse of what the folder holds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.tokens import TokenizedText, prepare, start_id, text_ids
from ftc.errors import FtcError


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


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"document {number} says hello hello hello\n" * 5)
    return folder


def test_prepare_splits_tokenizes_and_is_reused(data, tmp_path):
    run = tmp_path / "run"
    first = prepare(run, data=str(data), vocab_size=280, validation_fraction=0.3)
    key = (run / "tokens" / "key.json").stat().st_mtime_ns
    again = prepare(run, data=str(data), vocab_size=280, validation_fraction=0.3)
    assert (run / "tokens" / "key.json").stat().st_mtime_ns == key
    np.testing.assert_array_equal(first.train.ids, again.train.ids)
    total = sum(len(file.read_bytes()) for file in data.iterdir())
    assert first.train.num_bytes + first.validation.num_bytes == total and first.validation.num_bytes
    for part in (first.train, first.validation):
        texts = [first.tokenizer.decode(ids.tolist()) for ids in part.documents()]
        assert sum(len(text.encode()) for text in texts) == part.num_bytes
    assert start_id(first.tokenizer) is not None


def test_other_text_or_vocabulary_is_tokenized_anew(data, tmp_path):
    run = tmp_path / "run"
    keys = set()
    for size, extra in ((280, ""), (290, ""), (290, "more")):
        if extra:
            (data / "more.txt").write_text(extra)
        prepare(run, data=str(data), vocab_size=size)
        keys.add(json.loads((run / "tokens" / "key.json").read_text())["fingerprint"])
    assert len(keys) == 3


def test_a_given_tokenizer_is_copied_and_a_missing_one_is_an_error(data, tmp_path):
    first = prepare(tmp_path / "a", data=str(data), vocab_size=280)
    second = prepare(tmp_path / "b", data=str(data), tokenizer=str(first.tokenizer_folder))
    assert (second.tokenizer_folder / "tokenizer.json").read_bytes() == (
        first.tokenizer_folder / "tokenizer.json"
    ).read_bytes()
    np.testing.assert_array_equal(first.train.ids, second.train.ids)
    with pytest.raises(FtcError, match="no tokenizer at"):
        prepare(tmp_path / "c", data=str(data), tokenizer=str(tmp_path / "absent"))
