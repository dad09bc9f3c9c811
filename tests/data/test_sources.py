"""Reading documents: what is read, how it is split, and what each bad input says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data.corpus import load_split, stdlib_documents
from ftc.data.sources import Document, read_documents, read_texts, split_documents
from ftc.errors import FtcError


def test_a_folder_yields_every_readable_file_in_name_order(tmp_path):
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "one", "source": "book"}\n\n{"text": "two"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("secret")
    found = [(document.text, document.name) for document in read_documents(tmp_path)]
    assert found == [("x = 1\n", "a.py"), ("beta", "b.txt"), ("one", "deep/c.jsonl#book"), ("two", "deep/c.jsonl")]


def test_messages_become_one_text_with_their_roles(tmp_path):
    record = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    assert read_texts(tmp_path / "chat.jsonl") == ["user: 2+2?\nassistant: 4"]


def test_parquet_reads_like_jsonl(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    records = [{"text": "one", "source": "s"}, {"text": "twö", "source": ""}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "data.parquet")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_texts(tmp_path / "data.parquet") == read_texts(tmp_path / "data.jsonl") == ["one", "twö"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"fine\nnot \xff utf-8", r"bad\.txt:2: byte 0xff"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not a JSON record"),
        ("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"bytes\.jsonl:2: byte 0xff"),
        ("keys.jsonl", b'{"body": "a"}\n', r"keys\.jsonl:1: the record has the keys \['body'\]"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl:1: the record is a list"),
        ("turn.jsonl", b'{"messages": [{"role": "user"}]}\n', r"turn\.jsonl:1: a message needs `role` and `content`"),
        ("empty.txt", b"", "holds no text"),
        ("empty.jsonl", b"\n\n", "holds no text"),
        ("data.csv", b"a,b", r"suffix '\.csv'"),
        ("bad.parquet", b"PAR1 not really", "not a readable parquet file"),
    ],
)
def test_bad_input_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FtcError, match=message):
        read_texts(tmp_path / name)


def test_a_missing_path_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(FtcError, match="no data at"):
        read_texts(tmp_path / "absent")
    with pytest.raises(FtcError, match="holds no"):
        read_texts(tmp_path)


@given(
    names=st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=30),
    fraction=st.floats(0.01, 0.9),
)
def test_no_name_stands_on_both_sides_and_nothing_is_lost(names, fraction):
    documents = [Document(f"text {index}", name) for index, name in enumerate(names)]
    train, validation = split_documents(documents, fraction)
    assert not {document.name for document in train} & {document.name for document in validation}
    assert sorted(d.text for d in train + validation) == sorted(d.text for d in documents)
    assert train
    assert bool(validation) == (len(set(names)) > 1)


@given(names=st.sets(st.text("abcdefgh", min_size=2, max_size=6), min_size=40, max_size=60))
def test_adding_files_moves_no_other_file(names):
    names = sorted(names)
    some, all_ = ([Document("x", name) for name in part] for part in (names[:30], names))
    before = {document.name for document in split_documents(some, 0.3)[1]}
    after = {document.name for document in split_documents(all_, 0.3)[1]}
    assert before - after == set() or len(before) == 1  # a lone fallback pick may change


def test_a_bad_fraction_is_refused():
    with pytest.raises(FtcError, match=r"fraction is 1\.5"):
        split_documents([Document("a", "a")], 1.5)


def test_the_standard_library_is_a_corpus_with_both_parts():
    train, validation = load_split("stdlib")
    names = [document.name for document in train + validation]
    assert len(set(names)) == len(names) > 200
    assert not any(name.startswith(("test/", "idlelib/", "site-packages/")) for name in names)
    size_train, size_validation = (sum(len(d.text) for d in part) for part in (train, validation))
    assert size_train > 4_000_000
    assert 0.02 < size_validation / size_train < 0.3


def test_a_python_without_source_says_so(tmp_path):
    with pytest.raises(FtcError, match="without its source"):
        list(stdlib_documents(tmp_path))
