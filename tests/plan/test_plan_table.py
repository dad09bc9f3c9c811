"""Schedules as CSV files: read back the same, read by torch's runtime, and errors by row and column."""

import csv

import pytest
from helpers_plan import known_schedules
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from ftc.errors import FtcError
from ftc.plan.actions import F, I, W, compact, pair
from ftc.plan.costs import Costs
from ftc.plan.known import known
from ftc.plan.search import search
from ftc.plan.table import read, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@given(data=st.data(), drawn=known_schedules())
def test_what_is_written_is_read_back(folder, data, drawn):
    _, schedule, _, _ = drawn
    gaps = {rank: [None] * data.draw(st.integers(0, 2)) + row for rank, row in schedule.items()}
    write(gaps, folder / "there.csv")
    assert read(folder / "there.csv") == gaps


class _Stage:
    """As much of a stage as torch looks at when it loads a schedule."""

    stage_index_to_group_rank: dict[int, int]


def _torch_runtime(placement, microbatches):
    runtime = object.__new__(_PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages, runtime._n_microbatches = placement.num_ranks, placement.num_stages, microbatches
    runtime._stages, runtime._defer_pp_recv, runtime.pipeline_order = [_Stage()], False, {}
    return runtime


@given(drawn=known_schedules())
def test_torchs_runtime_loads_what_is_written_and_adds_messages(folder, drawn):
    name, schedule, placement, microbatches = drawn
    if name == "DualPipe":
        return  # two chains: torch's runtime has one
    write(schedule, folder / "torch.csv")
    runtime = _torch_runtime(placement, microbatches)
    runtime._load_csv(str(folder / "torch.csv"), format="compute_only")
    assert compact(runtime.pipeline_order) == compact(schedule)
    assert runtime.stage_index_to_group_rank == dict(enumerate(placement.ranks))
    computed = {rank: [a for a in row if a.is_compute_op] for rank, row in runtime.pipeline_order_with_comms.items()}
    assert computed == compact(schedule)
    runtime._dump_csv(str(folder / "dumped.csv"), format="compute_only")
    assert compact(read(folder / "dumped.csv")) == compact(schedule)


def test_torchs_runtime_loads_what_a_search_finds(folder):
    costs = Costs.uniform(8, 1.0, 1.2, 0.8, exchange_forward=0.4, exchange_backward=0.4, activation_bytes=1.0, pending_bytes=1.0, microbatches=8)
    plan = search(costs, 4, 8, memory_cap=10.0, seconds=30.0, layouts=(("v", 2),), rounds=2)
    write(plan.schedule, folder / "searched.csv")
    runtime = _torch_runtime(plan.placement, 8)
    runtime._load_csv(str(folder / "searched.csv"), format="compute_only")
    assert compact(runtime.pipeline_order) == compact(plan.schedule)
    assert any(action.sub_actions for row in plan.schedule.values() for action in row)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["0F0", "0X0"]], "row 1, column 2: '0X0' is no action"),
        ([["0F0"], ["", "1F0 1B0"]], "row 2, column 2"),
        ([["0F0junk"]], "row 1, column 1"),
        ([["F0"]], "row 1, column 1"),
        ([["0F"]], "row 1, column 1"),
        ([["-1F0"]], "row 1, column 1"),
        ([["0F0", "0SEND_F0"]], "column 2: '0SEND_F0': a schedule here holds compute alone"),
        ([["0F0", "0REDUCE_GRAD"]], "compute alone"),
        ([["(0F0;1B0)"]], "is no action"),
        ([["(0F0)OVERLAP_F_B"]], "or a pair such as"),
        ([["(0B0;1F0)OVERLAP_F_B"]], "a pair is a forward F and then a backward"),
        ([["(0F0;1W0)OVERLAP_F_B"]], "a pair is a forward F and then a backward"),
        ([["0F0"], ["", ""]], "row 2 \\(rank 1\\) has no action"),
        ([["", ""]], "no action in it"),
        ([], "no action in it"),
    ],
)
def test_what_is_no_schedule_is_refused_by_row_and_column(tmp_path, rows, words):
    path = tmp_path / "bad.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(FtcError, match=words):
        read(path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FtcError, match="not a readable CSV"):
        read(tmp_path / "missing.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe0F0")
    with pytest.raises(FtcError, match="not a readable CSV"):
        read(tmp_path / "bytes.csv")


def test_a_pair_with_an_input_gradient_survives(tmp_path):
    row = [_Action(0, F, 0), pair(_Action(0, F, 1), _Action(0, I, 0)), _Action(0, W, 0), None, _Action(0, I, 1), _Action(0, W, 1)]
    write({0: row}, tmp_path / "pair.csv")
    assert read(tmp_path / "pair.csv") == {0: row}
    assert read(tmp_path / "pair.csv") != known("1F1B", 1, 2)[0]
