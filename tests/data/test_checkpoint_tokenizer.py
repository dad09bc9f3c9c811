"""The tokenizer of a checkpoint: found beside it, and another one refused with the first difference."""

import json

import pytest
from helpers_data import Bytes

from ftc.data.bpe import train_bpe
from ftc.data.checkpoint_tokenizer import check_vocabulary, checkpoint_tokenizer, first_difference
from ftc.data.tokenizer import load_tokenizer
from ftc.errors import FtcError

TEXT = ["the cat sat on the mat, and the dog sat on the log\n" * 20]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    train_bpe(TEXT, 290, folder)
    (folder / "config.json").write_text("{}")
    return folder


def changed(checkpoint, folder, change):
    folder.mkdir()
    values = json.loads((checkpoint / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_bytes((checkpoint / "tokenizer_config.json").read_bytes())
    return folder


def test_the_checkpoints_own_tokenizer_is_found_and_an_equal_one_accepted(checkpoint, tmp_path):
    assert checkpoint_tokenizer(str(checkpoint), "") == str(checkpoint / "tokenizer.json")
    same = changed(checkpoint, tmp_path / "same", lambda values: None)
    assert checkpoint_tokenizer(str(checkpoint), str(same)) == str(same)


def test_another_tokenizer_is_refused_with_what_differs(checkpoint, tmp_path):
    def swap(values):
        vocabulary = values["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    def lower(values):
        values["normalizer"] = {"type": "Lowercase"}

    train_bpe(TEXT, 265, tmp_path / "smaller")
    size = load_tokenizer(checkpoint).vocab_size
    cases = {
        str(changed(checkpoint, tmp_path / "swapped", swap)): "'a' is token .* in it, and token",
        str(changed(checkpoint, tmp_path / "lower", lower)): "gives other ids for the same text",
        str(tmp_path / "smaller"): f"it has 265 ids, the checkpoint's has {size}",
    }
    for path, words in cases.items():
        with pytest.raises(FtcError, match=f"is not that of the checkpoint.*{words}"):
            checkpoint_tokenizer(str(checkpoint), path)
    own = load_tokenizer(checkpoint)
    assert "its eos_id is None" in first_difference(Bytes(None, None), Bytes(None, 257))
    assert first_difference(own, own) == ""


def test_a_checkpoint_without_a_tokenizer_needs_one_that_fits(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(FtcError, match="no tokenizer lies in or beside the checkpoint .*; name its own"):
        checkpoint_tokenizer(str(tmp_path / "bare"), "")
    assert checkpoint_tokenizer(str(tmp_path / "bare"), "mine") == "mine"
    check_vocabulary(Bytes(), 258, True)
    check_vocabulary(Bytes(), 270, True)
    check_vocabulary(Bytes(), 1000, False)
    with pytest.raises(FtcError, match="has 258 ids, but the model knows 257"):
        check_vocabulary(Bytes(), 257, False)
    with pytest.raises(FtcError, match="only 258 ids of the 1000"):
        check_vocabulary(Bytes(), 1000, True)
