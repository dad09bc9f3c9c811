"""Preparing a run's data: several sources, reuse of what the folder holds, and every error that can be known up front."""

import json
import threading

import numpy as np
import pytest

from ftc.data import prepare as module
from ftc.data.prepare import prepare, training_tokens, validation_documents
from ftc.data.source_table import Source, check_sources, shares
from ftc.data.tokens import start_id
from ftc.errors import FtcError


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"document {number} says hello hello hello\n" * 5)
    lines = [json.dumps({"text": f"record {number} is a record\n" * 3, "source": f"s{number % 4}"}) for number in range(90)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def both(data):
    return [Source(str(data), name="docs"), Source(str(data.parent / "records.jsonl"), name="records", weight=3)]


def test_sources_are_split_tokenized_and_found_again(both, data, tmp_path):
    run = tmp_path / "run"
    first = prepare(run, both, vocab_size=280, validation_fraction=0.3)
    key = (run / "tokens" / "key.json").stat().st_mtime_ns
    again = prepare(run, both, vocab_size=280, validation_fraction=0.3, resuming=True)
    assert (run / "tokens" / "key.json").stat().st_mtime_ns == key
    np.testing.assert_array_equal(first.train.ids, again.train.ids)
    assert isinstance(again.sources[0].train.ids, np.memmap)
    docs = first.sources[0]
    total = sum(len(file.read_bytes()) for file in data.iterdir())
    assert docs.train.num_bytes + docs.validation.num_bytes == total and docs.validation.num_bytes
    for prepared in first.sources:
        for part in (prepared.train, prepared.validation):
            texts = [first.tokenizer.decode(ids.tolist()) for ids in part.documents()]
            assert sum(len(text.encode()) for text in texts) == part.num_bytes > 0
    assert start_id(first.tokenizer) is not None and shares(both) == [0.25, 0.75]
    np.testing.assert_array_equal(training_tokens(run).ids, first.train.ids)
    held_out = validation_documents(both, 0.3)
    assert sum(len(d.text.encode()) for d in held_out["docs"]) == docs.validation.num_bytes


def test_other_text_or_vocabulary_is_tokenized_anew_but_not_under_a_checkpoint(both, data, tmp_path):
    run = tmp_path / "run"
    keys = set()
    for size, extra in ((280, ""), (290, ""), (290, "more")):
        if extra:
            (data / "more.txt").write_text(extra)
        prepare(run, both, vocab_size=size)
        keys.add(json.loads((run / "tokens" / "key.json").read_text())["fingerprint"])
    assert len(keys) == 3
    (data / "more.txt").write_text("changed")
    with pytest.raises(FtcError, match="not what the checkpoints in .* were trained on"):
        prepare(run, both, vocab_size=290, resuming=True)


def test_a_given_tokenizer_is_copied_and_a_missing_one_is_an_error(both, tmp_path):
    first = prepare(tmp_path / "a", both, vocab_size=280)
    file = first.tokenizer_folder / "tokenizer.json"
    second = prepare(tmp_path / "b", both, tokenizer=str(first.tokenizer_folder))
    assert (second.tokenizer_folder / "tokenizer.json").read_bytes() == file.read_bytes()
    np.testing.assert_array_equal(first.train.ids, second.train.ids)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tokenizer.json").write_bytes(file.read_bytes())
    (tmp_path / "alone" / "config.json").write_text('{"eos_token_id": 5}')
    third = prepare(tmp_path / "c", both, tokenizer=str(tmp_path / "alone"))
    assert third.tokenizer.eos_id == 5 and third.tokenizer.bos_id == first.tokenizer.bos_id
    with pytest.raises(FtcError, match="no tokenizer at"):
        prepare(tmp_path / "d", both, tokenizer=str(tmp_path / "absent"))


def test_a_streamed_source_is_sampled_for_the_tokenizer_and_validated_on_its_own_text(both, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", 400)
    records = str(data.parent / "records.jsonl")
    streamed = Source(records, name="big", streaming=True, validation=str(data))
    prepared = prepare(tmp_path / "run", [streamed], vocab_size=300)
    (big,) = prepared.sources
    assert not len(big.train.ids) and big.validation.num_bytes == sum(len(f.read_bytes()) for f in data.iterdir())
    with pytest.raises(FtcError, match="streamed all of its text"):
        training_tokens(tmp_path / "run")
    prepare(tmp_path / "run", [streamed], vocab_size=300, resuming=True)
    with open(records, "a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(FtcError, match="not what the checkpoints"):
        prepare(tmp_path / "run", [streamed], vocab_size=300, resuming=True)


def test_bad_records_stop_or_are_counted(both, data, tmp_path):
    path = data.parent / "records.jsonl"
    path.write_text('{"text": \n' + path.read_text())
    with pytest.raises(FtcError, match=r"records.jsonl:1: not a JSON record"):
        prepare(tmp_path / "run", both)
    lenient = [both[0], Source(str(path), name="records", bad_records="skip")]
    assert [each.num_skipped for each in prepare(tmp_path / "run", lenient).sources] == [0, 1]
    (data / "0.txt").write_bytes(b"\xff")
    with pytest.raises(FtcError, match="0.txt:1: byte 0xff"):
        prepare(tmp_path / "run", lenient)


def test_empty_sources_are_errors_also_when_streamed(data, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for streaming in (False, True):
        with pytest.raises(FtcError, match="empty.jsonl holds no text"):
            prepare(tmp_path / "run", [Source(str(tmp_path / "empty.jsonl"), streaming=streaming)])


def test_several_processes_prepare_one_folder(both, tmp_path):
    made = []
    workers = [
        threading.Thread(target=lambda: made.append(prepare(tmp_path / "run", both, vocab_size=280))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({each.train.ids.tobytes() for each in made}) == 1 and len(made) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "has no path"),
        ({"path": "a/b.txt", "weight": 0.0}, "'b.txt' has the weight 0.0; it must be above zero"),
        ({"path": "a", "weight": float("nan")}, "weight nan"),
        ({"path": "a", "name": "../x"}, "a name holds letters"),
        ({"path": "a", "max_epochs": -1}, "max_epochs -1"),
        ({"path": "a", "split": "dev"}, "has a split, but a is no Hugging Face dataset"),
        ({"path": "a", "validation": "b", "validation_split": "dev"}, "has a validation_split, but b is no"),
    ],
)
def test_a_source_that_cannot_work_is_named(values, message):
    with pytest.raises(FtcError, match=message):
        Source(**values)


def test_names_must_differ_and_paths_exist(data):
    assert Source("hf:team/set").name == "set" and Source("./notes/").name == "notes" and Source("stdlib").name == "stdlib"
    with pytest.raises(FtcError, match="two sources are named 'data'"):
        check_sources([Source(str(data)), Source(str(data))])
    with pytest.raises(FtcError, match="the source 'absent': there is no data at"):
        check_sources([Source(str(data / "absent"))])
