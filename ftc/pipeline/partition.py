"""Which regions go to which stage: contiguous parts of even cost, and the ranks on which the stages stand.

    placement "loop": stage s on rank s mod P                        (GPipe, 1F1B; interleaved 1F1B with more than P stages)
    placement "v":    stages s and 2 P - 1 - s on rank s             (ZB-V: Qi et al. 2024, arXiv:2405.15362; DualPipeV)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal, get_args

import numpy as np

from ftc.errors import FtcError, nearest

Placement = Literal["loop", "v"]


def stage_ranks(num_stages: int, num_ranks: int, placement: Placement = "loop") -> tuple[int, ...]:
    """The rank of each stage. FtcError where so many stages cannot be placed so on so many ranks."""
    if placement not in get_args(Placement):
        raise FtcError(f"unknown placement {placement!r}; {nearest(str(placement), get_args(Placement))}")
    if num_ranks < 1 or num_stages < 1:
        raise FtcError(f"{num_stages} stages on {num_ranks} ranks: both have to be 1 or more")
    if placement == "v":
        if num_stages != 2 * num_ranks:
            raise FtcError(f"the placement 'v' has two stages a rank: {2 * num_ranks} stages on {num_ranks} ranks, not {num_stages}")
        return tuple(min(stage, 2 * num_ranks - 1 - stage) for stage in range(num_stages))
    if num_stages % num_ranks:
        raise FtcError(f"{num_stages} stages cannot be dealt out evenly to {num_ranks} ranks; use a multiple of {num_ranks}")
    return tuple(stage % num_ranks for stage in range(num_stages))


def stages_of_rank(rank: int, num_stages: int, num_ranks: int, placement: Placement = "loop") -> tuple[int, ...]:
    """The stages on a rank, ascending. FtcError as `stage_ranks`, and for a rank that is not there."""
    ranks = stage_ranks(num_stages, num_ranks, placement)
    if not 0 <= rank < num_ranks:
        raise FtcError(f"rank {rank} is not one of {num_ranks}; ranks are 0 to {num_ranks - 1}")
    return tuple(stage for stage, where in enumerate(ranks) if where == rank)


def stage_costs(costs: Sequence[float], bounds: Sequence[int], first: float = 0.0, last: float = 0.0) -> list[float]:
    """The cost of each stage of a partition: of its regions, and of what stands before the first and behind the last of all."""
    parts = [math.fsum(costs[start:end]) for start, end in pairwise((0, *bounds, len(costs)))]
    parts[0] += first
    parts[-1] += last
    return parts


def partition(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0, placement: Placement = "loop") -> tuple[int, ...]:
    """Bounds, as `ftc.pipeline.cut` takes them, of the contiguous partition of regions whose most expensive stage is cheapest. Exact (costs to 2^-50 of their sum).

    costs     of each region, in order, in any unit, 0 or more
    first     of what stands before the first region (the embedding), which the first stage bears
    last      of what stands behind the last one (norm, head, loss), which the last stage bears
    placement "loop": the largest stage is made as small as can be. "v": the largest sum of a rank's two stages, and then the largest
              stage. Among those that are equal, the partition with the smallest sum of squares is taken under "loop" (the most even one), and the one
              that comes first under "v".

    Every stage gets at least one region. Raises FtcError where there are fewer regions than stages, for a cost that is negative or not
    finite, and for an odd number of stages under "v".
    """
    costs, ends = list(costs), {"first": first, "last": last}
    for name, cost in [*((f"costs[{i}]", c) for i, c in enumerate(costs)), *ends.items()]:
        if not (math.isfinite(cost) and cost >= 0):
            raise FtcError(f"{name} = {cost!r} is no cost; costs are finite and 0 or more")
    if num_stages < 1 or num_stages > len(costs):
        raise FtcError(f"{len(costs)} regions cannot be cut into {num_stages} stages; use 1 to {len(costs)}, as each takes at least one region")
    stage_ranks(num_stages, max(1, num_stages // 2) if placement == "v" else num_stages, placement)
    whole = _Costs(costs, first, last)
    return _for_v(whole, num_stages) if placement == "v" else _for_loop(whole, num_stages)


class _Costs:
    """Costs as integers in one unit, so that equal sums are equal: `of(i, j)` is that of regions i .. j - 1.

    Exact where the total fits 50 bits of a common unit, as counts and round numbers do; else rounded to 2^-50 of the total.
    """

    def __init__(self, costs: Sequence[float], first: float, last: float):
        exact = [Fraction(cost) for cost in (*costs, first, last)]
        unit = math.lcm(*(value.denominator for value in exact))
        if (total := sum(exact)) * unit > 1 << 50:
            unit = (1 << 50) / total
        *inner, self.first, self.last = [round(value * unit) for value in exact]
        self.count = len(inner)
        self._sums = [0, *accumulate(inner)]

    def of(self, start: int, end: int) -> int:
        ends = (self.first if start == 0 else 0) + (self.last if end == self.count else 0)
        return self._sums[end] - self._sums[start] + ends


def _for_loop(costs: _Costs, num_stages: int) -> tuple[int, ...]:
    """Two dynamic programs over (stages, regions so far): the smallest possible largest stage, then the smallest sum of squares under it."""
    count = costs.count
    inf = float("inf")
    best = [0] + [inf] * count
    for stage in range(1, num_stages + 1):
        best = [min((max(best[k], costs.of(k, end)) for k in range(stage - 1, end)), default=inf) for end in range(count + 1)]
    limit = best[count]
    squares, chosen = [0] + [inf] * count, []
    for stage in range(1, num_stages + 1):
        row, came = [inf] * (count + 1), [0] * (count + 1)
        for end in range(stage, count + 1):
            for k in range(stage - 1, end):
                if squares[k] < inf and (size := costs.of(k, end)) <= limit and squares[k] + size * size < row[end]:
                    row[end], came[end] = squares[k] + size * size, k
        squares = row
        chosen.append(came)
    bounds, end = [], count
    for came in reversed(chosen[1:]):
        end = came[end]
        bounds.append(end)
    return tuple(reversed(bounds))


def _for_v(costs: _Costs, num_stages: int) -> tuple[int, ...]:
    """The smallest limit on a rank's sum that can be kept, then under it the smallest limit on a stage."""
    table, num_ranks = _table(costs), num_stages // 2
    total = int(table[0, costs.count])
    by_rank = _smallest(lambda limit: _levels(table, num_ranks, limit, total), total)
    by_stage = _smallest(lambda limit: _levels(table, num_ranks, by_rank, limit), by_rank)
    return _v_bounds(table, _levels(table, num_ranks, by_rank, by_stage), by_rank, by_stage)


def _table(costs: _Costs) -> np.ndarray:
    """[n + 1, n + 1] int64: the cost of regions i .. j - 1, more than everything where there are none."""
    size, nothing = costs.count + 1, np.int64(1) << 52
    return np.array([[costs.of(i, j) if i < j else nothing for j in range(size)] for i in range(size)], dtype=np.int64)


def _smallest(holds: Callable[[int], object], highest: int) -> int:
    """The smallest integer for which `holds` is not None, by bisection; it holds for `highest`, and above every number for which it does."""
    low, high = -1, highest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) is not None else (middle, high)
    return high


def _levels(table: np.ndarray, num_ranks: int, rank_limit: int, stage_limit: int) -> list[np.ndarray] | None:
    """Level r: whether ranks 0 .. r - 1, from the outside in, can take all but regions i .. j - 1, [n + 1, n + 1] bool over (i, j), where no
    rank's two stages together cost more than `rank_limit` and no stage more than `stage_limit`. None where not all regions can be taken."""
    size = len(table)
    level = np.zeros((size, size), dtype=bool)
    level[0, size - 1] = True
    levels = [level]
    for _ in range(num_ranks):
        after = np.zeros_like(level)
        for i in np.flatnonzero(level.any(1)):
            ends = np.flatnonzero(level[i])  # of all ends behind j the nearest is the cheapest
            nearest_end = np.searchsorted(ends, np.arange(size), side="right")
            back = np.where(nearest_end < len(ends), table[np.arange(size), ends[np.minimum(nearest_end, len(ends) - 1)]], table[0, 0])
            front = table[i]
            fits = (front[:, None] + back[None, :] <= rank_limit) & (front <= stage_limit)[:, None] & (back <= stage_limit)[None, :]
            after |= fits
        level = np.triu(after)
        levels.append(level)
    return levels if level.diagonal().any() else None


def _v_bounds(table: np.ndarray, levels: list[np.ndarray], rank_limit: int, stage_limit: int) -> tuple[int, ...]:
    """The bounds that lead through the levels, from the innermost rank outwards."""
    start = end = int(np.flatnonzero(levels[-1].diagonal())[0])
    left, right = [start], []
    for level in reversed(levels[:-1]):
        front, back = table[:, start][:, None], table[end, :][None, :]
        fits = level & (front + back <= rank_limit) & (front <= stage_limit) & (back <= stage_limit)
        start, end = (int(x[0]) for x in np.nonzero(fits))
        left.append(start)
        right.append(end)
    return (*reversed(left[:-1]), *right[:-1])
