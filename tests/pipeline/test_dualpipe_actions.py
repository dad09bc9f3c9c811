"""DualPipe's lists of actions, and what is said of numbers and files that do not fit."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.pipeline.bidirectional import B, F, I, W, actions, check_numbers
from ftc.pipeline.runtime import actions_from, read_csv
from ftc.plan.actions import parts, place
from ftc.plan.prove import prove

halves = st.integers(1, 6)


@given(half=halves, extra=st.integers(0, 8))
def test_every_action_is_there_once_and_nothing_waits_for_ever(half, extra):
    ranks, microbatches = 2 * half, 4 * half + 2 * extra
    prove(actions(ranks, microbatches), place("bidirectional", ranks, 2), microbatches)


@given(half=halves, extra=st.integers(0, 8))
def test_both_directions_mirror_each_other(half, extra):
    ranks, microbatches = 2 * half, 4 * half + 2 * extra
    lists = actions(ranks, microbatches)

    def mirrored(action):
        if action.sub_actions is not None:
            return action._replace(sub_actions=tuple(map(mirrored, action.sub_actions)))
        return action._replace(stage_index=(action.stage_index + ranks) % (2 * ranks), microbatch_index=(action.microbatch_index + microbatches // 2) % microbatches)

    for rank in range(ranks):
        assert list(map(mirrored, lists[rank])) == lists[ranks - 1 - rank]


@given(half=halves, extra=st.integers(0, 8))
def test_a_rank_holds_at_most_one_microbatch_more_than_there_are_ranks(half, extra):
    """DeepSeek-V3, table 2: activations of P + 1 microbatches, where 1F1B's first rank holds those of P."""
    ranks, microbatches = 2 * half, 4 * half + 2 * extra
    for order in actions(ranks, microbatches).values():
        held = most = 0
        for action in order:
            for part in parts(action):  # in a pair the new one is there before the other is done
                held += part.computation_type == F
                most = max(most, held)
                held -= part.computation_type in (B, I)
        assert most <= ranks + 1


def test_steps_are_those_of_deepseeks_code():
    """The first and a middle rank of 4 with 10 microbatches, written out from DualPipe.step (dualpipe.py), phases as directions."""
    lists = actions(4, 10)
    end = "0F0 0F1 0F2 7F5 7I5 7W5 7F6 (0F3;7B6) (7F7;0B0) (0F4;7B7) (7F8;0B1) 7B8 (7F9;0B2) 7B9 0I3 0W3 0I4 0W4"
    middle = "1F0 6F5 1F1 6F6 1F2 6B5 (6F7;1B0) (1F3;6B6) (6F8;1B1) (1F4;6B7) (6F9;1B2) 6B8 1B3 6I9 1I4 6W9 1W4"
    for rank, text in ((0, end), (1, middle)):
        assert [str(action).removesuffix("OVERLAP_F_B") for action in lists[rank]] == text.split()
    assert W in {action.computation_type for action in lists[3]}


@pytest.mark.parametrize(
    "ranks, microbatches, valid",
    [(3, 12, "use 2 or 4"), (1, 4, "use 2"), (0, 4, "use 2"), (4, 7, "use 8"), (4, 6, "use 8"), (4, 9, "use 10"), (2, 2, "use 4")],
)
def test_numbers_that_do_not_fit_are_answered_with_ones_that_do(ranks, microbatches, valid):
    with pytest.raises(FtcError, match=valid):
        check_numbers(ranks, microbatches)


def written(tmp_path, rows) -> str:
    path = tmp_path / "schedule.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_a_file_gives_back_the_lists_that_were_written(tmp_path):
    lists, placement = actions_from("DualPipeV", 4, 8)
    path = written(tmp_path, [lists[rank] for rank in sorted(lists)])
    found, where = actions_from(path, 4, 8)
    assert found == lists and where.ranks == placement.ranks


@pytest.mark.parametrize(
    "rows, said",
    [
        ([["0F0", "0X0"]], r"row 1, column 2 is '0X0', which is no action"),
        ([["0F0", "0SEND_F0"]], "sends and receives are added here"),
        ([["0F0", "1F0", "1B0", "0B0"]] * 2, "rank"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused_by_place(tmp_path, rows, said):
    with pytest.raises(FtcError, match=said):
        actions_from(written(tmp_path, rows), len(rows), 1)


def test_a_file_for_other_ranks_and_one_that_is_not_there_are_named(tmp_path):
    path = written(tmp_path, [["0F0", "0B0"]])
    with pytest.raises(FtcError, match="a schedule for 1 ranks, and the pipeline has 2"):
        actions_from(path, 2, 1)
    with pytest.raises(FtcError, match="cannot read the schedule .*nowhere.csv"):
        read_csv(str(tmp_path / "nowhere.csv"))
