"""Placements, costs and the known schedules: what they promise about sizes, sums and orders."""

import pytest
from helpers_plan import costs_of, known_schedules
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from ftc.errors import FtcError
from ftc.plan.actions import Placement, every_part, place, placement_of
from ftc.plan.costs import Costs
from ftc.plan.known import NAMES, fits, known


@given(ranks=st.integers(1, 8), each=st.integers(1, 4), style=st.sampled_from(["loop", "v"]))
def test_placements_are_those_of_torch(ranks, each, style):
    expected = generate_stage_to_rank_mapping(ranks, ranks * each, style)
    assert place(style, ranks, each).ranks == tuple(expected[stage] for stage in range(ranks * each))


@given(ranks=st.integers(1, 6).map(lambda half: 2 * half))
def test_both_ways_mirror_each_other(ranks):
    placement = place("bidirectional", ranks, 2)
    for stage in range(ranks):
        assert placement.ranks[stage] == ranks - 1 - placement.ranks[ranks + stage]
        assert placement.position(ranks + stage) == stage
    assert placement.previous[ranks] is None and placement.following[ranks - 1] is None
    assert sorted([*placement.microbatches(0, 8), *placement.microbatches(ranks, 8)]) == list(range(8))


@pytest.mark.parametrize(
    ("style", "ranks", "each", "words"),
    [("spiral", 2, 1, "loop"), ("bidirectional", 3, 2, "even"), ("v", 0, 1, "at least 1"), ("loop", 2, 0, "at least 1")],
)
def test_placements_that_do_not_exist_are_refused(style, ranks, each, words):
    with pytest.raises(FtcError, match=words):
        place(style, ranks, each)
    with pytest.raises(FtcError, match="every rank"):
        Placement("loop", (0, 2))


@given(drawn=known_schedules())
def test_known_schedules_imply_their_placement(drawn):
    _, schedule, placement, _ = drawn
    found = placement_of(schedule)
    assert found.ranks == placement.ranks
    # With one stage a rank, or one rank, a loop and a V are the same.
    assert found.style == placement.style or placement.num_ranks == 1


def test_placements_that_are_not_known_are_refused():
    schedule, _ = known("1F1B", 3, 4)
    turned = {0: schedule[1], 1: schedule[0], 2: schedule[2]}
    with pytest.raises(FtcError, match="neither a loop nor a V"):
        placement_of(turned)
    assert placement_of(turned, "loop").ranks == (1, 0, 2)
    with pytest.raises(FtcError, match="a stage lives on one rank"):
        placement_of({0: schedule[0], 1: schedule[0]})
    with pytest.raises(FtcError, match="no action for stage 0"):
        placement_of({0: schedule[1]})


@given(drawn=known_schedules())
def test_known_schedules_do_each_microbatch_once(drawn):
    _, schedule, placement, microbatches = drawn
    parts = [part for _, _, part in every_part(schedule)]
    assert len(parts) == len(set(parts))
    forwards = {(p.stage_index, p.microbatch_index) for p in parts if p.computation_type.value == "F"}
    assert forwards == {(s, m) for s in range(placement.num_stages) for m in placement.microbatches(s, microbatches)}


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "each", "words"),
    [
        ("DualPipeV", 4, 7, None, "at least 8"),
        ("DualPipe", 3, 8, None, "even"),
        ("DualPipe", 4, 9, None, "even"),
        ("Interleaved1F1B", 4, 9, None, "such as 8 or 10"),
        ("ZBVZeroBubble", 4, 8, 3, "it has 2"),
        ("1F1B", 0, 8, None, "at least 1"),
        ("2F2B", 4, 8, None, "1F1B"),
    ],
)
def test_known_schedules_name_the_numbers_that_do_not_fit(name, ranks, microbatches, each, words):
    with pytest.raises(FtcError, match=words):
        known(name, ranks, microbatches, each)
    assert not fits(name, ranks, microbatches, each)


@given(data=st.data(), ranks=st.integers(1, 6), microbatches=st.integers(1, 24))
def test_fits_says_what_known_does(data, ranks, microbatches):
    name = data.draw(st.sampled_from(NAMES))
    try:
        known(name, ranks, microbatches)
        made = True
    except FtcError:
        made = False
    assert fits(name, ranks, microbatches) == made


@given(data=st.data(), count=st.integers(2, 8))
def test_joined_costs_keep_their_sums_and_the_boundaries_between(data, count):
    costs = data.draw(costs_of(count))
    bounds = tuple(sorted(data.draw(st.sets(st.integers(1, count - 1)))))
    joined = costs.joined(bounds)
    assert len(joined) == len(bounds) + 1
    for name in ("forward", "backward_input", "backward_weight", "activation_bytes", "fixed_bytes", "exchange_forward"):
        assert sum(getattr(joined, name)) == pytest.approx(sum(getattr(costs, name)), abs=1e-12)
    assert joined.boundary_bytes == tuple(costs.boundary_bytes[bound - 1] for bound in bounds)


@given(data=st.data(), factor=st.integers(2, 8))
def test_work_of_a_step_does_not_depend_on_the_number_of_microbatches_but_for_launches(data, factor):
    costs = data.draw(costs_of(3))
    more = costs.for_microbatches(factor)
    for part in range(3):
        assert more.work(part) * factor == pytest.approx(costs.work(part))
        assert more.activation_bytes[part] * factor == pytest.approx(costs.activation_bytes[part])
        assert more.fixed_bytes[part] == costs.fixed_bytes[part]
    launching = Costs.uniform(2, 1.0, 1.0, 1.0, launch_seconds=0.25).for_microbatches(factor)
    assert launching.forward[0] == pytest.approx(0.25 + 0.75 / factor)


@given(data=st.data())
def test_a_pair_is_never_longer_than_both_halves_nor_shorter_than_either(data):
    costs = data.draw(costs_of(2))
    for full in (True, False):
        pair = costs.pair_seconds(0, 1, full)
        forward = costs.forward[0] + costs.exchange_forward[0]
        backward = costs.backward_input[1] + costs.exchange_backward[1] + (costs.backward_weight[1] if full else 0.0)
        assert max(forward, backward) - 1e-12 <= pair <= forward + backward + 1e-12
        compute = costs.forward[0] + costs.backward_input[1] + (costs.backward_weight[1] if full else 0.0)
        assert pair >= compute - 1e-12


def test_the_ends_count_in_the_first_and_last_region():
    costs = Costs.uniform(3).with_ends(Costs.uniform(1, 0.5, 0.25, 0.125), Costs.uniform(1, 2.0, 2.0, 2.0))
    assert costs.forward == (1.5, 1.0, 3.0) and costs.backward_weight == (1.125, 1.0, 3.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Costs((1.0,), (1.0, 1.0), (1.0,)),
        lambda: Costs((-1.0,), (1.0,), (1.0,)),
        lambda: Costs((float("nan"),), (1.0,), (1.0,)),
        lambda: Costs((), (), ()),
        lambda: Costs.uniform(2, boundary_bytes=(1.0, 1.0)),
        lambda: Costs.uniform(2, hop_latency=-1.0),
        lambda: Costs.uniform(2, hidden_share=1.5),
        lambda: Costs.uniform(2, bytes_per_second=0.0),
        lambda: Costs.uniform(3).joined((2, 2)),
        lambda: Costs.uniform(3).joined((3,)),
        lambda: Costs.uniform(3).for_microbatches(0),
        lambda: Costs.uniform(3).with_ends(Costs.uniform(2), Costs.uniform(1)),
    ],
)
def test_costs_that_cannot_be_are_refused(make):
    with pytest.raises(FtcError):
        make()
