"""The trained tokenizer: any text there and back, deterministic, honest about a vocabulary that is too small."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.bpe import END_OF_TEXT, train_bpe
from ftc.errors import FtcError

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["def add(a, b):\n    return a + b\n" * 20, "the cat sat on the mat\n" * 20]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = train_bpe(TEXTS, 300, tmp_path_factory.mktemp("bpe"))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=st.text(max_size=200))
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_shorten_the_training_text(tokenizer):
    assert len(tokenizer.encode(TEXTS[0]).ids) < 0.5 * len(TEXTS[0])
    assert tokenizer.token_to_id(END_OF_TEXT) is not None


def test_the_same_text_gives_the_same_file(tmp_path):
    first, second = (train_bpe(TEXTS, 300, tmp_path / name) / "tokenizer.json" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_too_small_a_vocabulary_and_empty_text_are_errors(tmp_path):
    with pytest.raises(FtcError, match="at least 257"):
        train_bpe(TEXTS, 100, tmp_path)
    with pytest.raises(FtcError, match="no text"):
        train_bpe([""], 300, tmp_path)
    assert not list(tmp_path.iterdir())
