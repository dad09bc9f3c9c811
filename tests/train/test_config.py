"""The run file: written and read back the same, and every wrong key or value named."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.train.config import Ftc, check_passes, check_values, dump_toml, sources_of
from ftc.train.launch import resolve

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
values = st.one_of(
    scalars, st.lists(scalars, max_size=3), st.lists(st.dictionaries(keys, scalars, max_size=2), max_size=2)
)
tables = st.dictionaries(keys, st.one_of(values, st.dictionaries(keys, values, max_size=3)), max_size=4)


@given(table=tables)
def test_toml_there_and_back(table):
    assert tomllib.loads(dump_toml(table)) == table


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pases": []}, "unknown key 'ftc.pases'; did you mean 'passes'"),
        ({"vocab_size": "2k"}, "ftc.vocab_size is '2k'; it must be a whole number"),
        ({"vocab_size": True}, "ftc.vocab_size is True"),
        ({"optimizer": "sgd"}, "ftc.optimizer is 'sgd'; it must be one of torchtitan, muon"),
        ({"passes": "fuse-qkv"}, "ftc.passes is 'fuse-qkv'"),
    ],
)
def test_a_wrong_key_or_value_is_named(section, message):
    with pytest.raises(FtcError, match=message.replace("(", r"\(")):
        check_values(Ftc, section, "ftc")


def test_integers_are_numbers_too():
    check_values(
        Ftc, {"muon_lr": 1, "architecture": {"hidden_size": 8}, "passes": ["a", {"name": "b", "rank": 4}]}, "ftc"
    )


def test_a_pass_without_a_name_is_an_error():
    check_passes(["a", {"name": "b"}])
    with pytest.raises(FtcError, match="'rank': 4"):
        check_passes([{"rank": 4}])


def test_data_is_one_source_and_tables_are_several():
    (only,) = sources_of({"data": "notes/", "validation_data": "other.txt"})
    assert (only.path, only.validation, only.name, only.weight) == ("notes/", "other.txt", "notes", 1.0)
    assert [source.name for source in sources_of({})] == ["stdlib"]
    two = sources_of({"sources": [{"path": "a.txt", "weight": 2}, {"path": "hf:x/y", "streaming": True}]})
    assert [(source.name, source.weight, source.streaming) for source in two] == [("a.txt", 2, False), ("y", 1.0, True)]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sources": [{"pth": "a"}]}, r"unknown key 'ftc.sources\[1\].pth'; did you mean 'path'"),
        ({"sources": [{"path": "a"}, {"path": "b", "weight": "x"}]}, r"ftc.sources\[2\].weight is 'x'"),
        ({"sources": [{"path": "a", "bad_records": "drop"}]}, "must be one of error, skip"),
        ({"sources": [{"weight": 1}]}, r"ftc.sources\[1\] has no path"),
        ({"sources": ["a"]}, "a source is a table"),
        ({"data": "x", "sources": [{"path": "a"}]}, r"ftc.data stands beside \[\[ftc.sources\]\]"),
        ({"validation_data": "x", "sources": [{"path": "a"}]}, "give each source its validation"),
    ],
)
def test_a_wrong_source_is_named_before_anything_runs(section, message):
    with pytest.raises(FtcError, match=message):
        resolve({"ftc": section})


def test_overrides_reach_nested_tables_and_leave_the_given_dict_alone():
    given_values = {"ftc": {"data": "x"}}
    resolved = resolve(given_values, {"training.steps": 3, "ftc.architecture.hidden_size": 8})
    assert resolved["training"]["steps"] == 3
    assert resolved["ftc"] == {"data": "x", "architecture": {"hidden_size": 8}}
    assert resolved["model"] == {"name": "ftc", "flavor": "quickstart", "converters": ["ftc"]}
    assert given_values == {"ftc": {"data": "x"}}
    with pytest.raises(FtcError, match="names no key"):
        resolve({}, {"steps": 3})


def test_the_shipped_quickstart_is_valid():
    assert resolve("quickstart")["model"]["flavor"] == "quickstart"


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FtcError, match="cannot read the run file"):
        resolve(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("[training\n")
    with pytest.raises(FtcError, match="not valid TOML"):
        resolve(tmp_path / "bad.toml")
