"""Partitions against all partitions, and where stages stand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.pipeline.partition import partition, stage_costs, stage_ranks, stages_of_rank

COSTS = st.lists(st.integers(0, 9), min_size=2, max_size=9)
ENDS = st.integers(0, 12)


def value(costs, bounds, first, last, placement) -> tuple:
    """What is minimised, in order."""
    stages = stage_costs(costs, bounds, first, last)
    if placement == "loop":
        return max(stages), sum(stage * stage for stage in stages)
    return max(stages[rank] + stages[-1 - rank] for rank in range(len(stages) // 2)), max(stages)


@settings(max_examples=200)
@given(costs=COSTS, first=ENDS, last=ENDS, placement=st.sampled_from(["loop", "v"]), data=st.data())
def test_no_partition_is_better(costs, first, last, placement, data):
    counts = [n for n in range(1, len(costs) + 1) if placement == "loop" or n % 2 == 0]
    num_stages = data.draw(st.sampled_from(counts))
    bounds = partition(costs, num_stages, first=first, last=last, placement=placement)
    every = itertools.combinations(range(1, len(costs)), num_stages - 1)
    assert bounds in itertools.combinations(range(1, len(costs)), num_stages - 1)
    assert value(costs, bounds, first, last, placement) == min(value(costs, other, first, last, placement) for other in every)


@given(costs=st.lists(st.floats(0, 1e6), min_size=6, max_size=30), scale=st.sampled_from([1e-9, 0.1, 3.0, 1e12]), placement=st.sampled_from(["loop", "v"]))
def test_the_unit_of_costs_does_not_matter(costs, scale, placement):
    bounds, scaled = (partition([c * s for c in costs], 6, first=s, placement=placement) for s in (1.0, scale))
    before, after = (value(costs, b, 1.0, 0.0, placement) for b in (bounds, scaled))
    assert after[0] == pytest.approx(before[0], rel=1e-9)


def test_equal_regions_are_shared_evenly_and_ends_are_counted():
    assert partition([0.1] * 12, 4) == (3, 6, 9)
    assert partition([0.1] * 10, 4) in {(3, 6, 8), (2, 5, 8), (3, 5, 8), (2, 4, 7), (3, 5, 7), (2, 5, 7)}  # 3, 3, 2, 2 in some order
    assert partition([1.0] * 6, 2, last=2.0) == (4,)
    assert partition([1.0] * 6, 2, first=4.0) == (1,)
    bounds = partition([1.0] * 8, 4, first=1.0, last=1.0, placement="v")
    assert value([1.0] * 8, bounds, 1.0, 1.0, "v") == (5.0, 3.0)  # evenly cut, (2, 4, 6), rank 0 bears 6


def test_v_minimises_what_a_rank_bears_where_loop_minimises_a_stage():
    costs = [5, 1, 1, 1, 1, 1, 1, 5]
    v, loop = (value(costs, partition(costs, 4, placement=p), 0, 0, "v") for p in ("v", "loop"))
    assert v <= loop and v[0] == 10


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_stages_stand_where_the_schedules_expect_them(num_ranks):
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    for placement, per_rank in (("loop", 1), ("loop", 3), ("v", 2)):
        ranks = stage_ranks(per_rank * num_ranks, num_ranks, placement)
        assert dict(enumerate(ranks)) == generate_stage_to_rank_mapping(num_ranks, per_rank * num_ranks, style=placement)
        for rank in range(num_ranks):
            assert stages_of_rank(rank, per_rank * num_ranks, num_ranks, placement) == tuple(s for s, r in enumerate(ranks) if r == rank)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: partition([1.0, -1.0], 2), r"costs\[1\] = -1.0"),
        (lambda: partition([1.0, float("nan")], 2), r"costs\[1\] = nan"),
        (lambda: partition([1.0], 1, last=float("inf")), "last = inf"),
        (lambda: partition([1.0, 1.0], 3), "2 regions cannot be cut into 3 stages; use 1 to 2"),
        (lambda: partition([1.0] * 4, 0), "into 0 stages"),
        (lambda: partition([1.0] * 4, 3, placement="v"), "two stages a rank"),
        (lambda: stage_ranks(4, 2, "w"), "unknown placement 'w'"),
        (lambda: stage_ranks(5, 2), "5 stages cannot be dealt out evenly to 2 ranks"),
        (lambda: stage_ranks(6, 2, "v"), "4 stages on 2 ranks, not 6"),
        (lambda: stages_of_rank(2, 4, 2), "rank 2 is not one of 2"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(FtcError, match=said):
        call()
