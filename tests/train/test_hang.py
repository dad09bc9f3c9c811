"""Reports of a hang: who waits for whom, from made-up accounts and from ranks that really wait."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks_that_hang import a_rank_that_goes_on, a_rank_that_sleeps

from ftc.train.hang import causes, hang_summary, report


def account(rank, calls, ranks=(0, 1), name="dp"):
    calls = [{"number": n, "op": op, "sizes": [[4]], "dtypes": ["Float"], "done": done} for n, op, done in calls]
    place = {"rank": rank, "host": f"host{rank}", "step": 7, "doing": "in its step", "seconds": 50.0}
    return place | {"stacks": {"MainThread": ["a.py:1 in f"]}, "groups": {"1": {"name": name, "ranks": list(ranks), "calls": calls}}}


@given(st.integers(2, 6), st.data())
def test_the_ranks_that_did_not_come_are_named(size, data):
    late = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    ranks = range(size)
    accounts = [account(r, [(3, "all_reduce", True)] + ([] if r in late else [(4, "all_gather", False)]), ranks) for r in ranks]
    (said,) = causes(accounts)
    waiting, _, missing = said.partition(" wait")
    named = lambda text: {int(word) for word in text.replace(",", " ").split() if word.isdigit()}  # noqa: E731
    assert named(waiting) == set(ranks) - late
    assert named(missing.partition(" for ")[2]) == late
    assert "all_gather 4 (float [4]) of group dp" in said


def test_ranks_that_have_called_nothing_yet_did_not_come():
    accounts = [account(0, [(1, "all_reduce", False)]), account(1, []) | {"groups": {}}]
    assert causes(accounts)[0].startswith("rank 0 waits in all_reduce 1 (float [4]) of group dp for rank 1,")


def test_different_collectives_are_told_apart_from_a_slow_network():
    (different,) = causes([account(0, [(4, "all_reduce", False)]), account(1, [(4, "all_gather", False)])])
    assert "call different collectives" in different and "rank 0: all_reduce 4" in different and "rank 1: all_gather 4" in different
    (slow,) = causes([account(rank, [(4, "all_reduce", False)]) for rank in (0, 1)])
    assert "the connection between them" in slow


def test_where_nothing_is_open_the_work_itself_is_slow():
    (said,) = causes([account(rank, [(4, "all_reduce", True)]) for rank in (0, 1)])
    assert said.startswith("No rank waits in a collective")


def test_a_rank_without_an_account_is_named():
    text = report([account(0, [(4, "all_reduce", False)], ranks=(0, 1, 2))], num_ranks=3)
    assert "ranks 1, 2 wrote nothing" in text and "rank 0 waits in all_reduce 4 (float [4]) of group dp for ranks 1, 2, of which nothing is known." in text
    assert "rank 0 on host0, in its step" in text and "a.py:1 in f" in text


@pytest.mark.slow
def test_a_rank_that_sleeps_is_found_while_the_other_waits(ranks, tmp_path):
    said = ranks.run(a_rank_that_sleeps, str(tmp_path), size=2)
    text = (tmp_path / "hang" / "report.txt").read_text()
    assert said[0] == text and said[1] is None, "the lowest rank says it, once"
    assert "rank 0 waits in all_reduce 3 (float [4]) of group default_pg for rank 1, which did not call it." in text
    assert "in oversleep" in text.partition("rank 1 on ")[2], "where the late rank stands"
    assert "at step 5" in text
    assert hang_summary(tmp_path).startswith("before that the ranks hung (rank 0 waits in all_reduce 3")
    accounts = [json.loads(path.read_text()) for path in sorted((tmp_path / "hang").glob("rank*.json"))]
    assert [a["doing"] for a in accounts] == ["in its step", "reading data"]


def test_a_silence_that_ends_takes_its_account_back(tmp_path):
    said = a_rank_that_goes_on(str(tmp_path))
    assert len(said) == 2 and said[1] == "rank 0 goes on, at step 6"
    assert not list((tmp_path / "hang").glob("rank*.json"))


def test_no_report_without_a_hang(tmp_path):
    assert hang_summary(tmp_path) == ""
    started = time.monotonic()
    assert a_rank_that_goes_on(str(tmp_path), silence=0.0) == []
    assert time.monotonic() - started < 5 and not (tmp_path / "hang").exists()
