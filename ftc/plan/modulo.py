"""Keys by modulo scheduling: one microbatch is placed on all ranks so that it may be repeated every `period` seconds without a collision.

    F, I and W of the microbatch go, in the order of their needs, to the earliest time that is free modulo the period on their rank;
    microbatch m starts m periods later.

How long a stage's activations live is then known: less where the next stage follows at once (slope 1), more where it waits. Building blocks of
Qi et al. 2024 (arXiv:2405.15362) are such patterns for equal costs; modulo scheduling is Rau and Glaeser's of 1981 for loops of programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ftc.plan.dispatch import ALONE, Dispatcher, Keys

SLOPES = (1.0, 2.0, 3.0)
STRETCHES = (1.0, 1.02, 1.05, 1.1)  # of the busiest rank's work: unequal costs leave gaps that nothing fits


def modulo_keys(problem: Dispatcher) -> Iterator[Keys]:
    """Patterns from low memory to high, each for the shortest period it fits in."""
    slopes = sorted(product(SLOPES, repeat=4), key=lambda four: (sum(four), four))
    for four in slopes:
        for stretch in STRETCHES:
            keys = modulo(problem, four, stretch)
            if keys is not None:
                yield keys
                break


def modulo(problem: Dispatcher, slopes: tuple[float, float, float, float], stretch: float = 1.0) -> Keys | None:
    """One pattern, None where it does not fit its period: the busiest rank's work times `stretch`.

    `slopes`: F of a stage comes at least so many forwards after F before it, on the first and the second half of the stages, and likewise
    I on both halves of the way back.
    """
    work = [problem.forward[s] + problem.backward[s] + problem.weight[s] for s in range(len(problem.forward))]
    period = stretch * max(sum(work[s] for s in local) for local in problem.local)
    tables = [_Table(period) for _ in problem.local]
    starts = _place(problem, tables, slopes)
    if starts is None:
        return None
    rows = [[[start + m * period for m in range(problem.count)] for start in kind] for kind in starts]
    flags = [[[ALONE] * problem.count for _ in work] for _ in range(2)]
    return Keys(*rows, *flags)


def _place(problem: Dispatcher, tables: list[_Table], slopes: tuple[float, float, float, float]) -> list[list[float]] | None:
    """Starts of F, I and W of the first microbatch, by stage."""
    ranks, starts = problem.placement.ranks, [[0.0] * len(problem.forward) for _ in range(3)]
    for chain in problem.placement.chains:
        steps = [*((0, s, place) for place, s in enumerate(chain)), *((1, s, place) for place, s in reversed(list(enumerate(chain))))]
        ready, half = 0.0, len(chain) / 2
        for kind, s, place in steps:
            seconds = (problem.forward, problem.backward)[kind][s]
            start = tables[ranks[s]].take(ready, seconds)
            if start is None:
                return None
            starts[kind][s] = start
            slope = slopes[2 * kind + ((place >= half) if kind == 0 else (place < half))]
            turning = kind == 0 and s == chain[-1]
            hop = 0.0 if turning else problem.hop[s] if kind == 0 else problem.hop[s - 1] if place else 0.0
            ready = start + (seconds if turning else seconds * slope) + hop
    for s, seconds in enumerate(problem.weight):
        start = tables[ranks[s]].take(starts[1][s] + problem.backward[s], seconds)
        if start is None:
            return None
        starts[2][s] = start
    return starts


class _Table:
    """What is taken of one rank's period."""

    def __init__(self, period: float) -> None:
        self.period, self.taken = period, []

    def take(self, ready: float, seconds: float) -> float | None:
        """The earliest start from `ready` on that is free for so long, which is then taken; None where there is none."""
        start, slack = ready, 1e-9 * self.period
        while start <= ready + self.period:
            moved = None
            for begin, length in self.taken:
                ahead = (begin - start) % self.period  # from start to the next begin of that interval
                inside = (start - begin) % self.period
                if inside < length - slack:
                    moved = start + length - inside
                elif ahead < seconds - slack:
                    moved = start + ahead + length
                if moved is not None:
                    break
            if moved is None:
                self.taken.append((start % self.period, seconds))
                return start
            start = moved
        return None
