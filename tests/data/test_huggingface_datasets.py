"""Hugging Face datasets made on the spot: held and streamed, from files and from save_to_disk, resumed at any record."""

import json

import pytest

from ftc.data import huggingface
from ftc.data.corpus import open_corpus
from ftc.data.prepare import prepare
from ftc.data.source_table import Source
from ftc.data.sources import BadRecord
from ftc.errors import FtcError

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    datasets.disable_progress_bars()
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{form: what `hf:` is given} of 120 rows in three shards, and a split `validation` of four."""
    base = tmp_path_factory.mktemp("hf")
    rows = [{"text": f"row {number} of the set\n", "source": f"s{number % 3}", "extra": [number]} for number in range(120)]
    files = base / "files"
    files.mkdir()
    for shard in range(3):
        lines = [json.dumps(row) for row in rows[shard * 40 : shard * 40 + 40]]
        (files / f"train-{shard}.jsonl").write_text("\n".join(lines))
    (files / "validation-0.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:4]))
    parts = {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows[:4])}
    datasets.DatasetDict(parts).save_to_disk(base / "dict")
    parts["train"].save_to_disk(base / "one", num_shards=2)
    return {form: f"hf:{base / form}" for form in ("files", "dict", "one")}


@pytest.mark.parametrize("form", ["files", "dict", "one"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_from_any_place(folders, form, streaming, monkeypatch):
    monkeypatch.setattr(huggingface, "_CHUNK", 7)
    corpus = open_corpus(folders[form], streaming=streaming)
    whole = list(corpus.read())
    assert [record.text for record, _ in whole] == [f"row {number} of the set\n" for number in range(120)]
    assert whole[4][0].name.endswith("#s1")
    for stop in (1, 6, 7, 8, 39, 40, 41, 77, 120):
        place = json.loads(json.dumps(whole[stop - 1][1]))
        assert [record for record, _ in corpus.read(place)] == [record for record, _ in whole[stop:]]
    assert corpus.identity() == open_corpus(folders[form], streaming=streaming).identity()


def test_columns_and_splits_are_chosen_and_wrong_ones_named(folders):
    assert len(list(open_corpus(folders["files"], split="validation").read())) == 4
    assert [r.text for r, _ in open_corpus(folders["dict"], column="source").read()][:2] == ["s0", "s1"]
    for path in (folders["files"], folders["dict"]):
        with pytest.raises(FtcError, match=r"split 'tset'"):
            open_corpus(path, split="tset")
    with pytest.raises(FtcError, match="has the columns .*, but none named 'body'; set column"):
        open_corpus(folders["dict"], column="body")
    with pytest.raises(FtcError, match="hf:.*absent.*cannot be opened"):
        open_corpus(folders["files"] + "/absent")


def test_rows_without_text_are_bad_records(tmp_path):
    datasets.Dataset.from_list([{"text": "a"}, {"text": None}]).save_to_disk(tmp_path / "d")
    records = [record for record, _ in open_corpus(f"hf:{tmp_path / 'd'}").read()]
    assert isinstance(records[1], BadRecord) and "record 2" in records[1].message


def test_a_run_is_prepared_from_splits(folders, tmp_path):
    held = Source(folders["dict"], name="held", validation_split="validation")
    streamed = Source(folders["files"], name="streamed", streaming=True, validation=folders["dict"])
    prepared = prepare(tmp_path / "run", [held, streamed], vocab_size=280)
    assert [len(each.train.lengths) for each in prepared.sources] == [120, 0]
    assert [len(each.validation.lengths) for each in prepared.sources] == [4, 4]
