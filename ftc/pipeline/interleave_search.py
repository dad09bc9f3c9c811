"""The best order that is found for a problem: never worse than concatenation, never more memory than allowed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ftc.errors import FtcError
from ftc.pipeline.interleave_rules import RULES, Rule, late_waits, list_schedule, weave
from ftc.pipeline.interleave_tasks import Problem, Timeline

TRIALS, TRIALS_LEAST, PLACED = 300, 50, 60_000  # of `climb`: at most, at least, and between these so many that about as many tasks are placed in all


@dataclass(frozen=True)
class Found:
    """An order, what it takes by the model, what concatenation takes, and a bound for both. `way`: how the order was found."""

    order: tuple[int, ...]
    way: str
    interleaved: Timeline
    concatenated: Timeline
    bound: float  # seconds
    limit_bytes: int

    @property
    def hidden(self) -> float:
        """The share of concatenation's exposed time that is gone, 0 where there was none."""
        before = self.concatenated.exposed
        return 1 - self.interleaved.exposed / before if before > 0 else 0.0


def search(problem: Problem, more_bytes: int | None = None) -> Found:
    """An order that keeps the processor waiting least, at a peak of memory of at most that of concatenation and `more_bytes` (None: any peak).

    Candidates: concatenation, list schedules by each rule, weaves of two lanes as they came and as the best of these have them, and list schedules by
    priorities that are changed a little at a time. The same problem always gives the same order, on every rank. FtcError for a negative `more_bytes`.
    """
    if more_bytes is not None and more_bytes < 0:
        raise FtcError(f"more_bytes {more_bytes} must be at least 0: concatenation itself is the least that is searched for")
    plain = tuple(range(len(problem.tasks)))
    concatenated = problem.simulate(plain)
    limit = None if more_bytes is None else concatenated.peak_bytes + more_bytes
    bound = problem.bound()
    best = Best(problem, limit, bound)
    best.offer(plain, "concatenated")
    lanes = list(dict.fromkeys(task.lane for task in problem.tasks if task.lane))
    for rule in RULES if concatenated.exposed > 0 else ():
        for tighter in _limits(limit, concatenated.peak_bytes):
            best.offer(list_schedule(problem, rule, tighter), rule.name)
    if len(lanes) == 2 and concatenated.exposed > 0:
        for _ in range(2):
            if best.done:
                break
            for order, name in [(plain, "as they came"), (best.order, best.way)]:
                first, second = split(problem, order, lanes[0])
                best.offer(weave(problem, first, second, limit), f"weave of lanes {name}")
    if not best.done and concatenated.exposed > 0:
        climb(problem, best, limit)
    return Found(tuple(best.order), best.way, best.timeline, concatenated, bound, limit if limit is not None else best.timeline.peak_bytes)


def climb(problem: Problem, best: Best, limit: int | None) -> None:
    """Offer list schedules whose priorities begin as the places in the best order and change in a few tasks at a time; changes that do not make
    it longer stay. The random numbers are the same every time, their number goes down with the size of the problem."""
    rng, count = random.Random(0), len(problem.tasks)
    movable = [n for n, task in enumerate(problem.tasks) if task.cost > 0]
    for patient in (False, True):
        rule = Rule(f"climbing{', patient' if patient else ''}", lambda _: (), patient)
        place = {number: i for i, number in enumerate(best.order)}
        priority = [-float(place[number]) for number in range(count)]
        now = best.timeline.seconds * 2
        for _ in range(max(TRIALS_LEAST, min(TRIALS, PLACED // count))):
            if best.done:
                return
            changed = list(priority)
            for number in rng.sample(movable, min(len(movable), rng.randint(1, 4))):
                changed[number] += rng.gauss(0, 1) * count / 8
            order = list_schedule(problem, rule, limit, changed)
            if order is None:
                continue
            seconds = problem.simulate(order).seconds
            if seconds <= now:
                priority, now = changed, seconds
                best.offer(order, rule.name)


def _limits(limit: int | None, least: int) -> list[int | None]:
    """Limits to try a rule under: a greedy choice may do better with less memory than it is allowed."""
    return [None] if limit is None else list(dict.fromkeys((limit, (limit + least) // 2, least)))


def split(problem: Problem, order: Sequence[int], lane: str) -> tuple[list[int], list[int]]:
    """An order in two: tasks of `lane` with those of none, and the others."""
    first = [n for n in order if problem.tasks[n].lane in (lane, None)]
    return first, [n for n in order if problem.tasks[n].lane not in (lane, None)]


class Best:
    """The best order offered so far: least time, then least memory."""

    def __init__(self, problem: Problem, limit: int | None, bound: float):
        self.problem, self.limit, self.bound = problem, limit, bound
        self.order: list[int] = []
        self.way, self.timeline = "", None

    def offer(self, order: Sequence[int] | None, way: str) -> None:
        if order is None:
            return
        for candidate in (list(order), late_waits(self.problem, order)):
            timeline = self.problem.simulate(candidate)
            if self.limit is not None and timeline.peak_bytes > self.limit:
                continue
            if self.timeline is None or (timeline.seconds, timeline.peak_bytes) < (self.timeline.seconds, self.timeline.peak_bytes):
                self.order, self.way, self.timeline = candidate, way, timeline

    @property
    def done(self) -> bool:
        """Whether what is left to find is not worth the search: a thousandth."""
        return self.timeline.seconds <= self.bound * 1.001
