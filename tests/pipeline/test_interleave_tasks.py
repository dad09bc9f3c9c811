"""Orders of abstract tasks: topological, never worse than concatenation, never under the bound, within memory, the same every time."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleave_draws import problems, topological

from ftc.errors import FtcError
from ftc.pipeline.interleave_rules import RULES, late_waits, list_schedule, weave
from ftc.pipeline.interleave_search import search, split
from ftc.pipeline.interleave_tasks import COMPUTE, START, WAIT, Memory, Problem, Storage, Task

EPSILON = 1e-9


@settings(max_examples=80)
@given(problem=problems(), more=st.one_of(st.none(), st.integers(0, 20)))
def test_a_found_order_is_topological_no_worse_than_concatenation_and_above_the_bound(problem, more):
    found = search(problem, more)
    assert topological(problem, found.order)
    assert found.interleaved == problem.simulate(found.order)
    assert found.interleaved.seconds <= found.concatenated.seconds
    assert found.bound <= found.interleaved.seconds + EPSILON
    assert found.interleaved.exposed >= -EPSILON
    if more is not None:
        assert found.interleaved.peak_bytes <= found.concatenated.peak_bytes + more


@settings(max_examples=40)
@given(problem=problems(max_tasks=4))
def test_no_order_at_all_is_under_the_bound(problem):
    bound, count = problem.bound(), len(problem.tasks)
    if count > 8:
        return
    for order in itertools.permutations(range(count)):
        if topological(problem, order):
            assert problem.simulate(order).seconds >= bound - EPSILON


@settings(max_examples=60)
@given(problem=problems(), more=st.one_of(st.none(), st.integers(0, 20)))
def test_each_rule_gives_a_topological_order_within_memory_or_none(problem, more):
    limit = None if more is None else problem.simulate(range(len(problem.tasks))).peak_bytes + more
    for rule in RULES:
        order = list_schedule(problem, rule, limit)
        assert order is not None or limit is not None
        if order is not None:
            assert topological(problem, order)
            assert limit is None or problem.simulate(order).peak_bytes <= limit


@settings(max_examples=60)
@given(problem=problems())
def test_late_waits_take_no_longer(problem):
    order = list(range(len(problem.tasks)))
    later = late_waits(problem, order)
    assert topological(problem, later)
    assert problem.simulate(later).seconds <= problem.simulate(order).seconds + EPSILON


@settings(max_examples=60)
@given(problem=problems(), more=st.integers(0, 12))
def test_a_weave_keeps_each_sequence_and_the_limit_and_beats_both_concatenations(problem, more):
    first, second = split(problem, range(len(problem.tasks)), "lane 0")
    plain = [*first, *second]
    if not (first and second and topological(problem, plain)):
        return
    concatenated = problem.simulate(plain)
    order = weave(problem, first, second)
    assert topological(problem, order)
    assert [n for n in order if n in set(first)] == first and [n for n in order if n in set(second)] == second
    assert problem.simulate(order).seconds <= concatenated.seconds + EPSILON
    limited = weave(problem, first, second, concatenated.peak_bytes + more)
    assert limited is None or problem.simulate(limited).peak_bytes <= concatenated.peak_bytes + more


@given(problem=problems())
def test_the_same_problem_gives_the_same_order(problem):
    again = Problem(problem.tasks, problem.storages)
    assert search(problem, 5).order == search(again, 5).order


@given(problem=problems())
def test_memory_is_counted_as_a_plain_walk_counts_it(problem):
    """Live storages by definition: made or given, and not yet read by all their readers (or kept)."""
    order = list(range(len(problem.tasks)))
    memory, peak = Memory(problem), 0
    done: set[int] = set()
    for number in order:
        memory.run(number)
        during = 0
        for storage in problem.storages:
            made = storage.made_by is None or storage.made_by in done or storage.made_by == number
            readers = set(storage.read_by)
            over = bool(readers) and readers <= done or (not readers and storage.made_by is not None and storage.made_by in done)
            during += storage.size if made and (storage.kept or not over) else 0
        peak = max(peak, during)
        done.add(number)
    assert memory.peak == max(peak, sum(s.size for s in problem.storages if s.made_by is None))


def two_lanes(exchange: float) -> Problem:
    """Four products of 1 s in each lane, an exchange behind each of the first three."""
    tasks: list[Task] = []
    for lane in ("forward", "backward"):
        before: tuple[int, ...] = ()
        for step in range(4):
            tasks.append(Task(COMPUTE, 1.0, before, lane=lane))
            if step < 3:
                tasks.append(Task(START, exchange, (len(tasks) - 1,), "ranks", lane=lane))
                tasks.append(Task(WAIT, 0.0, (len(tasks) - 1,), start=len(tasks) - 1, lane=lane))
            before = (len(tasks) - 1,)
    return Problem(tuple(tasks))


@pytest.mark.parametrize("exchange", [0.25, 0.5, 1.0])
def test_exchanges_as_long_as_the_other_lanes_compute_are_hidden_whole(exchange):
    found = search(two_lanes(exchange), None)
    assert found.concatenated.exposed == pytest.approx(6 * exchange)
    assert found.interleaved.exposed <= EPSILON and found.hidden == 1


def test_longer_exchanges_leave_what_no_order_hides():
    """Six exchanges of 2 s on one channel, 1 s of compute before the first and behind the last: 14 s whatever the order."""
    problem = two_lanes(2.0)
    assert problem.bound() == 14.0 and search(problem, None).interleaved.seconds == 14.0


def test_memory_that_is_not_to_grow_forbids_what_would_hold_both_lanes():
    """Each lane holds 5 bytes over its exchange: together 10, one after the other 5."""
    tasks = [
        task
        for lane, first in (("a", 0), ("b", 4))
        for task in (
            Task(COMPUTE, 1.0, lane=lane),
            Task(START, 1.0, (first,), "ranks", lane=lane),
            Task(WAIT, 0.0, (first + 1,), start=first + 1, lane=lane),
            Task(COMPUTE, 1.0, (first, first + 2), lane=lane),
        )
    ]
    problem = Problem(tuple(tasks), (Storage(5, 0, (3,)), Storage(5, 4, (7,))))
    assert search(problem, 0).interleaved.peak_bytes == 5
    free = search(problem, None)
    assert free.interleaved.peak_bytes == 10 and free.interleaved.exposed < search(problem, 0).interleaved.exposed


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ((Task(COMPUTE, 1.0, (0,)),), "must be tasks before it"),
        ((Task(COMPUTE, -1.0),), "at least 0"),
        ((Task(START, 1.0),), "has a channel"),
        ((Task(COMPUTE, 1.0), Task(WAIT, 0.0, (0,), start=0)), "must be a start that it needs"),
    ],
)
def test_problems_that_cannot_be_are_errors(tasks, words):
    with pytest.raises(ValueError, match=words):
        Problem(tasks)


def test_less_memory_than_concatenation_is_an_error():
    with pytest.raises(FtcError, match="more_bytes -1 must be at least 0"):
        search(two_lanes(1.0), -1)
