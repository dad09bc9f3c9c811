"""The endless sequence of samples, and one process's share of it.

Sample i belongs to lane i mod 64. A lane is a sequence of its own: its own documents, its own mixture, its own place in each
source. So what sample i holds depends on the data and the seed only, not on how many processes there are, and a process
whose samples lie in a few lanes reads and tokenizes for these alone. Of n processes, process r takes the samples i with
i mod n = r. The state of a lane after a sample is a few numbers: stored with a checkpoint, any number of processes goes on
from it.

Which source a lane's next sample comes from is decided by what each has given so far: the one that is furthest behind its
share of the tokens. Lanes begin with the debts that one sequence over all of them would have, so that they do not all begin
with the same source.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

from ftc.data.windows import Window

LANES = 64


class Cursor(Protocol):
    """A lane's place in one source."""

    def next(self) -> Window:
        """The lane's next window of this source."""

    def state(self) -> Any:
        """The place, JSON-ready and immutable."""


class WindowSource(Protocol):
    """A source cut into windows, lane by lane."""

    def cursors(self, lanes: Sequence[int], states: Mapping[int, Any]) -> dict[int, Cursor]:
        """A cursor for each of `lanes`, where `states` (of a subset of them) says it stood."""


@dataclass(frozen=True)
class LaneState:
    """Tokens that each source has given to the lane, and the lane's place in it."""

    tokens: tuple[int, ...]
    places: tuple[Any, ...]


@dataclass(frozen=True)
class Sample:
    """`window` is None for a sample of another process that had to be passed over; `state` is the lane's after it."""

    index: int
    lane: int
    source: int
    window: Window | None
    state: LaneState


class Lane:
    """One lane's sequence of windows."""

    def __init__(self, number: int, cursors: Sequence[Cursor], shares: Sequence[float], size: int, tokens: Sequence[int]):
        self.cursors, self.shares, self.size, self.tokens = cursors, shares, size, list(tokens)
        self._debts = [debt * size for debt in first_debts(shares)[number]]

    def next(self) -> tuple[int, Window]:
        """The source that comes next and its window."""
        total = sum(self.tokens) + self.size
        behind = [
            share * total - given + debt
            for share, given, debt in zip(self.shares, self.tokens, self._debts, strict=True)
        ]
        source = behind.index(max(behind))
        window = self.cursors[source].next()
        self.tokens[source] += window.num_tokens
        return source, window

    def state(self) -> LaneState:
        return LaneState(tuple(self.tokens), tuple(cursor.state() for cursor in self.cursors))


def first_debts(shares: Sequence[float]) -> list[list[float]]:
    """For each lane, by how many windows each source is behind its share after one window of every lane before it."""
    debts, given = [], [0] * len(shares)
    for lane in range(LANES):
        debts.append([lane * share - count for share, count in zip(shares, given, strict=True)])
        behind = [debt + share for debt, share in zip(debts[-1], shares, strict=True)]
        given[behind.index(max(behind))] += 1
    return debts


def lanes_of(rank: int, world_size: int) -> list[int]:
    """The lanes that hold samples of process `rank` of `world_size`."""
    step = gcd(world_size, LANES)
    return list(range(rank % step, LANES, step))


def samples(
    sources: Sequence[WindowSource],
    shares: Sequence[float],
    size: int,
    rank: int,
    world_size: int,
    first: int = 0,
    states: Mapping[int, LaneState] | None = None,
) -> Iterator[Sample]:
    """Every sample from number `first` on in the lanes of process `rank`, endlessly; `size`: tokens of a window.

    `states`: each lane's after the samples before `first`, empty where it has none.
    """
    states, numbers = states or {}, lanes_of(rank, world_size)
    places = [
        source.cursors(numbers, {lane: state.places[index] for lane, state in states.items()})
        for index, source in enumerate(sources)
    ]
    none = (0,) * len(sources)
    lanes = {
        number: Lane(
            number, [cursors[number] for cursors in places], shares, size, states[number].tokens if number in states else none
        )
        for number in numbers
    }
    index = first
    while True:
        lane = lanes.get(index % LANES)
        if lane is not None:
            source, window = lane.next()
            own = index % world_size == rank
            yield Sample(index, index % LANES, source, window if own else None, lane.state())
        index += 1
