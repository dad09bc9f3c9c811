"""Ways to find an order of tasks: list scheduling by several rules, and the best weave of two given sequences.

List scheduling (Graham 1969) takes at each step the ready task of the highest priority: a start at once, then what is computed, then what a finished
transfer lets go on; the processor waits for a transfer only when nothing else is ready. The rules differ in their priorities and in whether a
channel that is busy is given more.

`weave` keeps the order within each of two sequences and finds how to alternate between them: a table over (done of the first, done of the second), each
entry with the few best states that lead there. Its memory is the sum of the two sequences', so that a limit is kept exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ftc.pipeline.interleave_tasks import COMPUTE, START, WAIT, Memory, Problem

WIDTH = 3  # states kept for each entry of a weave's table
PIECES = 72  # of a lane in a weave: what is computed between two transfers is cut so that there are about as many


@dataclass(frozen=True)
class Rule:
    """A priority for computed tasks (larger first), and whether a start waits until its channel is free."""

    name: str
    priority: Callable[[Problem], Sequence[float]]
    patient: bool = False


def _tails(problem: Problem) -> Sequence[float]:
    return problem.tails


def _towards_transfers(problem: Problem) -> Sequence[float]:
    """Of each task the longest way over a transfer that it leads to: what has none comes last, to fill the time of those."""
    found = [-1.0] * len(problem.tasks)
    for number in reversed(range(len(problem.tasks))):
        task = problem.tasks[number]
        ahead = max((found[f] for f in problem.followers[number]), default=-1.0)
        found[number] = problem.tails[number] if task.kind == START else ahead + task.cost if ahead >= 0 else -1.0
    return [f if f >= 0 else -1 / (1 + t) for f, t in zip(found, problem.tails, strict=True)]


def _nearest_transfer(problem: Problem) -> Sequence[float]:
    """What is closest to handing a channel its next transfer first; what leads to none last, by its longest way."""
    far = sum(task.cost for task in problem.tasks) + 1.0
    found = [far] * len(problem.tasks)
    for number in reversed(range(len(problem.tasks))):
        task = problem.tasks[number]
        ahead = min((found[f] for f in problem.followers[number]), default=far)
        found[number] = 0.0 if task.kind == START else min(far, ahead + (task.cost if task.kind == COMPUTE else 0.0))
    return [-f if f < far else -far - 1 / (1 + t) for f, t in zip(found, problem.tails, strict=True)]


def _in_order(problem: Problem) -> Sequence[float]:
    return [-float(number) for number in range(len(problem.tasks))]


def _other_first(problem: Problem) -> Sequence[float]:
    """The last lane before the others, each in its order."""
    lanes = list(dict.fromkeys(task.lane for task in problem.tasks if task.lane))
    rank = {lane: i for i, lane in enumerate(lanes)}
    return [rank.get(task.lane, len(lanes)) * len(problem.tasks) - float(number) for number, task in enumerate(problem.tasks)]


RULES = tuple(
    Rule(f"{name}{', patient' if patient else ''}", priority, patient)
    for name, priority in (
        ("longest way", _tails),
        ("towards transfers", _towards_transfers),
        ("nearest transfer", _nearest_transfer),
        ("in order", _in_order),
        ("other lane first", _other_first),
    )
    for patient in (False, True)
)


def list_schedule(problem: Problem, rule: Rule, limit: int | None = None, priority: Sequence[float] | None = None) -> list[int] | None:
    """An order by a rule, or by the `priority` given; None where it comes to a point at which no ready task fits under `limit` bytes."""
    return _ListSchedule(problem, rule, limit, priority).run()


class _ListSchedule:
    def __init__(self, problem: Problem, rule: Rule, limit: int | None, priority: Sequence[float] | None):
        self.problem, self.rule, self.limit = problem, rule, limit
        self.priority = rule.priority(problem) if priority is None else priority
        self.missing = [len(set(task.needs)) for task in problem.tasks]
        self.ready: dict[str, set[int]] = {COMPUTE: set(), START: set(), WAIT: set()}
        self.now, self.free, self.end = 0.0, {}, {}
        self.memory, self.order = Memory(problem), []

    def run(self) -> list[int] | None:
        for number, count in enumerate(self.missing):
            if not count:
                self.ready[self.problem.tasks[number].kind].add(number)
        while any(self.ready.values()):
            number = self._choose()
            if number is None:
                return None
            self._take(number)
        return self.order

    def _fits(self, number: int) -> bool:
        return self.limit is None or self.memory.needed(number) <= self.limit

    def _choose(self) -> int | None:
        """Starts, waits that cost nothing, compute, then the transfer that ends first; what does not fit in memory is passed over."""
        tasks, key = self.problem.tasks, lambda number: (-self.priority[number], number)
        starts = [n for n in self.ready[START] if not self.rule.patient or self.free.get(tasks[n].channel, 0.0) <= self.now]
        for number in sorted(starts, key=lambda n: (-self.problem.tails[n], n)):
            if self._fits(number):
                return number
        done = [n for n in self.ready[WAIT] if self.end[tasks[n].start] <= self.now]
        if done:
            return min(done)
        fitting = [n for n in self.ready[COMPUTE] if self._fits(n)]
        if fitting:
            return min(fitting, key=key)
        left = sorted(self.ready[START] - set(starts), key=lambda n: (-self.problem.tails[n], n))
        for number in left:
            if self._fits(number):
                return number
        return min(self.ready[WAIT], key=lambda n: (self.end[tasks[n].start], n), default=None)

    def _take(self, number: int) -> None:
        task = self.problem.tasks[number]
        self.ready[task.kind].discard(number)
        self.memory.run(number)
        self.order.append(number)
        if task.kind == START:
            self.end[number] = self.free[task.channel] = max(self.now, self.free.get(task.channel, 0.0)) + task.cost
        elif task.kind == WAIT:
            self.now = max(self.now, self.end[task.start])
        else:
            self.now += task.cost
        for follower in self.problem.followers[number]:
            self.missing[follower] -= 1
            if not self.missing[follower]:
                self.ready[self.problem.tasks[follower].kind].add(follower)


def late_waits(problem: Problem, order: Sequence[int]) -> list[int]:
    """The order with each wait just before the first task that needs it. Takes no longer."""
    place = {number: i for i, number in enumerate(order)}
    before: dict[int, list[int]] = {}
    last: list[int] = []
    moved = set()
    for number in order:
        if problem.tasks[number].kind == WAIT:
            moved.add(number)
            user = min(problem.followers[number], key=place.__getitem__, default=None)
            (last if user is None else before.setdefault(user, [])).append(number)
    found: list[int] = []

    def place_task(number: int) -> None:
        for wait in before.get(number, ()):
            place_task(wait)
        found.append(number)

    for number in order:
        if number not in moved:
            place_task(number)
    return found + last


# ---------------------------------------------------------------------------------------------------------------------- weaving


@dataclass(frozen=True)
class _State:
    """Where a weave stands: time, when channels are free, when transfers end that nothing has waited for yet, and the way here."""

    now: float
    free: tuple[tuple[str, float], ...]
    end: tuple[tuple[int, float], ...]
    came: tuple | None  # (state before, tasks of the piece)

    def after(self, problem: Problem, piece: Sequence[int]) -> _State:
        now, free, end = self.now, dict(self.free), dict(self.end)
        for number in piece:
            task = problem.tasks[number]
            if task.kind == COMPUTE:
                now += task.cost
            elif task.kind == START:
                end[number] = free[task.channel] = max(now, free.get(task.channel, 0.0)) + task.cost
            else:
                now = max(now, end.pop(task.start, now))
        return _State(now, tuple(free.items()), tuple(end.items()), (self, piece))


def pieces_of(problem: Problem, sequence: Sequence[int], count: int = PIECES) -> list[list[int]]:
    """A sequence cut at its transfers, and between them so that there are about `count` pieces."""
    total = sum(problem.tasks[n].cost for n in sequence if problem.tasks[n].kind == COMPUTE)
    most, found, now, kind = total / count, [], 0.0, None
    for number in sequence:
        task = problem.tasks[number]
        if not found or task.kind == START or kind == START or now + task.cost > most or task.kind == WAIT:
            found.append([])
            now = 0.0
        found[-1].append(number)
        now += task.cost if task.kind == COMPUTE else 0.0
        kind = task.kind
    return found


class _Lane:
    """One sequence of a weave: its pieces, bytes that are live before and while each runs, and how far the other must be."""

    def __init__(self, problem: Problem, sequence: Sequence[int], own: set[int]):
        self.pieces = pieces_of(problem, sequence)
        self.live, self.peak = [0], []
        inside = tuple(s for s in problem.storages if _lane_of(problem, s) <= own and s.made_by in own)
        memory = Memory(replace(problem, storages=inside))
        for piece in self.pieces:
            memory.peak = memory.now
            for number in piece:
                memory.run(number)
            self.peak.append(memory.peak)
            self.live.append(memory.now)
        self.place = {number: i for i, piece in enumerate(self.pieces) for number in piece}
        self.left = [0.0] * (len(self.pieces) + 1)
        for i in reversed(range(len(self.pieces))):
            self.left[i] = self.left[i + 1] + sum(problem.tasks[n].cost for n in self.pieces[i] if problem.tasks[n].kind == COMPUTE)

    def needs(self, problem: Problem, other: _Lane) -> list[int]:
        """For each piece, how many of the other's must be done."""
        return [
            max((other.place[need] + 1 for number in piece for need in problem.tasks[number].needs if need in other.place), default=0)
            for piece in self.pieces
        ]


def _lane_of(problem: Problem, storage) -> set[int]:
    return set(storage.read_by) | ({storage.made_by} if storage.made_by is not None else set())


def weave(problem: Problem, first: Sequence[int], second: Sequence[int], limit: int | None = None) -> list[int] | None:
    """The best alternation of two sequences that together are all tasks; None where `limit` bytes allow none.

    Memory that both lanes use, and what was given, counts as live all the time, so an order under the limit by this count is under it.
    """
    a, b = _Lane(problem, first, set(first)), _Lane(problem, second, set(second))
    inside = [s for s in problem.storages if s.made_by is not None and any(_lane_of(problem, s) <= set(lane) for lane in (first, second))]
    outside = sum(s.size for s in problem.storages) - sum(s.size for s in inside)
    needs_a, needs_b = a.needs(problem, b), b.needs(problem, a)
    table: dict[tuple[int, int], list[_State]] = {(0, 0): [_State(0.0, (), (), None)]}
    for i in range(len(a.pieces) + 1):
        for j in range(len(b.pieces) + 1):
            states = table.get((i, j))
            if states is None:
                continue
            states = _best(states, a.left[i] + b.left[j])
            table[i, j] = states
            if i < len(a.pieces) and needs_a[i] <= j and (limit is None or a.peak[i] + b.live[j] + outside <= limit):
                table.setdefault((i + 1, j), []).extend(s.after(problem, a.pieces[i]) for s in states)
            if j < len(b.pieces) and needs_b[j] <= i and (limit is None or b.peak[j] + a.live[i] + outside <= limit):
                table.setdefault((i, j + 1), []).extend(s.after(problem, b.pieces[j]) for s in states)
        for j in range(len(b.pieces) + 1):
            if i and (i, j) != (len(a.pieces), len(b.pieces)):
                table.pop((i - 1, j), None)
    final = table.get((len(a.pieces), len(b.pieces)))
    if not final:
        return None
    state, found = final[0], []
    while state.came is not None:
        state, piece = state.came
        found.append(piece)
    return [number for piece in reversed(found) for number in piece]


def _best(states: list[_State], left: float) -> list[_State]:
    """The few states that end soonest by what is left to compute and under way, alike ones once."""
    states = sorted(states, key=lambda s: (max([s.now + left, *(end for _, end in s.free)]), s.now, sum(e for _, e in s.end)))
    kept: list[_State] = []
    for state in states:
        if all((state.now, state.end) != (k.now, k.end) for k in kept):
            kept.append(state)
        if len(kept) == WIDTH:
            break
    return kept
