"""The search for a schedule: layouts and partitions, the known schedules on each, list scheduling from many keys, then local search.

1. `layouts.candidates`: placements, stages a rank, partitions and numbers of microbatches, by the lower bound of their step.
2. On each: every known schedule that fits, and list scheduling from `seeds.all_keys` and from the known ones' times.
3. Rounds of local search (`improve`), mostly on the best candidate so far, some on those close behind; a candidate whose lower bound is no better than what
   is found already is left alone.

Whatever is found is simulated and proven again from its actions. Nothing is returned that is slower than a known schedule which fits
the memory cap on the same candidates.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from ftc.errors import FtcError
from ftc.plan.actions import Schedule
from ftc.plan.bound import step_bound
from ftc.plan.costs import Costs
from ftc.plan.dispatch import Dispatched, Dispatcher, Keys, Manner
from ftc.plan.fuse import full_backwards, fuse
from ftc.plan.improve import improve
from ftc.plan.known import NAMES, fits, known
from ftc.plan.layouts import LAYOUTS, Candidate, Layout, candidate, candidates, least_bytes, least_memory, parts_of
from ftc.plan.plans import Plan, Progress
from ftc.plan.prove import prove
from ftc.plan.seeds import all_keys, from_times
from ftc.plan.simulate import simulate

SEED_SHARE = 0.35  # of the time for step 2
TRIES = 100  # steps of local search in a round
CLOSE = 1.03  # candidates this much behind the best are still improved


def search(
    region_costs: Costs,
    ranks: int,
    microbatches: int | Sequence[int],
    memory_cap: float | None = None,
    seconds: float = 30.0,
    tell: Callable[[Progress], None] | None = None,
    *,
    layouts: Sequence[Layout] = LAYOUTS,
    seed: int = 0,
    rounds: int | None = None,
) -> Plan:
    """The fastest plan found in `seconds` for a model of L regions on `ranks` ranks; its name is "searched", whatever it came from.

    region_costs: of the L regions, embedding and head included in the first and last (`Costs.with_ends`); for one number of microbatches,
        from which those of the others follow (`Costs.for_microbatches`).
    microbatches: their number in a step, or several of which one is chosen.
    memory_cap: bytes a rank may hold at any time; without one, no more than the known schedules take on the same stages. Of schedules
        that are equally fast the one that holds less is kept (`_Track.trim`).
    tell: called with `Progress` twice a second or more often.
    rounds: end after so many rounds of local search. With it and enough `seconds` the result depends on nothing but the arguments.

    Raises FtcError where ranks, regions or microbatches do not fit, and where the memory cap is below the possible (with the least that would
    do, and the rank that needs it).
    """
    started = time.monotonic()
    numbers = (microbatches,) if isinstance(microbatches, int) else tuple(microbatches)
    _check(ranks, numbers, seconds)
    found = [one for number in numbers for one in candidates(region_costs, ranks, number, memory_cap, layouts)]
    if not found:
        _refuse(region_costs, ranks, numbers, memory_cap, layouts)
    tracks = [_Track(one, memory_cap) for one in sorted(found, key=lambda one: one.bound_seconds)]
    state = _Search(tracks, started, seconds, tell)
    state.seed()
    state.climb(seed, rounds)
    return state.best_plan(memory_cap)


def known_plans(
    region_costs: Costs, ranks: int, num_microbatches: int, memory_cap: float | None = None, bounds: Callable[[int], Sequence[int]] | None = None
) -> list[Plan]:
    """A plan for every known schedule that fits the numbers and the memory cap, fastest first.

    `bounds` gives the partition for a number of stages (such as `layouts.even_bounds`); without it each schedule gets the best by its bound.
    """
    plans = []
    for name in NAMES:
        if not fits(name, ranks, num_microbatches):
            continue
        schedule, placement = known(name, ranks, num_microbatches)
        parts = len(placement.chains[0])
        if parts > len(region_costs):
            continue
        if bounds is not None:
            choices = [candidate(region_costs, bounds(parts), placement, num_microbatches)]
        else:
            layout = (placement.style, placement.num_stages // ranks)
            choices = candidates(region_costs, ranks, num_microbatches, memory_cap, (layout,))
        made = [_plan(name, schedule, one) for one in choices]
        made = [plan for plan in made if memory_cap is None or plan.peak_bytes <= memory_cap]
        plans += [min(made, key=_rank)] if made else []
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[float, float]:
    return round(plan.step_seconds, 9), plan.peak_bytes


def _plan(name: str, schedule: Schedule, one: Candidate) -> Plan:
    result = simulate(schedule, one.costs, one.placement)
    return Plan(name, schedule, one.placement, one.bounds, one.num_microbatches, one.costs, result, one.bound_seconds)


def _check(ranks: int, numbers: tuple[int, ...], seconds: float) -> None:
    if ranks < 1:
        raise FtcError(f"{ranks} ranks: at least 1")
    if not numbers or min(numbers) < 1:
        raise FtcError(f"microbatches {list(numbers)}: at least one number, and each at least 1")
    if not seconds > 0:
        raise FtcError(f"{seconds} seconds for the search: more than 0")


def _refuse(regions: Costs, ranks: int, numbers: tuple[int, ...], memory_cap: float | None, layouts: Sequence[Layout]) -> None:
    usable = [layout for layout in layouts if parts_of(layout, ranks) <= len(regions)]
    if not usable:
        raise FtcError(f"{len(regions)} regions on {ranks} ranks with {min(each for _, each in layouts)} stages each: every stage needs a region")
    scaled = regions.for_microbatches(max(numbers))
    needed, rank, bounds = least_memory(scaled, ranks, usable)
    raise FtcError(
        f"memory cap {memory_cap:,.0f} bytes a rank: at least {math.ceil(needed):,} are needed, by rank {rank}, with {max(numbers)} microbatches and the "
        f"regions cut at {list(bounds)} (what is fixed, and one microbatch)"
    )


@dataclass
class _Track:
    """One candidate and the best that is known for it."""

    candidate: Candidate
    memory_cap: float | None
    best: Dispatched | None = None
    known: Plan | None = None
    problem: Dispatcher = field(init=False)

    def __post_init__(self) -> None:
        one, costs = self.candidate, self.candidate.costs
        schedules = self._known_here()
        if self.memory_cap is None and schedules:
            cap = max(max(simulate(schedule, costs, one.placement).peak_bytes) for _, schedule in schedules)
        else:
            cap = math.inf if self.memory_cap is None else self.memory_cap
        self.caps = [cap] * one.placement.num_ranks
        larger = [max(kept, pending) for kept, pending in zip(costs.activation_bytes, costs.pending_bytes, strict=True)]
        # Where W's bytes do not fit beside the rest, every backward is a full one: W is part of I, and nothing is pending.
        self.whole = max(least_bytes(replace(costs, activation_bytes=tuple(larger)), one.placement)) > cap
        if self.whole:
            both = tuple(i + w for i, w in zip(costs.backward_input, costs.backward_weight, strict=True))
            costs = replace(costs, backward_input=both, backward_weight=(0.0,) * len(costs), pending_bytes=())
        self.problem = Dispatcher(costs, one.placement, one.num_microbatches)

    @property
    def seconds(self) -> float:
        return min(self.best.seconds if self.best else math.inf, self.known.step_seconds if self.known else math.inf)

    def consider(self, found: Dispatched | None) -> None:
        if found is not None and (self.best is None or found.score < self.best.score):
            self.best = found

    def _known_here(self) -> list[tuple[str, Schedule]]:
        """The known schedules of this placement and number of microbatches."""
        one = self.candidate
        ranks, each = one.placement.num_ranks, one.placement.num_stages // one.placement.num_ranks
        made = [(name, *known(name, ranks, one.num_microbatches, each)) for name in NAMES if fits(name, ranks, one.num_microbatches, each)]
        return [(name, schedule) for name, schedule, placement in made if placement == one.placement]

    def known_keys(self) -> Iterator[tuple[Keys, Manner]]:
        """Each known schedule on these stages: taken as a plan where it fits the cap, and as keys in any case."""
        for name, schedule in self._known_here():
            plan = _plan(name, schedule, self.candidate)
            if (self.memory_cap is None or plan.peak_bytes <= self.memory_cap) and (self.known is None or _rank(plan) < _rank(self.known)):
                self.known = plan
            keys = from_times(self.problem, plan.result)
            yield from ((keys, manner) for manner in (Manner(strict=True), Manner(math.inf), Manner(self.unit), Manner()))

    def trim(self, late: Callable[[], bool]) -> None:
        """Lower the most bytes of any rank as far as the step stays as short, by bisection, until it is `late`; the same keys under a lower cap."""
        if self.best is None:
            return
        low, limit = max(self.problem.fixed), self.best.seconds * (1 + 1e-9)
        for _ in range(8):
            if late():
                return
            middle = (low + self.best.peak_bytes) / 2
            runs = (
                self.problem.run(self.best.keys, manner, [middle] * len(self.caps), limit)
                for manner in (Manner(strict=True), Manner(math.inf), Manner(self.unit), Manner())
            )
            found = next((run for run in runs if run is not None), None)
            if found is None:
                low = middle
            else:
                self.best = found

    @property
    def unit(self) -> float:
        return min(self.problem.forward)

    def plan(self) -> Plan:
        """The better of both, with full backwards where they cost nothing."""
        if self.best is None:
            return self.known
        one = self.candidate
        schedule = self.best.schedule()
        schedule = full_backwards(schedule) if self.whole else fuse(schedule, one.costs, one.placement)
        plan = _plan("searched", schedule, one)
        return plan if self.known is None or _rank(plan) <= _rank(self.known) else self.known


@dataclass
class _Search:
    tracks: list[_Track]
    started: float
    seconds: float
    tell: Callable[[Progress], None] | None
    tried: int = 0
    told: float = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def leader(self) -> _Track:
        return min(self.tracks, key=lambda track: track.seconds)

    def count(self) -> None:
        """One more schedule tried; `tell` hears at least twice a second."""
        self.tried += 1
        if self.elapsed() - self.told > 0.5:
            self.report()

    def report(self) -> None:
        leader, self.told = self.leader, self.elapsed()
        if self.tell is not None and leader.seconds < math.inf:
            peak = leader.best.peak_bytes if leader.best else leader.known.peak_bytes
            self.tell(Progress(self.elapsed(), self.seconds, self.tried, leader.seconds, peak, leader.seconds / leader.candidate.bound_seconds - 1))

    def seed(self) -> None:
        """Keys of all kinds on every candidate, the promising first; the known ones and one rule in any case, so that there is a plan."""
        begun = self.elapsed()
        whole = max(self.seconds - begun, 0.0) * SEED_SHARE
        for number, track in enumerate(self.tracks):
            if self.leader.seconds <= track.candidate.bound_seconds * (1 + 1e-9):
                continue
            until = begun + whole * (1 - 0.5 ** (number + 1))  # each has half of what is left
            for keys, manner in chain(track.known_keys(), all_keys(track.problem)):
                if self.elapsed() > until and (track.best is not None or (number and self.elapsed() > self.seconds)):
                    break
                track.consider(track.problem.run(keys, manner, track.caps, limit=1.2 * track.seconds))
                self.count()
            self.report()

    def climb(self, seed: int, rounds: int | None) -> None:
        """Rounds of local search; the turns go to the first, second, ... best candidate in the proportions of `turns`."""
        turns = (0, 0, 1, 0, 0, 2, 0, 1, 0, 3)
        number = 0
        while self.elapsed() < self.seconds and (rounds is None or number < rounds):
            best = self.leader.seconds
            open_tracks = [
                track
                for track in sorted(self.tracks, key=lambda track: track.seconds)
                if track.best is not None and track.candidate.bound_seconds * (1 + 1e-9) < best and track.seconds <= best * CLOSE
            ]
            if not open_tracks:
                break
            track = open_tracks[turns[number % len(turns)] % len(open_tracks)]
            rng = random.Random(f"{seed} {number}")
            track.consider(improve(track.problem, track.best, track.caps, rng, TRIES, self._stop))
            number += 1
            self.report()

    def _stop(self, best: Dispatched, tried: int) -> bool:
        self.count()
        return self.elapsed() >= self.seconds

    def best_plan(self, memory_cap: float | None) -> Plan:
        equal = [track for track in self.tracks if track.seconds <= self.leader.seconds * (1 + 1e-9)]
        for track in equal:
            track.trim(lambda: self.elapsed() > 1.1 * self.seconds)
        plans = [track.plan() for track in equal]
        best = min(plans, key=_rank)
        prove(best.schedule, best.placement, best.num_microbatches)
        if memory_cap is not None and best.peak_bytes > memory_cap * (1 + 1e-9):
            raise AssertionError(f"{best.peak_bytes} > {memory_cap}")
        return replace(best, name="searched", bound_seconds=step_bound(best.costs, best.placement, best.num_microbatches, memory_cap))
