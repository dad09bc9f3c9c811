"""Naming passes: Python, TOML tables and the command line's spelling; every mistake names the nearest valid spelling."""

import pytest

from ftc.errors import FtcError
from ftc.rewrite.registry import available, parse_passes


def test_every_pass_is_listed_with_contract_summary_and_options():
    infos = available()
    assert {"raise-attention", "raise-norm", "raise-rope", "raise-mlp", "fuse-qkv", "fuse-gate-up", "chunk-cross-entropy"} <= set(infos)
    for info in infos.values():
        assert info.contract in ("bitwise", "exact", "lossy") and info.summary
    assert infos["chunk-cross-entropy"].options["keep_logits"][:2] == ("bool", False)


def test_raise_stands_for_all_raise_passes_but_the_one_that_only_caches_ask_for():
    raising = {n for n in available() if n.startswith("raise-")}
    assert sorted(r.name for r in parse_passes(["raise"])) == sorted(raising - {"raise-mla"})


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
