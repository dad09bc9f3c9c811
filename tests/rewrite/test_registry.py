"""Naming passes: Python, TOML tables and the command line's spelling; every mistake names the nearest valid spelling."""

import dataclasses

import pytest

from ftc.errors import FtcError
from ftc.rewrite.registry import available, classes, make, parse_passes


def test_every_pass_is_listed_with_contract_summary_and_options():
    infos = available()
    assert {"raise-attention", "raise-norm", "raise-rope", "raise-mlp", "fuse-qkv", "fuse-gate-up", "chunk-cross-entropy"} <= set(infos)
    for info in infos.values():
        assert info.contract in ("bitwise", "exact", "lossy") and info.summary
    assert infos["chunk-cross-entropy"].options["keep_logits"][:2] == ("bool", False)


def test_raise_stands_for_all_raise_passes():
    assert sorted(r.name for r in parse_passes(["raise"])) == sorted(n for n in available() if n.startswith("raise-"))


@pytest.mark.parametrize(
    "spelling",
    [
        "chunk-cross-entropy{chunk=64,keep_logits=true}",
        ["chunk-cross-entropy{chunk=64,keep_logits=true}"],
        [("chunk-cross-entropy", {"chunk": 64, "keep_logits": True})],
        [{"name": "chunk-cross-entropy", "chunk": 64, "keep_logits": True}],
    ],
)
def test_all_spellings_mean_the_same(spelling):
    (request,) = parse_passes(spelling)
    assert request.options() == {"chunk": 64, "keep_logits": True} and request.expect == "some"


def test_expectation_is_an_option_of_every_pass():
    assert parse_passes("fuse-qkv{expect=all}")[0].expect == "all"
    assert parse_passes("fuse-qkv{expect=4}")[0].expect == 4
    assert parse_passes("raise-norm")[0].expect == "any"
    with pytest.raises(FtcError, match="expect = 'most'"):
        parse_passes("fuse-qkv{expect=most}")


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["fuse-kqv"], "did you mean 'fuse-qkv'"),
        ([("chunk-cross-entropy", {"chunks": 3})], "did you mean 'chunk'"),
        ([("chunk-cross-entropy", {"chunk": "many"})], "should be of type"),
        ([("chunk-cross-entropy", {"chunk": 0})], "use 1 or more"),
        ("fuse-qkv{rank}", "has no value"),
        ("fuse-qkv}}", "cannot read the passes"),
        ([3], "names no pass"),
        (7, "must be a list or a string"),
    ],
)
def test_mistakes_are_errors_that_name_the_fix(passes, message):
    with pytest.raises(FtcError, match=message):
        parse_passes(passes)


def test_a_third_party_pass_comes_through_an_entry_point(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Foreign:
        name = "foreign-pass"
        summary = "does nothing"
        contract = "bitwise"
        inverse = True
        strength: int = 1

        def apply(self, graph):
            raise AssertionError

    class Entry:
        name, value = "foreign", "somewhere:Foreign"

        @staticmethod
        def load():
            return Foreign

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Entry] if group == "ftc.passes" else [])
    classes.cache_clear()
    try:
        assert make("foreign-pass", {"strength": 2}).options() == {"strength": 2}
        assert "foreign-pass" in available()
        Foreign.name = "fuse-qkv"
        classes.cache_clear()
        with pytest.raises(FtcError, match="exists already"):
            classes()
    finally:
        Foreign.name = "foreign-pass"
        classes.cache_clear()
