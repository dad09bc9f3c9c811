"""What a search may choose besides the order of actions: how many stages a rank has, how they are placed, and which regions are in each.

A `Candidate` is one such choice with the costs of its stages. Bounds come from the exact partitions of `ftc.pipeline.partition` (by seconds, and
by bytes where memory is short), from the even one, and from moving borders while the lower bound of the step falls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ftc.errors import FtcError
from ftc.pipeline.partition import partition
from ftc.plan.actions import Placement, place
from ftc.plan.bound import hidden, step_bound
from ftc.plan.costs import Costs

Layout = tuple[str, int]  # style and stages a rank
LAYOUTS: tuple[Layout, ...] = (("v", 2), ("loop", 1), ("loop", 2))
BOTH_WAYS: Layout = ("bidirectional", 2)  # DualPipe's: every region on two ranks, which takes twice the fixed bytes


@dataclass(frozen=True)
class Candidate:
    """Stages to schedule: their bounds, placement and costs, the number of microbatches, and the bound on the step."""

    bounds: tuple[int, ...]
    placement: Placement
    costs: Costs
    num_microbatches: int
    bound_seconds: float


def candidate(
    regions: Costs, bounds: Sequence[int], placement: Placement, num_microbatches: int, memory_cap: float | None = None
) -> Candidate:
    """The regions joined at `bounds`; FtcError where bounds and placement do not fit."""
    costs = regions.for_microbatches(num_microbatches).joined(bounds)
    return Candidate(tuple(bounds), placement, costs, num_microbatches, step_bound(costs, placement, num_microbatches, memory_cap))


def candidates(
    regions: Costs, num_ranks: int, num_microbatches: int, memory_cap: float | None, layouts: Sequence[Layout] = LAYOUTS
) -> list[Candidate]:
    """Those worth trying within the memory cap, the lowest bound first. FtcError where the regions are too few for the ranks."""
    if len(regions) < num_ranks:
        raise FtcError(f"{len(regions)} regions on {num_ranks} ranks: every rank needs at least one region")
    found: dict[tuple, Candidate] = {}
    for style, stages_per_rank in layouts:
        if parts_of((style, stages_per_rank), num_ranks) > len(regions):
            continue
        placement = place(style, num_ranks, stages_per_rank)
        for bounds in _partitions(regions, placement, num_microbatches, memory_cap):
            one = candidate(regions, bounds, placement, num_microbatches, memory_cap)
            if memory_cap is None or max(least_bytes(one.costs, placement)) <= memory_cap:
                found[placement.ranks, bounds] = one
    return sorted(found.values(), key=lambda one: one.bound_seconds)


def parts_of(layout: Layout, num_ranks: int) -> int:
    """Into how many parts a layout cuts the regions."""
    style, stages_per_rank = layout
    return num_ranks if style == "bidirectional" else num_ranks * stages_per_rank


def even_bounds(num_regions: int, num_stages: int) -> tuple[int, ...]:
    """Stages of as many regions as each other; the first ones have one more where the number does not divide."""
    size, more = divmod(num_regions, num_stages)
    return tuple(stage * size + min(stage, more) for stage in range(1, num_stages))


def least_bytes(costs: Costs, placement: Placement) -> list[float]:
    """Bytes that each rank needs at least: what is fixed, and one microbatch on all of its stages, as its I come after all its F."""
    return [
        sum(costs.fixed_bytes[placement.position(s)] + costs.activation_bytes[placement.position(s)] for s in placement.stages_of(rank))
        for rank in range(placement.num_ranks)
    ]


def least_memory(regions: Costs, num_ranks: int, layouts: Sequence[Layout] = LAYOUTS) -> tuple[float, int, tuple[int, ...]]:
    """(bytes, rank, bounds) of the partition whose fullest rank needs least."""
    best = None
    for style, stages_per_rank in layouts:
        if parts_of((style, stages_per_rank), num_ranks) <= len(regions):
            placement = place(style, num_ranks, stages_per_rank)
            bounds = _by(_bytes(regions), placement)
            needed = least_bytes(regions.joined(bounds), placement)
            if best is None or max(needed) < best[0]:
                best = max(needed), needed.index(max(needed)), bounds
    if best is None:
        raise FtcError(f"{len(regions)} regions on {num_ranks} ranks: every rank needs at least one region")
    return best


def _partitions(regions: Costs, placement: Placement, num_microbatches: int, memory_cap: float | None) -> Iterator[tuple[int, ...]]:
    seconds = [regions.work(part) + regions.exchange(part) for part in range(len(regions))]
    scaled = regions.for_microbatches(num_microbatches)
    value = _Value(scaled, placement, num_microbatches, memory_cap)
    # The exact balance of ranks may have very unequal stages, which suits few schedules; from the even partition stages stay alike.
    balanced, even = _by(seconds, placement), even_bounds(len(regions), len(placement.chains[0]))
    yield _descend(value, balanced)
    yield balanced
    yield _descend(value, even)
    yield even
    if memory_cap is not None:
        light = _by(_bytes(scaled), placement)
        yield light
        yield _descend(value, light)


def _by(costs: list[float], placement: Placement) -> tuple[int, ...]:
    parts = len(placement.chains[0])
    # Exact for a V of two stages a rank, and for both ways, where rank r holds parts r and P - 1 - r too. More stages a rank, and loops,
    # are balanced stage by stage and then improved.
    folded = placement.num_stages == 2 * placement.num_ranks and placement.style != "loop"
    return partition(costs, parts, placement="v" if folded else "loop")


def _bytes(regions: Costs) -> list[float]:
    return [fixed + kept for fixed, kept in zip(regions.fixed_bytes, regions.activation_bytes, strict=True)]


def _descend(value: _Value, bounds: tuple[int, ...]) -> tuple[int, ...]:
    """Move borders by one region, one at a time or all of a run of them, as long as the step's bound falls or the ranks get more even."""
    best, lowest = bounds, value.of(bounds)
    while True:
        nearby = min(((value.of(moved), moved) for moved in _moves(best, value.num_regions)), default=(lowest, best))
        if nearby[0] >= lowest:
            return best
        lowest, best = nearby


def _moves(bounds: tuple[int, ...], num_regions: int) -> Iterator[tuple[int, ...]]:
    edges = (0, *bounds, num_regions)
    for start in range(1, len(edges) - 1):
        for by in (-1, 1):
            # Runs of more than a few borders are what several single moves do as well.
            for end in range(start + 1, min(start + 5, len(edges))):
                moved = (*edges[:start], *(edge + by for edge in edges[start:end]), *edges[end:])
                if all(low < high for low, high in zip(moved, moved[1:], strict=False)):
                    yield moved[1:-1]


class _Value:
    """(head and work of the rank whose sum is largest, sum of squares of the ranks' work), infinite where the memory cap is passed.

    The first is the first of the bounds of `bound.step_bound`, from running sums over the regions, as it is asked for thousands of times.
    """

    def __init__(self, costs: Costs, placement: Placement, num_microbatches: int, memory_cap: float | None) -> None:
        parts = range(len(costs))
        self.costs, self.num_regions, self.cap = costs, len(costs), memory_cap
        self.work, self.exchange, self.way, self.bytes = (
            [0.0, *accumulate(row)]
            for row in (
                [costs.work(part) for part in parts],
                [costs.exchange(part) for part in parts],
                [f + x for f, x in zip(costs.forward, costs.exchange_forward, strict=True)],
                [fixed + kept for fixed, kept in zip(costs.fixed_bytes, costs.activation_bytes, strict=True)],
            )
        )
        self.held = [[placement.position(s) for s in placement.stages_of(rank)] for rank in range(placement.num_ranks)]
        self.passes = len(placement.microbatches(0, num_microbatches))
        chain = placement.chains[0]
        self.near = [placement.ranks[s] == placement.ranks[t] for s, t in zip(chain, chain[1:], strict=False)]

    def of(self, bounds: tuple[int, ...]) -> tuple[float, float]:
        edges = (0, *bounds, self.num_regions)
        hops = [0.0, *accumulate(0.0 if near else self.costs.hop(bound - 1) for bound, near in zip(bounds, self.near, strict=True))]
        longest = squares = 0.0
        for parts in self.held:
            if self.cap is not None and sum(self.bytes[edges[p + 1]] - self.bytes[edges[p]] for p in parts) > self.cap:
                return float("inf"), max(sum(self.bytes[edges[p + 1]] - self.bytes[edges[p]] for p in held) for held in self.held)
            compute = sum(self.work[edges[p + 1]] - self.work[edges[p]] for p in parts)
            exchange = sum(self.exchange[edges[p + 1]] - self.exchange[edges[p]] for p in parts)
            head = min(self.way[edges[p]] + hops[p] for p in parts)
            longest = max(longest, head + self.passes * hidden(compute, exchange, self.costs.hidden_share))
            squares += (compute + exchange) ** 2
        return round(longest, 9), round(squares, 9)
