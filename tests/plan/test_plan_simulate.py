"""The simulator against formulas, bounds, and a second simulation written the slow way."""

import pytest
from helpers_plan import costs_of, known_schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.plan.actions import compact, parts, place
from ftc.plan.bound import partition_bound, step_bound
from ftc.plan.costs import Costs
from ftc.plan.formulas import FORMULAS, bubble
from ftc.plan.fuse import fuse
from ftc.plan.known import fits, known
from ftc.plan.messages import makes, needs
from ftc.plan.prove import prove
from ftc.plan.simulate import action_seconds, simulate

SIZES = [(2, 4), (2, 8), (4, 8), (4, 16), (6, 12), (8, 32)]


@given(data=st.data(), name=st.sampled_from(FORMULAS))
@settings(max_examples=60)
def test_simulated_bubbles_equal_the_published_formulas(data, name):
    ranks, microbatches = data.draw(st.sampled_from([size for size in SIZES if fits(name, *size)]))
    # Quarters are exact in binary, so that equal means equal.
    f = data.draw(st.integers(2, 12)) / 4
    i = f if name.startswith("DualPipe") else data.draw(st.integers(2, 12)) / 4
    most = 3.0 if name in ("GPipe", "1F1B", "Interleaved1F1B") else min(f, i)
    w = data.draw(st.integers(1, int(most * 4))) / 4
    schedule, placement = known(name, ranks, microbatches)
    simulated = simulate(schedule, Costs.uniform(len(placement.chains[0]), f, i, w), placement)
    assert set(simulated.idle) == {bubble(name, ranks, microbatches, f, i, w)}


@given(exchange=st.integers(1, 6).map(lambda n: n / 4), w=st.integers(1, 4).map(lambda n: n / 4), name=st.sampled_from(["DualPipe", "DualPipeV"]))
def test_bubbles_of_pairs_that_hide_communication_follow_the_formula(exchange, w, name):
    schedule, placement = known(name, 4, 16)
    costs = Costs.uniform(len(placement.chains[0]), 1.0, 1.0, w, exchange_forward=exchange, exchange_backward=exchange)
    expected = bubble(name, 4, 16, 1.0 + exchange, 1.0 + exchange, w, costs.pair_seconds(0, 0))
    assert max(simulate(schedule, costs, placement).idle) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("name", "f", "i", "w"), [("ZB1P", 1.0, 1.0, 2.0), ("DualPipeV", 1.0, 2.0, 1.0), ("DualPipe", 1.0, 1.0, 1.5)])
def test_outside_its_condition_a_formula_is_refused_and_indeed_wrong(name, f, i, w):
    with pytest.raises(FtcError, match="formula holds"):
        bubble(name, 4, 16, f, i, w)
    schedule, placement = known(name, 4, 16)
    formula = {"ZB1P": 3 * (f + i - w), "DualPipe": f + 2 * i - w, "DualPipeV": 3 * (f + 2 * i - w)}[name]
    idle = simulate(schedule, Costs.uniform(len(placement.chains[0]), f, i, w), placement).idle
    assert any(abs(seconds - formula) > 1e-9 for seconds in idle)


def test_bubbles_without_formula_or_numbers_are_refused():
    with pytest.raises(FtcError, match="no bubble formula"):
        bubble("ZBVZeroBubble", 4, 16, 1.0, 1.0, 1.0)
    with pytest.raises(FtcError, match="at least 8"):
        bubble("DualPipeV", 4, 4, 1.0, 1.0, 1.0)


def test_known_idle_shares_at_eight_ranks():
    """F = I = W, hop 0.05 F, 8 ranks, 32 microbatches; hops of interleaved stages are chunks'."""
    expected = {"1F1B": 0.191, "Interleaved1F1B": 0.105, "DualPipeV": 0.083, "ZBVZeroBubble": 0.043}
    for name, share in expected.items():
        schedule, placement = known(name, 8, 32)
        size = 16 / placement.num_stages
        costs = Costs.uniform(placement.num_stages, size, size, size, hop_latency=0.05)
        assert simulate(schedule, costs, placement).idle_share == pytest.approx(share, abs=6e-4)


def _slow_starts(schedule, costs, placement):
    """Start times as the least solution of their inequalities: all start at 0 and are pushed until nothing moves."""
    lists = compact(schedule)
    seconds = {(r, n): action_seconds(a, costs, placement) for r, row in lists.items() for n, a in enumerate(row)}
    maker = {key: (r, n) for r, row in lists.items() for n, a in enumerate(row) for key in map(makes, parts(a)) if key}
    starts = dict.fromkeys(seconds, 0.0)
    moved = True
    while moved:
        moved = False
        for (r, n), start in starts.items():
            least = starts[r, n - 1] + seconds[r, n - 1] if n else 0.0
            for part in parts(lists[r][n]):
                for key in needs(part, placement):
                    where = maker[key]
                    position = placement.position(key[1])
                    hop = 0.0 if where[0] == r else costs.hop(position if key[0] == "F" else position - 1)
                    if where != (r, n):
                        least = max(least, starts[where] + seconds[where] + hop)
            if least > start + 1e-12:
                starts[r, n], moved = least, True
    return starts


@given(data=st.data(), drawn=known_schedules(4, 8))
def test_simulation_equals_the_least_solution_of_its_inequalities(data, drawn):
    _, schedule, placement, _ = drawn
    costs = data.draw(costs_of(len(placement.chains[0])))
    simulated = simulate(schedule, costs, placement)
    slow = _slow_starts(schedule, costs, placement)
    for rank, starts in simulated.starts.items():
        assert starts == pytest.approx([slow[rank, n] for n in range(len(starts))], abs=1e-9)


@given(data=st.data(), drawn=known_schedules())
def test_ranks_work_without_overlap_and_messages_of_torch_are_never_earlier(data, drawn):
    _, schedule, placement, _ = drawn
    costs = data.draw(costs_of(len(placement.chains[0])))
    plain, torch_like = simulate(schedule, costs, placement), simulate(schedule, costs, placement, "torch")
    for rank in plain.starts:
        for start, end in zip(plain.starts[rank][1:], plain.ends[rank], strict=False):
            assert start >= end
        for one, other in zip(plain.starts[rank], torch_like.starts[rank], strict=True):
            assert other >= one - 1e-12
    assert plain.busy == pytest.approx(torch_like.busy)
    assert all(-1e-9 <= idle <= plain.step_seconds for idle in plain.idle)


@given(drawn=known_schedules())
def test_without_hops_both_runtimes_are_the_same(drawn):
    _, schedule, placement, _ = drawn
    costs = Costs.uniform(len(placement.chains[0]))
    # A late receive matters only where the message takes time.
    assert simulate(schedule, costs, placement).starts == simulate(schedule, costs, placement, "torch").starts


@given(data=st.data(), drawn=known_schedules())
def test_memory_ends_where_it_began_and_never_falls_below(data, drawn):
    _, schedule, placement, _ = drawn
    costs = data.draw(costs_of(len(placement.chains[0])))
    simulated = simulate(schedule, costs, placement)
    for line, peak in zip(simulated.memory, simulated.peak_bytes, strict=True):
        assert line[-1][1] == pytest.approx(line[0][1], abs=1e-9)
        assert min(held for _, held in line) >= line[0][1] - 1e-9
        assert peak == max(held for _, held in line)
        assert [seconds for seconds, _ in line] == sorted(seconds for seconds, _ in line)


def test_peaks_of_1f1b_and_gpipe_are_the_known_ones():
    for name, expected in (("1F1B", (4, 3, 2, 1)), ("GPipe", (8, 8, 8, 8))):
        schedule, placement = known(name, 4, 8)
        assert simulate(schedule, Costs.uniform(4, activation_bytes=1.0), placement).peak_bytes == expected


@given(data=st.data(), drawn=known_schedules())
@settings(max_examples=60)
def test_no_schedule_is_faster_than_the_bound(data, drawn):
    _, schedule, placement, microbatches = drawn
    costs = data.draw(costs_of(len(placement.chains[0])))
    simulated = simulate(schedule, costs, placement)
    assert simulated.step_seconds >= step_bound(costs, placement, microbatches) - 1e-9
    assert simulated.step_seconds >= step_bound(costs, placement, microbatches, max(simulated.peak_bytes)) - 1e-9
    both_ways = placement.style == "bidirectional"
    assert simulated.step_seconds >= partition_bound(costs, placement.num_ranks, microbatches, both_ways) - 1e-9
    assert partition_bound(costs, placement.num_ranks, microbatches, True) <= partition_bound(costs, placement.num_ranks, microbatches) + 1e-9


@given(data=st.data(), count=st.integers(3, 9), ranks=st.integers(1, 3), microbatches=st.integers(1, 8))
def test_the_bound_over_partitions_is_below_that_of_each(data, count, ranks, microbatches):
    costs = data.draw(costs_of(count))
    bounds = sorted(data.draw(st.sets(st.integers(1, count - 1), min_size=ranks - 1, max_size=ranks - 1)))
    one = step_bound(costs.joined(bounds), place("loop", ranks), microbatches)
    assert partition_bound(costs, ranks, microbatches) <= one + 1e-9


def test_the_bound_is_reached_by_zero_bubble_schedules():
    schedule, placement = known("ZBVZeroBubble", 8, 32)
    costs = Costs.uniform(16)
    assert simulate(schedule, costs, placement).step_seconds == step_bound(costs, placement, 32)


def test_a_cap_that_one_microbatch_barely_fits_bounds_the_step_by_its_way_there_and_back():
    placement, costs = place("loop", 4), Costs.uniform(4, activation_bytes=1.0)
    # Rank 0 holds one microbatch at a time, 4 F and 4 I long: 8 of them take 64.
    assert step_bound(costs, placement, 8, memory_cap=1.0) == 64.0
    assert step_bound(costs, placement, 8) < 64.0


@given(data=st.data(), drawn=known_schedules())
def test_fused_schedules_are_whole_and_not_longer(data, drawn):
    _, schedule, placement, microbatches = drawn
    costs = data.draw(costs_of(len(placement.chains[0])))
    fused = fuse(schedule, costs, placement)
    prove(fused, placement, microbatches)
    assert simulate(fused, costs, placement).step_seconds <= simulate(schedule, costs, placement).step_seconds + 1e-9


def test_fusing_leaves_apart_what_others_wait_for():
    schedule, placement = known("ZB1P", 4, 8)
    apart = {"I": 0, "B": 0}
    for row in fuse(schedule, Costs.uniform(4), placement).values():
        for action in row:
            apart[action.computation_type.value] = apart.get(action.computation_type.value, 0) + 1
    assert apart["I"] > 0 and apart["B"] > 0


def test_sizes_that_do_not_fit_are_refused():
    schedule, placement = known("1F1B", 4, 8)
    with pytest.raises(FtcError, match="costs of 3 stages"):
        simulate(schedule, Costs.uniform(3), placement)
    with pytest.raises(FtcError, match="asynchronous"):
        simulate(schedule, Costs.uniform(4), placement, "nccl")
    with pytest.raises(FtcError, match="ranks"):
        simulate({rank: schedule[rank] for rank in (0, 1)}, Costs.uniform(4), placement)
    with pytest.raises(FtcError, match="cannot go on"):
        simulate({**schedule, 3: schedule[3][1:]}, Costs.uniform(4), placement)
