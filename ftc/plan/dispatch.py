"""List scheduling: one pass over time in which every rank that is free takes, of what it could do, the action with the smallest key.

Every F, I and W has a key, a number on the scale of seconds: when it is wanted. Keys may be the start times of another schedule, a rule
("input gradients first, late stages before early ones") or a periodic pattern; see `seeds`. Within one stage each kind goes
in the order of microbatches, so a rank chooses among at most three actions a stage.

    smallest key here already             it starts
    smallest key to come within `wait`    the rank waits, with a W meanwhile where one fits
    else                                  the smallest key of those that are here

A forward starts only where its activations fit under the rank's cap together with those of one microbatch on the rank's later stages.
So the oldest microbatch can always go on: what is in its way belongs to older ones, which are done, or to W, which wait for nobody.
A strict pass leaves no such room, as its order may need none; it may then lead nowhere.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.pipelining.schedules import _Action

from ftc.plan.actions import B, F, I, Placement, Schedule, W, pair
from ftc.plan.costs import Costs

ALONE, PAIR_FULL, PAIR_INPUT = 0, 1, 2  # how an F (or I) is wanted: alone, in a pair of F and B, in a pair of F and I
_F, _I, _W, _PAIR_FULL, _PAIR_INPUT = range(5)
Rows = list[list[float]]  # one number for each stage and microbatch


@dataclass(frozen=True)
class Keys:
    """Wanted times of F, I and W, `[stage][microbatch]`, and how F and I are wanted (`ALONE`, `PAIR_FULL`, `PAIR_INPUT`)."""

    forward: Rows
    backward: Rows
    weight: Rows
    pairs_forward: list[list[int]]
    pairs_backward: list[list[int]]

    def copy(self) -> Keys:
        return Keys(*([list(row) for row in rows] for rows in self._all()))

    def _all(self) -> tuple[list, ...]:
        return self.forward, self.backward, self.weight, self.pairs_forward, self.pairs_backward


@dataclass(frozen=True)
class Manner:
    """How a dispatch follows its keys: how long (seconds) a rank waits for the smallest key, and for the other half of a wanted pair."""

    wait: float = 0.0
    pair_wait: float = math.inf
    eager_pairs: bool = False  # pair whatever F and I are there together, wanted or not
    strict: bool = False  # the keys' order and nothing else: wait for the smallest key as long as it takes, without a W meanwhile


@dataclass(frozen=True)
class Dispatched:
    """One schedule: seconds of the step, the most bytes of any rank, mean of the ranks' ends, its steps and its start times as keys."""

    seconds: float
    peak_bytes: float
    mean_end: float
    steps: list[list[tuple[int, ...]]]
    keys: Keys

    @property
    def score(self) -> tuple[float, float, float]:
        """Smaller is better; rounded, so that sums of floating point numbers in another order compare equal."""
        return round(self.seconds, 9), round(self.mean_end, 9), self.peak_bytes

    def schedule(self) -> Schedule:
        """As torch's actions."""
        single = {_F: F, _I: I, _W: W}

        def action(step: tuple[int, ...]) -> _Action:
            if step[0] in single:
                return _Action(step[1], single[step[0]], step[2])
            return pair(_Action(step[1], F, step[2]), _Action(step[3], B if step[0] == _PAIR_FULL else I, step[4]))

        return {rank: [action(step) for step in steps] for rank, steps in enumerate(self.steps)}


class Dispatcher:
    """The costs, placement and sizes of one problem, laid out for many passes.

    `count` microbatches pass each stage, and inside they are numbered from 0 on every stage (with two chains the second half of them too).
    """

    def __init__(self, costs: Costs, placement: Placement, num_microbatches: int) -> None:
        stages, ranks = range(placement.num_stages), range(placement.num_ranks)
        at = [placement.position(s) for s in stages]
        self.placement, self.at = placement, at
        passing = [placement.microbatches(s, num_microbatches) for s in stages]
        self.count, self.offset = len(passing[0]), [numbers.start for numbers in passing]
        self.local = [sorted(placement.stages_of(rank), reverse=True) for rank in ranks]
        self.forward = [costs.forward[p] + costs.exchange_forward[p] for p in at]
        self.backward = [costs.backward_input[p] + costs.exchange_backward[p] for p in at]
        self.weight = [costs.backward_weight[p] for p in at]
        nearby = [placement.following[s] is None or placement.ranks[s] == placement.ranks[s + 1] for s in stages]
        self.hop = [0.0 if near else costs.hop(p) for p, near in zip(at, nearby, strict=True)]
        self.fixed = [sum(costs.fixed_bytes[at[s]] for s in self.local[rank]) for rank in ranks]
        # Room is kept for the larger of both from the start, as nothing could be done about it when an I ends.
        self.kept = [max(costs.activation_bytes[p], costs.pending_bytes[p]) for p in at]
        self.pending = [costs.pending_bytes[p] for p in at]
        # Two chains leave each other room for one microbatch, and the first of a chain on a rank may take what is left for it.
        self.two_ways = len(placement.chains) == 2
        self.needed = [sum(self.kept[o] for o in self.local[placement.ranks[s]] if o >= s or self.two_ways) for s in stages]
        self.pair_seconds = {
            (kind, s, o): costs.pair_seconds(at[s], at[o], full=kind == _PAIR_FULL)
            for kind in (_PAIR_FULL, _PAIR_INPUT)
            for s in stages
            for o in self.local[placement.ranks[s]]
        }
        self.pairing = any(costs.exchange(p) > 0 for p in at)

    def run(self, keys: Keys, manner: Manner, caps: Sequence[float], limit: float = math.inf) -> Dispatched | None:
        """One pass; None where it passes `limit` seconds, or where waiting for pairs leads nowhere. `caps`: bytes of each rank."""
        return _Pass(self, keys, manner, caps).run(limit)


class _Pass:
    def __init__(self, problem: Dispatcher, keys: Keys, manner: Manner, caps: Sequence[float]) -> None:
        count, stages, ranks = problem.count, problem.placement.num_stages, problem.placement.num_ranks
        self.problem, self.keys, self.manner = problem, keys, manner
        self.caps = [cap * (1 + 1e-12) for cap in caps]
        never = math.inf
        # One more than there are microbatches: a stage's next one is looked at before it is known that there is none.
        self.inputs = [[0.0 if before is None else never] * count + [never] for before in problem.placement.previous]
        self.gradients = [[never] * (count + 1) for _ in range(stages)]
        self.forwards, self.backwards, self.weights = [0] * stages, [0] * stages, [0] * stages  # how many have started
        self.waiting: list[list[int]] = [[] for _ in range(stages)]  # microbatches whose W came or comes by itself, in the order of their I
        self.free, self.held, self.change = [0.0] * ranks, list(problem.fixed), [0.0] * ranks
        self.peak = max(problem.fixed)
        self.steps: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
        self.left = [3 * count * len(local) for local in problem.local]
        self.events = [(0.0, rank) for rank in range(ranks)]
        rows = [[[0.0] * count for _ in range(stages)] for _ in range(3)]
        flags = [[[ALONE] * count for _ in range(stages)] for _ in range(2)]
        self.made = Keys(*rows, *flags)

    def run(self, limit: float) -> Dispatched | None:
        pop, push, free, left, held, change = heapq.heappop, heapq.heappush, self.free, self.left, self.held, self.change
        events, choose = self.events, self._paired if self.problem.pairing else self._choose
        while events:
            now, rank = pop(events)
            if now < free[rank] or not left[rank]:
                continue
            if change[rank]:
                held[rank] += change[rank]
                change[rank] = 0.0
            kind, stage, other, until = choose(now, rank)
            if kind < 0:
                if until < math.inf:
                    push(events, (until, rank))
                continue
            end = self._begin(now, rank, kind, stage, other)
            if end > limit:
                return None
            push(events, (end, rank))
        if any(left):
            return None
        return Dispatched(max(free), self.peak, sum(free) / len(free), self.steps, self.made)

    def _choose(self, now: float, rank: int) -> tuple[int, int, int, float]:
        """(kind, stage, -1, _) of what the rank does now, or (-1, -1, -1, when to look again)."""
        problem, keys = self.problem, self.keys
        never = math.inf
        room, local = self.caps[rank] - self.held[rank], problem.local[rank]
        best = here = weight_key = next_time = never
        best_kind = here_kind = stage = here_stage = weight_stage = -1
        when, strict = 0.0, self.manner.strict
        for s in local:
            m = self.backwards[s]
            if m < self.forwards[s]:
                arrival = self.gradients[s][m]
                if arrival < never or strict:
                    key = keys.backward[s][m]
                    if arrival <= now:
                        if key < here:
                            here, here_kind, here_stage = key, _I, s
                    elif arrival < next_time:
                        next_time = arrival
                    if key < best:
                        best, best_kind, stage, when = key, _I, s, arrival
            n, waiting = self.weights[s], self.waiting[s]
            if n < len(waiting) and keys.weight[s][waiting[n]] < weight_key:
                weight_key, weight_stage = keys.weight[s][waiting[n]], s
            m = self.forwards[s]
            arrival = self.inputs[s][m]
            if m < problem.count and (arrival < never or strict) and self._fits(s, room):
                key = keys.forward[s][m]
                if arrival <= now:
                    if key < here:
                        here, here_kind, here_stage = key, _F, s
                elif arrival < next_time:
                    next_time = arrival
                if key < best:
                    best, best_kind, stage, when = key, _F, s, arrival
        if weight_stage >= 0 and weight_key < best:
            return _W, weight_stage, -1, now
        if best_kind >= 0 and when <= now:
            return best_kind, stage, -1, now
        if best_kind >= 0 and (strict or when - now <= self.manner.wait):
            return self._meanwhile(now, rank, when)
        if here_kind >= 0 and here <= weight_key:
            return here_kind, here_stage, -1, now
        if weight_stage >= 0:
            return _W, weight_stage, -1, now
        return -1, -1, -1, next_time

    def _fits(self, stage: int, room: float) -> bool:
        """Whether a forward may start with that much room."""
        problem = self.problem
        if problem.needed[stage] <= room or (self.manner.strict and problem.kept[stage] <= room):
            return True
        return problem.two_ways and problem.kept[stage] <= room and self.forwards[stage] == self.backwards[stage]

    def _meanwhile(self, now: float, rank: int, until: float) -> tuple[int, int, int, float]:
        """A W that ends before `until`, or nothing until then."""
        for s in () if self.manner.strict else self.problem.local[rank]:
            if self.weights[s] < len(self.waiting[s]) and now + self.problem.weight[s] <= until:
                return _W, s, -1, now
        return -1, -1, -1, until

    def _paired(self, now: float, rank: int) -> tuple[int, int, int, float]:
        """`_choose`, then the other half where a pair is wanted: here, soon enough to wait for, or not to be had."""
        kind, stage, _, until = choice = self._choose(now, rank)
        if kind not in (_F, _I):
            return choice
        at = self.forwards[stage] if kind == _F else self.backwards[stage]
        wanted = (self.keys.pairs_forward if kind == _F else self.keys.pairs_backward)[stage][at]
        if not wanted and not self.manner.eager_pairs:
            return choice
        pair_kind = _PAIR_INPUT if wanted == PAIR_INPUT else _PAIR_FULL
        arrival, other = self._partner(rank, kind, stage, pair_kind)
        if arrival <= now:
            return (pair_kind, stage, other, now) if kind == _F else (pair_kind, other, stage, now)
        if wanted and (self.manner.strict or (arrival < math.inf and arrival - now <= self.manner.pair_wait)):
            return self._meanwhile(now, rank, arrival)
        return choice

    def _partner(self, rank: int, kind: int, stage: int, pair_kind: int) -> tuple[float, int]:
        """When the other half that is wanted first is here, and its stage."""
        problem, best, found = self.problem, math.inf, (math.inf, -1)
        room = self.caps[rank] - self.held[rank]
        # What the backward of a pair frees counts for the room that the forward has to leave, but not while the pair runs.
        freed = problem.kept[stage] - (problem.pending[stage] if pair_kind == _PAIR_INPUT else 0.0)
        for s in problem.local[rank]:
            if kind == _F and self.backwards[s] < self.forwards[s]:
                m = self.backwards[s]
                arrival, key = self.gradients[s][m], self.keys.backward[s][m]
            elif kind == _I and problem.kept[s] <= room and problem.needed[s] - freed <= room and self.forwards[s] < problem.count:
                m = self.forwards[s]
                arrival, key = self.inputs[s][m], self.keys.forward[s][m]
            else:
                continue
            if key < best:
                best, found = key, (arrival, s)
        return found

    def _begin(self, now: float, rank: int, kind: int, stage: int, other: int) -> float:
        """Start an action; its end. `stage` is the forward's of a pair and `other` the backward's."""
        problem = self.problem
        if kind == _W:
            m = self.waiting[stage][self.weights[stage]]
            self.weights[stage] += 1
            self.steps[rank].append((_W, stage, m + problem.offset[stage]))
            self.made.weight[stage][m] = now
            self.left[rank] -= 1
            self.change[rank] = -problem.pending[stage]
            end = self.free[rank] = now + problem.weight[stage]
            return end
        if kind == _F:
            self.steps[rank].append((_F, stage, self.forwards[stage] + problem.offset[stage]))
            end = now + problem.forward[stage]
        elif kind == _I:
            self.steps[rank].append((_I, stage, self.backwards[stage] + problem.offset[stage]))
            end = now + problem.backward[stage]
        else:
            self._mark_pair(kind, rank, stage, other)
            end = now + problem.pair_seconds[kind, stage, other]
        self.free[rank] = end
        if kind != _I:
            self._forward(now, end, rank, stage)
        if kind != _F:
            self._backward(now, end, rank, stage if kind == _I else other, kind == _PAIR_FULL)
        return end

    def _mark_pair(self, kind: int, rank: int, stage: int, other: int) -> None:
        m, n, offset = self.forwards[stage], self.backwards[other], self.problem.offset
        self.steps[rank].append((kind, stage, m + offset[stage], other, n + offset[other]))
        self.made.pairs_forward[stage][m] = self.made.pairs_backward[other][n] = PAIR_FULL if kind == _PAIR_FULL else PAIR_INPUT

    def _forward(self, now: float, end: float, rank: int, stage: int) -> None:
        problem, m = self.problem, self.forwards[stage]
        self.forwards[stage] = m + 1
        self.made.forward[stage][m] = now
        self.left[rank] -= 1
        self.held[rank] += problem.kept[stage]
        if self.held[rank] > self.peak:
            self.peak = self.held[rank]
        if problem.placement.following[stage] is None:
            self.gradients[stage][m] = end
        else:
            self._deliver(self.inputs, stage + 1, m, end + problem.hop[stage], rank)

    def _backward(self, now: float, end: float, rank: int, stage: int, full: bool) -> None:
        problem, m = self.problem, self.backwards[stage]
        self.backwards[stage] = m + 1
        self.made.backward[stage][m] = now
        self.left[rank] -= 2 if full else 1
        self.change[rank] -= problem.kept[stage]
        if full:
            self.made.weight[stage][m] = now
        else:
            self.waiting[stage].append(m)
            self.change[rank] += problem.pending[stage]
        if problem.placement.previous[stage] is not None:
            self._deliver(self.gradients, stage - 1, m, end + problem.hop[stage - 1], rank)

    def _deliver(self, where: Rows, stage: int, microbatch: int, arrival: float, rank: int) -> None:
        """What arrives wakes the other rank, which may be waiting for it; a rank's own is there when the rank is free again."""
        where[stage][microbatch] = arrival
        target = self.problem.placement.ranks[stage]
        if target != rank:
            heapq.heappush(self.events, (max(arrival, self.free[target]), target))
