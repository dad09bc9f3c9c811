"""The search: its parts agree with the simulator and keep caps, and its results keep what they promise."""

import itertools
import math
import random

import pytest
from helpers_plan import costs_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.pipeline.partition import partition
from ftc.plan.actions import place
from ftc.plan.bound import partition_bound
from ftc.plan.costs import Costs
from ftc.plan.dispatch import Dispatcher, Manner
from ftc.plan.improve import improve
from ftc.plan.known import fits, known
from ftc.plan.layouts import BOTH_WAYS, LAYOUTS, candidates, even_bounds, least_bytes
from ftc.plan.modulo import modulo
from ftc.plan.prove import prove
from ftc.plan.search import known_plans, search
from ftc.plan.seeds import all_keys, by_rule, from_times, periodic
from ftc.plan.simulate import simulate

RIVALS = ("ZBVZeroBubble", "DualPipeV", "Interleaved1F1B")
few = settings(max_examples=6, phases=[Phase.explicit, Phase.generate])


@st.composite
def problems(draw):
    style, each = draw(st.sampled_from([("loop", 1), ("loop", 2), ("v", 2), ("v", 3), ("bidirectional", 2)]))
    ranks = draw(st.integers(1, 2)) * 2 if style == "bidirectional" else draw(st.integers(1, 4))
    placement = place(style, ranks, each)
    microbatches = draw(st.integers(1, 4)) * 2
    return Dispatcher(costs := draw(costs_of(len(placement.chains[0]))), placement, microbatches), costs, placement, microbatches


@given(drawn=problems(), data=st.data())
@settings(max_examples=40)
def test_list_scheduling_gives_whole_schedules_within_the_cap_that_take_what_it_says(drawn, data):
    problem, costs, placement, microbatches = drawn
    larger = [max(both) for both in zip(costs.activation_bytes, costs.pending_bytes, strict=True)]
    at = [placement.position(s) for s in range(placement.num_stages)]
    least = max(sum(costs.fixed_bytes[at[s]] + larger[at[s]] for s in placement.stages_of(r)) for r in range(placement.num_ranks))
    cap = least * data.draw(st.sampled_from([1.0, 1.3, 2.0, 100.0]))
    rule = by_rule(problem, data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 2)))
    pattern = periodic(problem, data.draw(st.tuples(*[st.integers(1, 3)] * 4)), 1.0, data.draw(st.integers(0, 2)))
    for keys in (rule, pattern):
        manner = Manner(data.draw(st.sampled_from([0.0, 1.0, math.inf])), 1.0, data.draw(st.booleans()))
        found = problem.run(keys, manner, [cap] * placement.num_ranks)
        assert found is not None
        prove(found.schedule(), placement, microbatches)
        simulated = simulate(found.schedule(), costs, placement)
        assert simulated.step_seconds == pytest.approx(found.seconds, abs=1e-9)
        assert max(simulated.peak_bytes) <= found.peak_bytes + 1e-9 <= cap + 2e-9


@given(drawn=problems(), data=st.data())
def test_a_strict_pass_over_a_schedules_own_times_gives_it_back(drawn, data):
    problem, costs, placement, microbatches = drawn
    ranks, each = placement.num_ranks, placement.num_stages // placement.num_ranks
    names = [name for name in (*RIVALS, "1F1B", "ZB1P", "DualPipe") if fits(name, ranks, microbatches, each)]
    names = [name for name in names if known(name, ranks, microbatches, each)[1] == placement]
    for name in names:
        simulated = simulate(known(name, ranks, microbatches, each)[0], costs, placement)
        again = problem.run(from_times(problem, simulated), Manner(strict=True), [math.inf] * ranks)
        if problem.pairing or name not in ("DualPipeV", "DualPipe"):
            # What was one action is I and W one after the other now, so that nothing comes later.
            assert again.seconds <= simulated.step_seconds + 1e-9


@given(drawn=problems(), four=st.tuples(*[st.sampled_from([1.0, 2.0, 3.0])] * 4), stretch=st.sampled_from([1.0, 1.1, 1.5]))
def test_modulo_schedules_do_not_collide(drawn, four, stretch):
    problem, costs, placement, _ = drawn
    keys = modulo(problem, four, stretch)
    if keys is None:
        return
    seconds = (problem.forward, problem.backward, problem.weight)
    period = stretch * max(sum(kind[s] for kind in seconds for s in local) for local in problem.local)
    for local in problem.local:
        taken = [(row[s][0] % period, kind[s]) for row, kind in zip((keys.forward, keys.backward, keys.weight), seconds, strict=True) for s in local]
        for (one, length), (other, _) in itertools.permutations(taken, 2):
            assert (other - one) % period >= length - 1e-6 or (other - one) % period < 1e-6 > length
    for s in range(placement.num_stages):
        assert keys.backward[s][0] >= keys.forward[s][0] + problem.forward[s] - 1e-9
        assert keys.weight[s][0] >= keys.backward[s][0] + problem.backward[s] - 1e-9


def test_modulo_schedules_are_found_for_equal_costs_without_a_gap():
    problem = Dispatcher(Costs.uniform(8, activation_bytes=1.0, pending_bytes=1.0), place("v", 4, 2), 32)
    found = problem.run(modulo(problem, (1.0, 1.0, 1.0, 1.0)), Manner(strict=True), [4.0] * 4)
    # Half of 1F1B's activations (8 in these units), and still faster than its 210.
    assert (found.seconds, found.peak_bytes) == (203.0, 4.0)


@given(seed=st.integers(0, 50))
@few
def test_local_search_never_falls_behind_and_repeats_itself(seed):
    costs = Costs.uniform(8, 1.0, 1.2, 0.8, exchange_forward=0.3, exchange_backward=0.3, activation_bytes=1.0, pending_bytes=0.5, hop_latency=0.05)
    problem, caps = Dispatcher(costs, place("v", 4, 2), 12), [9.0] * 4
    start = problem.run(by_rule(problem, True, True), Manner(), caps)
    one, two = (improve(problem, start, caps, random.Random(seed), 60) for _ in range(2))
    assert one.score <= start.score
    assert one == two


@pytest.mark.slow
@given(data=st.data(), ranks=st.integers(1, 3), more=st.integers(0, 4))
@few
def test_a_search_keeps_its_promises(data, ranks, more):
    count = 2 * ranks + more
    regions = data.draw(costs_of(count))
    plans = known_plans(regions, ranks, 6)
    cap = data.draw(st.sampled_from([None, *(plan.peak_bytes for plan in plans)]))
    told = []
    plan = search(regions, ranks, 6, cap, 60.0, told.append, layouts=(*LAYOUTS, BOTH_WAYS) if ranks % 2 == 0 else LAYOUTS, rounds=2)
    prove(plan.schedule, plan.placement, plan.num_microbatches)
    assert cap is None or plan.peak_bytes <= cap * (1 + 1e-9)
    allowed = [p for p in known_plans(regions, ranks, 6, cap) if p.placement.style != "bidirectional"]
    assert all(plan.step_seconds <= p.step_seconds + 1e-9 for p in allowed)
    assert plan.gap >= -1e-9
    assert plan.costs == regions.for_microbatches(6).joined(plan.partition)
    if plan.placement.style != "bidirectional":
        assert plan.step_seconds >= partition_bound(regions.for_microbatches(6), ranks, 6) - 1e-9
    assert told and told == sorted(told, key=lambda p: p.elapsed_seconds)
    assert all(later.step_seconds <= earlier.step_seconds for earlier, later in zip(told, told[1:], strict=False))


def test_a_search_with_rounds_repeats_itself():
    regions = Costs.uniform(9, 1.0, 1.3, 0.7, activation_bytes=1.0, pending_bytes=1.0, microbatches=8)
    one, two = (search(regions, 3, 8, seconds=120.0, rounds=3, seed=7) for _ in range(2))
    assert one == two


def test_a_search_chooses_the_number_of_microbatches():
    # Twice as many halve the bubble but double the launches: with cheap launches more is better, with dear ones fewer.
    for launch, expected in ((0.0, 16), (0.9, 4)):
        regions = Costs.uniform(4, 4.0, 4.0, 4.0, launch_seconds=4.0 * launch, activation_bytes=1.0, pending_bytes=1.0, microbatches=4)
        assert search(regions, 4, (4, 16), seconds=60.0, layouts=(("loop", 1),), rounds=1).num_microbatches == expected


@pytest.mark.parametrize("weights", [[1.6 if n == 3 else 1.0 for n in range(10)], [1.6 if n % 2 else 1.0 for n in range(10)]])
def test_uneven_regions_are_at_least_as_fast_as_zbv_on_the_planners_own_partition(weights):
    weights = tuple(weights)
    regions = Costs(weights, weights, weights, activation_bytes=weights, pending_bytes=weights, microbatches=16)
    plan = search(regions, 4, 16, seconds=60.0, rounds=2)
    rivals = {p.name: p.step_seconds for p in known_plans(regions, 4, 16)}
    even = {p.name: p.step_seconds for p in known_plans(regions, 4, 16, None, lambda parts: even_bounds(10, parts))}
    assert plan.step_seconds <= rivals["ZBVZeroBubble"] + 1e-9
    assert min(even[name] for name in RIVALS) / plan.step_seconds > 1.1


def test_both_ways_share_a_dear_region_between_two_ranks():
    weights = tuple(1.6 if n == 3 else 1.0 for n in range(10))
    regions = Costs(weights, weights, weights, activation_bytes=weights, pending_bytes=weights, microbatches=32)
    even = min(p.step_seconds for p in known_plans(regions, 4, 32, None, lambda parts: even_bounds(10, parts)) if p.name in RIVALS)
    both = search(regions, 4, 32, seconds=60.0, layouts=(BOTH_WAYS,), rounds=2)
    assert even / both.step_seconds >= 1.2


def test_an_all_to_all_is_hidden_at_least_as_well_as_by_dualpipev():
    costs = Costs.uniform(8, activation_bytes=1.0, pending_bytes=1.0, exchange_forward=0.4, exchange_backward=0.4, microbatches=16)
    schedule, placement = known("DualPipeV", 4, 16)
    rival = simulate(schedule, costs, placement)
    plan = search(costs, 4, 16, max(rival.peak_bytes), 60.0, layouts=(("v", 2),), rounds=2)
    assert plan.step_seconds <= rival.step_seconds
    assert any(action.sub_actions for row in plan.schedule.values() for action in row)


@pytest.mark.parametrize("ranks", [2, 4])
def test_close_to_the_bound_with_hops_and_unequal_halves(ranks):
    costs = Costs.uniform(2 * ranks, 1.0, 1.2, 0.8, activation_bytes=1.0, pending_bytes=1.0, hop_latency=0.05, microbatches=32)
    plan = search(costs, ranks, 32, 2 * ranks + 1, 60.0, layouts=(("v", 2),), rounds=1)
    assert plan.gap <= 0.03


@pytest.mark.parametrize("ranks", [4, 8])
def test_half_the_activations_of_1f1b_are_enough_to_be_as_fast(ranks):
    schedule, placement = known("1F1B", ranks, 32)
    usual = simulate(schedule, Costs.uniform(ranks, 2.0, 2.0, 2.0, activation_bytes=2.0), placement)
    costs = Costs.uniform(2 * ranks, activation_bytes=1.0, pending_bytes=1.0, microbatches=32)
    plan = search(costs, ranks, 32, max(usual.peak_bytes) / 2, 60.0, layouts=(("v", 2),), rounds=0)
    assert plan.peak_bytes <= max(usual.peak_bytes) / 2
    assert plan.step_seconds <= 1.1 * usual.step_seconds


@given(data=st.data(), ranks=st.integers(1, 4), more=st.integers(0, 4))
def test_the_least_cap_is_the_least(data, ranks, more):
    regions = data.draw(costs_of(ranks + more, exchange=False))
    with pytest.raises(FtcError, match="at least .* are needed, by rank") as caught:
        search(regions, ranks, 2, memory_cap=1e-9, seconds=5.0, layouts=(("loop", 1),), rounds=0)
    placement = place("loop", ranks)
    scaled = regions.for_microbatches(2)
    all_bounds = itertools.combinations(range(1, ranks + more), ranks - 1)
    least = min(max(least_bytes(scaled.joined(bounds), placement)) for bounds in all_bounds)
    # The message has whole bytes.
    assert f"at least {math.ceil(round(least, 9)):,} are needed" in str(caught.value)


def test_the_least_cap_is_enough():
    regions = Costs.uniform(6, activation_bytes=3.0, pending_bytes=5.0, fixed_bytes=7.0, microbatches=4)
    with pytest.raises(FtcError, match="at least 20 are needed, by rank 0"):
        search(regions, 3, 4, memory_cap=19.0, seconds=30.0, layouts=(("v", 2),), rounds=0)
    plan = search(regions, 3, 4, memory_cap=20.0, seconds=30.0, layouts=(("v", 2),), rounds=0)
    assert plan.peak_bytes == 20.0
    # What W needs would not fit beside it: every backward is a full one.
    assert {action.computation_type.value for row in plan.schedule.values() for action in row} == {"F", "B"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: search(Costs.uniform(3), 4, 8), "3 regions on 4 ranks"),
        (lambda: search(Costs.uniform(5), 4, 8, layouts=(("v", 2),)), "5 regions on 4 ranks with 2 stages each"),
        (lambda: search(Costs.uniform(4), 0, 8), "0 ranks"),
        (lambda: search(Costs.uniform(4), 4, 0), "microbatches"),
        (lambda: search(Costs.uniform(4), 4, ()), "microbatches"),
        (lambda: search(Costs.uniform(4), 4, 8, seconds=0.0), "seconds"),
        (lambda: search(Costs.uniform(8), 3, 8, layouts=(BOTH_WAYS,)), "even number of ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call, words):
    with pytest.raises(FtcError, match=words):
        call()


@given(data=st.data(), count=st.integers(4, 12))
def test_candidates_begin_with_a_bound_no_higher_than_the_exact_balance(data, count):
    regions = data.draw(costs_of(count, memory=False))
    found = candidates(regions, 2, 8, None, (("v", 2),))
    seconds = [regions.work(part) + regions.exchange(part) for part in range(count)]
    exact = partition(seconds, 4, placement="v")
    assert found[0].bound_seconds <= next(one.bound_seconds for one in found if one.bounds == exact) + 1e-12
    assert even_bounds(count, 4) in [one.bounds for one in found]
    assert [one.bound_seconds for one in found] == sorted(one.bound_seconds for one in found)


def test_there_are_keys_of_every_kind_for_every_problem():
    plain = Dispatcher(Costs.uniform(4), place("v", 2, 2), 4)
    paired = Dispatcher(Costs.uniform(4, exchange_forward=0.4), place("v", 2, 2), 4)
    assert not any(flag for keys, _ in all_keys(plain) for row in keys.pairs_forward for flag in row)
    assert {flag for keys, _ in all_keys(paired) for row in keys.pairs_forward for flag in row} == {0, 1, 2}
