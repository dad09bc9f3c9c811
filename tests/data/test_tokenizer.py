import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.llama2c_tokenizer import Llama2cTokenizer
from ftc.data.tokenizer import load_tokenizer
from ftc.errors import FtcError

SPECIAL = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256))]


@st.composite
def tokenizers(draw):
    """Special tokens, single characters, and random merges with few distinct scores, so that ties are common."""
    characters = list(" abcé")
    pieces = characters[: draw(st.integers(1, len(characters)))]
    for _ in range(draw(st.integers(0, 12))):
        pieces.append(draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces)))
    pieces = list(dict.fromkeys(pieces))
    scores = [0.0] * len(SPECIAL) + [draw(st.integers(-4, 0)) + 0.0 for _ in pieces]
    return Llama2cTokenizer(SPECIAL + [piece.encode() for piece in pieces], scores)


def merged_by_rescanning(tokenizer, text):
    """The definition: again and again the best-scored pair of neighbours, leftmost first."""
    pieces = [b" "] if b" " in tokenizer.pieces else []
    for character in text:
        whole = character.encode()
        pieces += [whole] if whole in tokenizer.pieces else [f"<0x{byte:02X}>".encode() for byte in whole]
    tokens = [tokenizer.pieces.index(piece) for piece in pieces]
    while True:
        best = None
        for i in range(len(tokens) - 1):
            joint = tokenizer.pieces[tokens[i]] + tokenizer.pieces[tokens[i + 1]]
            if joint in tokenizer.pieces:
                merged = tokenizer.pieces.index(joint)
                if best is None or tokenizer.scores[merged] > tokenizer.scores[best[1]]:
                    best = (i, merged)
        if best is None:
            return tokens
        tokens[best[0] : best[0] + 2] = [best[1]]


@given(tokenizers(), st.text(alphabet=" abcéz\n", min_size=1, max_size=30))
def test_encoding_is_greedy_merging(tokenizer, text):
    assert tokenizer.encode(text) == merged_by_rescanning(tokenizer, text)


@given(
    tokenizers(),
    st.text(max_size=20).filter(lambda text: text.encode(errors="ignore") == text.encode(errors="replace")),
)
def test_any_text_comes_back(tokenizer, text):
    if b" " not in tokenizer.pieces:
        text = text.lstrip(" ")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_pieces_that_reach_across_words_are_found():
    tokenizer = Llama2cTokenizer([*SPECIAL, b" ", b"a", b"a ", b"a a"], [0.0] * len(SPECIAL) + [0.0, 0.0, -1.0, -2.0])
    assert tokenizer.encode("a a") == merged_by_rescanning(tokenizer, "a a") == [259, 262]


def write_bin(path, pieces, scores):
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in zip(pieces, scores, strict=True))
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + body)


@given(tokenizers())
def test_files_give_the_tokenizer_back(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin"
    write_bin(path, tokenizer.pieces, tokenizer.scores)
    for place in (path, path.parent):
        again = load_tokenizer(place)
        assert (again.pieces, again.scores) == (tokenizer.pieces, tokenizer.scores)
        assert again.encode("abc a") == tokenizer.encode("abc a")


def test_the_real_vocabulary_agrees_with_rescanning(shared_data):
    tokenizer = load_tokenizer(shared_data / "stories260k")
    for text in ('Once upon a time, there was a little girl.\n\n"Hi!"  she said — 3 × ü', "  two  spaces ", "\t"):
        assert tokenizer.encode(text) == merged_by_rescanning(tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)


@pytest.fixture
def json_folder(tmp_path):
    """A byte-level tokenizer.json over a little text, with one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<|odd|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer_json_behind_the_same_interface(json_folder):
    for place in (json_folder, json_folder / "tokenizer.json"):
        tokenizer = load_tokenizer(place)
        text = " the cat — ünïcode\n on the mat, longer than the file's own truncation"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < tokenizer.vocab_size
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
        assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@pytest.mark.parametrize(
    ("file", "settings", "ids"),
    [
        ("tokenizer_config.json", {"bos_token": "<|odd|>", "eos_token": {"content": "<s>"}}, (2, 0)),
        ("tokenizer_config.json", {"bos_token": None}, (None, 1)),
        ("special_tokens_map.json", {"eos_token": "<|odd|>"}, (0, 2)),
        ("config.json", {"bos_token_id": 7, "eos_token_id": [8, 9]}, (7, 8)),
    ],
)
def test_special_tokens_come_from_the_files_beside_it(json_folder, file, settings, ids):
    (json_folder / file).write_text(json.dumps(settings))
    tokenizer = load_tokenizer(json_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.bin", b"", "no complete llama2.c tokenizer"),
        ("tokenizer.bin", struct.pack("<ifi", 3, 0.0, 2) + b"ab", "1 tokens"),
        ("tokenizer.bin", struct.pack("<ifi", 9, 0.0, 9) + b"ab", "claims 9 bytes"),
        ("tokenizer.bin", struct.pack("<ifi", 3, 0.0, -2) + b"ab", "claims -2 bytes"),
        ("tokenizer.json", b"{}", "not a valid tokenizer.json"),
        ("readme.txt", b"", "holds no tokenizer.json"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FtcError, match=words):
        load_tokenizer(tmp_path)


def test_missing_files_and_ids_out_of_range_are_named(json_folder):
    for name in ("nowhere.bin", "nowhere.json"):
        with pytest.raises(FtcError, match=name):
            load_tokenizer(json_folder / name)
    with pytest.raises(FtcError, match="token 600"):
        Llama2cTokenizer(SPECIAL, [0.0] * len(SPECIAL)).decode([600])
