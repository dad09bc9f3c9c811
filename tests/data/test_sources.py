"""Reading documents: what is read, how it is split, and what each bad input says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.data import sources
from ftc.data.corpus import documents, stdlib_files
from ftc.data.sources import (
    BadRecord,
    Document,
    good_documents,
    local_files,
    read_documents,
    read_texts,
    split_documents,
)
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
        ("pair.jsonl", b'{"text": "a\\ud800b"}\n', r"pair\.jsonl:1: character '\\ud800' is half of a pair"),
        ("deep.jsonl", b"[" * 200_000 + b"\n", r"deep\.jsonl:1: not a JSON record \(nested too deeply\)"),
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
    train, validation = split_documents(documents("stdlib"))
    names = [document.name for document in train + validation]
    assert len(set(names)) == len(names) > 200
    assert not any(name.startswith(("test/", "idlelib/", "site-packages/")) for name in names)
    size_train, size_validation = (sum(len(d.text) for d in part) for part in (train, validation))
    assert size_train > 4_000_000
    assert 0.02 < size_validation / size_train < 0.3


def test_a_python_without_source_says_so(tmp_path):
    with pytest.raises(FtcError, match="without its source"):
        stdlib_files(tmp_path)


def test_the_key_of_the_text_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    assert [record.text for record, _ in local_files(tmp_path, "body").read()] == ["yes"]
    bad = [record for record, _ in local_files(tmp_path, "boddy").read()]
    assert "no text or messages in 'boddy'" in bad[0].message


@pytest.fixture
def short_lines(monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 64)


def test_enormous_lines_are_bad_records_and_the_next_one_is_read(tmp_path, short_lines):
    line = json.dumps({"text": "x" * 100})
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + line + '\n{"text": "two"}\n' + line)
    records = [record for record, _ in local_files(tmp_path / "a.jsonl").read()]
    assert [type(record) for record in records] == [Document, BadRecord, Document, BadRecord]
    assert "a.jsonl:2: the line is longer than" in records[1].message and "a.jsonl:4:" in records[3].message
    skipped = []
    assert [d.text for d in good_documents(records, "a", skipped)] == ["one", "two"] and len(skipped) == 2
    with pytest.raises(FtcError, match="a.jsonl:2"):
        list(good_documents(records, "a"))
    with pytest.raises(FtcError, match=r"holds no text.*\(1 bad records were left out, the first: .*a.jsonl:2"):
        list(good_documents(records[1:2], "a", []))


def test_long_text_files_are_read_in_parts_that_end_with_a_line(tmp_path, short_lines):
    text = "".join(f"line {number} of the text\n" for number in range(30))
    (tmp_path / "a.txt").write_text(text + "y" * 200 + "\nend")
    parts = [record for record, _ in local_files(tmp_path / "a.txt").read()]
    bad = [part for part in parts if isinstance(part, BadRecord)]
    good = [part.text for part in parts if isinstance(part, Document)]
    assert "".join(good) == text + "end" and all(part.endswith("\n") for part in good[:-1])
    assert len(bad) == 1 and "a.txt:31: the line is longer" in bad[0].message


@pytest.fixture(params=["jsonl", "txt", "parquet"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 40)
    for number in range(3):
        rows = [{"text": f"text {number} {row}"} for row in range(5)]
        path = tmp_path / f"{number}.{request.param}"
        if request.param == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            import pyarrow.parquet as parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        elif request.param == "jsonl":
            path.write_text("bad\n".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text("\n".join(row["text"] for row in rows))
    return tmp_path


def test_reading_goes_on_from_any_place(folder):
    for read in (
        lambda start: local_files(folder).read(start),
        lambda start: local_files(folder).shuffled(1, 2, start),
    ):
        whole = list(read(None))
        for count, (_, place) in enumerate(whole, 1):
            assert list(read(json.loads(json.dumps(place)))) == whole[count:]
    orders = {tuple(r.text for r, _ in local_files(folder).shuffled(0, epoch) if isinstance(r, Document)) for epoch in range(9)}
    assert len(orders) > 2 and len({tuple(sorted(order)) for order in orders}) == 1
