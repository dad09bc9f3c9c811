"""The abstract problem behind an order: tasks with costs on one processor and channels beside it, memory, and how long an order takes.

    compute   occupies the processor for its cost
    start     hands a transfer to its channel, which runs it behind those it has; takes no time of the processor
    wait      the processor stands still until the transfer is there

That is how a stream of kernels meets streams of collectives: what is started waits for all that was queued before it. `simulate` gives the time and the
peak of memory of an order, `bound` a time that no order beats. Times are in seconds, memory in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

COMPUTE, START, WAIT = "compute", "start", "wait"


@dataclass(frozen=True)
class Task:
    """`cost`: seconds of the processor (compute) or of the channel (start). `needs`: numbers of the tasks before it. `start`: what a wait waits for."""

    kind: str
    cost: float = 0.0
    needs: tuple[int, ...] = ()
    channel: str | None = None
    start: int | None = None
    lane: str | None = None


@dataclass(frozen=True)
class Storage:
    """Memory made by a task (None: given), and free behind its last reader, or never where it is `kept`."""

    size: int
    made_by: int | None
    read_by: tuple[int, ...] = ()
    kept: bool = False


@dataclass(frozen=True)
class Timeline:
    """What an order takes: `seconds` in all, of which `exposed` the processor stood still; `peak_bytes`; when each task began and ended (of a
    start: its transfer)."""

    seconds: float
    exposed: float
    peak_bytes: int
    begin: tuple[float, ...] = field(repr=False)
    end: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Problem:
    """Tasks by number in the order of concatenation, and the memory that they use."""

    tasks: tuple[Task, ...]
    storages: tuple[Storage, ...] = ()

    def __post_init__(self):
        for number, task in enumerate(self.tasks):
            if any(not 0 <= need < number for need in task.needs):
                raise ValueError(f"task {number} needs {task.needs}, which must be tasks before it")
            if task.kind == WAIT and (task.start not in task.needs or self.tasks[task.start].kind != START):
                raise ValueError(f"task {number} waits for {task.start}, which must be a start that it needs")
            if task.cost < 0 or (task.kind == START) != (task.channel is not None):
                raise ValueError(f"task {number} is {task}: a cost is at least 0, and a start has a channel")

    @cached_property
    def compute(self) -> float:
        """Seconds of the processor."""
        return sum(task.cost for task in self.tasks if task.kind == COMPUTE)

    @cached_property
    def transfers(self) -> float:
        """Seconds of all channels together."""
        return sum(task.cost for task in self.tasks if task.kind == START)

    @cached_property
    def followers(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.tasks]
        for number, task in enumerate(self.tasks):
            for need in dict.fromkeys(task.needs):
                found[need].append(number)
        return tuple(map(tuple, found))

    @cached_property
    def tails(self) -> tuple[float, ...]:
        """Of each task the longest way to the end, itself included. A transfer delays its waits, and not what else needs its start."""
        found = [0.0] * len(self.tasks)
        for number in reversed(range(len(self.tasks))):
            task = self.tasks[number]
            delayed = [found[f] for f in self.followers[number] if task.kind != START or self._waits_for(f, number)]
            found[number] = max([task.cost + max(delayed, default=0.0), *(found[f] for f in self.followers[number])])
        return tuple(found)

    def _waits_for(self, wait: int, start: int) -> bool:
        return self.tasks[wait].kind == WAIT and self.tasks[wait].start == start

    def simulate(self, order: Sequence[int]) -> Timeline:
        """Run an order (every task once, each behind what it needs)."""
        now, free, begin, end = 0.0, {}, [0.0] * len(self.tasks), [0.0] * len(self.tasks)
        memory = Memory(self)
        for number in order:
            task = self.tasks[number]
            memory.run(number)
            begin[number] = now
            if task.kind == START:
                begin[number] = max(now, free.get(task.channel, 0.0))
                end[number] = free[task.channel] = begin[number] + task.cost
            else:
                now = max(now, end[task.start]) if task.kind == WAIT else now + task.cost
                end[number] = now
        seconds = max([now, *free.values()])
        return Timeline(seconds, seconds - self.compute, memory.peak, tuple(begin), tuple(end))

    def bound(self) -> float:
        """A time below which no order gets: the longest of

        - all compute;
        - the longest path, transfers included;
        - for each transfer, all compute that must precede it, itself, and all that must follow;
        - for each channel, the least compute before any of its transfers, all of these, and the least compute behind any.
        """
        before, behind = self._compute_before(), self._compute_behind()
        starts = [i for i, task in enumerate(self.tasks) if task.kind == START]
        found = [self.compute, max(self.tails, default=0.0)]
        found += [before[i] + self.tasks[i].cost + behind[i] for i in starts]
        for channel in {self.tasks[i].channel for i in starts}:
            own = [i for i in starts if self.tasks[i].channel == channel]
            found.append(min(before[i] for i in own) + sum(self.tasks[i].cost for i in own) + min(behind[i] for i in own))
        return max(found)

    def _compute_before(self) -> list[float]:
        reached = [0] * len(self.tasks)
        for number, task in enumerate(self.tasks):
            for need in task.needs:
                reached[number] |= reached[need] | (1 << need)
        return [self._cost_of(bits) for bits in reached]

    def _compute_behind(self) -> list[float]:
        """Of each task the compute that must follow it; of a start, its transfer."""
        reached, delayed = [0] * len(self.tasks), [0] * len(self.tasks)
        for number in reversed(range(len(self.tasks))):
            for follower in self.followers[number]:
                bits = reached[follower] | (1 << follower)
                reached[number] |= bits
                if self.tasks[number].kind != START or self._waits_for(follower, number):
                    delayed[number] |= bits
        return [self._cost_of(bits) for bits in delayed]

    def _cost_of(self, bits: int) -> float:
        total = 0.0
        while bits:
            low = bits & -bits
            task = self.tasks[low.bit_length() - 1]
            total += task.cost if task.kind == COMPUTE else 0.0
            bits ^= low
        return total

    @cached_property
    def makes(self) -> tuple[tuple[int, ...], ...]:
        """Storages that each task makes."""
        found: list[list[int]] = [[] for _ in self.tasks]
        for number, storage in enumerate(self.storages):
            if storage.made_by is not None:
                found[storage.made_by].append(number)
        return tuple(map(tuple, found))

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """Storages that each task reads, once each."""
        found: list[list[int]] = [[] for _ in self.tasks]
        for number, storage in enumerate(self.storages):
            for reader in dict.fromkeys(storage.read_by):
                found[reader].append(number)
        return tuple(map(tuple, found))


class Memory:
    """Bytes in use while an order runs, and their `peak`."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.left = [len(set(storage.read_by)) for storage in problem.storages]
        self.now = self.peak = sum(s.size for s in problem.storages if s.made_by is None)

    def needed(self, number: int) -> int:
        """Bytes in use while a task would run next."""
        return self.now + sum(self.problem.storages[made].size for made in self.problem.makes[number])

    def freed(self, number: int) -> int:
        """Bytes that a task would free by being their last reader, or by making what nobody reads."""
        gone = [s for s in self.problem.reads[number] if self.left[s] == 1] + [s for s in self.problem.makes[number] if not self.left[s]]
        return sum(self.problem.storages[s].size for s in gone if not self.problem.storages[s].kept)

    def run(self, number: int) -> None:
        """Run a task."""
        self.now = self.needed(number)
        self.peak = max(self.peak, self.now)
        self.now -= self.freed(number)
        for storage in self.problem.reads[number]:
            self.left[storage] -= 1
