r"""What no schedule can beat: lower bounds on the seconds of a step.

For stages that are placed (`step_bound`), with s_0 the first stage of rank r in the chain and M microbatches. C and X are seconds of compute
and of exposed communication of all of r's microbatches, h = `hidden_share`:

    work_r = h max(C, X) + (1 - h)(C + X)                      a pair hides no more than the shorter of the two, single actions hide nothing
    head_r = sum over stages before s_0 of (F + xF + hop)      nothing has reached the rank before
    tail_r = sum over stages before s_0 of (I + xI + hop) + W of the chain's first stage      what follows the rank's last I

    step >= head_r + work_r                                    the rank's work fits between head_r and the end
    step >= head_r + M sum_r (F + I) + tail_r                  its F and I fit before its last I, which tail_r follows (h = 1: compute alone)
    step >= sum of the chain's F, I, hops, and one W           one microbatch, there and back
    step >= head_r + M sum_s (a_s D_s + p_s W_s) / (cap - fixed_r)     bytes times seconds: a microbatch holds a_s for at least
                                                               D_s = the way from s to the chain's end and back, then p_s for W_s

For regions that may be cut and placed in any way (`partition_bound`): the k-th rank that a microbatch reaches, k = 0 .. P - 1, has at least k
regions and k hops before it, so the P ranks have at most P step - sum_k head_k seconds for all the work there is; some rank holds at least
ceil(L / P) regions; and the largest region is on one rank. With two chains ranks are reached two at a time, and a region's work is on two ranks.
"""

from __future__ import annotations

import math

from ftc.plan.actions import Placement
from ftc.plan.costs import Costs
from ftc.plan.simulate import check_sizes


def step_bound(costs: Costs, placement: Placement, num_microbatches: int, memory_cap: float | None = None) -> float:
    """Seconds that every schedule of these stages takes at least; with `memory_cap` (bytes a rank), every schedule within it."""
    check_sizes(costs, placement)
    bounds = [_round_trip(costs, placement, chain, 0) + costs.backward_weight[0] for chain in placement.chains]
    for rank in range(placement.num_ranks):
        bounds += _rank_bounds(costs, placement, rank, num_microbatches)
        if memory_cap is not None:
            bounds.append(_memory_bound(costs, placement, rank, num_microbatches, memory_cap))
    return max(bounds)


def partition_bound(regions: Costs, num_ranks: int, num_microbatches: int, both_ways: bool = False) -> float:
    """Seconds that every schedule of every partition of the regions takes at least, on every placement with one copy of each.

    `both_ways`: also on placements of two chains (DualPipe), where two ranks at a time are reached and a region's work is on two ranks.
    """
    compute = sorted(regions.work(part) for part in range(len(regions)))
    exchange = sorted(regions.exchange(part) for part in range(len(regions)))
    share, copies = regions.hidden_share, 2 if both_ways else 1
    hop = min((regions.hop(part) for part in range(len(regions) - 1)), default=0.0)
    forward = [f + x for f, x in zip(regions.forward, regions.exchange_forward, strict=True)]
    before = [k // copies for k in range(min(num_ranks, len(regions)))]
    heads = sum(sum(forward[:k]) + k * hop for k in before)
    largest = max(hidden(regions.work(part), regions.exchange(part), share) for part in range(len(regions)))
    bounds = [(heads + num_microbatches * hidden(sum(compute), sum(exchange), share)) / num_ranks, num_microbatches * largest / copies]
    if not both_ways:
        fullest = math.ceil(len(regions) / num_ranks)
        bounds.append(num_microbatches * hidden(sum(compute[:fullest]), sum(exchange[:fullest]), share))
    return max(bounds)


def hidden(compute: float, exchange: float, share: float) -> float:
    """Least seconds of that much compute and exposed communication on one rank: h max(C, X) + (1 - h)(C + X)."""
    return share * max(compute, exchange) + (1 - share) * (compute + exchange)


def head(costs: Costs, placement: Placement, stage: int) -> float:
    """Earliest second at which a microbatch can be at `stage`."""
    seconds, at = 0.0, stage
    while (before := placement.previous[at]) is not None:
        part = placement.position(before)
        seconds += costs.forward[part] + costs.exchange_forward[part] + _hop(costs, placement, before)
        at = before
    return seconds


def _hop(costs: Costs, placement: Placement, stage: int) -> float:
    """Seconds from `stage` to the next of its chain; 0 where both are on one rank."""
    following = placement.following[stage]
    return 0.0 if placement.ranks[stage] == placement.ranks[following] else costs.hop(placement.position(stage))


def _rank_bounds(costs: Costs, placement: Placement, rank: int, num_microbatches: int) -> list[float]:
    stages = placement.stages_of(rank)
    counts = {stage: len(placement.microbatches(stage, num_microbatches)) for stage in stages}
    positions = {stage: placement.position(stage) for stage in stages}
    compute = sum(costs.work(positions[s]) * counts[s] for s in stages)
    exchange = sum(costs.exchange(positions[s]) * counts[s] for s in stages)
    start = min(head(costs, placement, stage) for stage in stages)
    split = sum((costs.forward[positions[s]] + costs.backward_input[positions[s]]) * counts[s] for s in stages)
    after = min(_tail(costs, placement, stage) for stage in stages)
    return [start + hidden(compute, exchange, costs.hidden_share), start + split + after]


def _tail(costs: Costs, placement: Placement, stage: int) -> float:
    """Seconds between the end of an I at `stage` and the end of the step, at least."""
    seconds, at = costs.backward_weight[0], stage
    while (before := placement.previous[at]) is not None:
        part = placement.position(before)
        seconds += costs.backward_input[part] + costs.exchange_backward[part] + _hop(costs, placement, before)
        at = before
    return seconds


def _round_trip(costs: Costs, placement: Placement, chain: tuple[int, ...], start: int) -> float:
    """Seconds from the start of F at the chain's stage number `start` to the end of I there, at least."""
    seconds = 0.0
    for stage in chain[start:]:
        part = placement.position(stage)
        seconds += costs.forward[part] + costs.backward_input[part] + costs.exchange(part)
        if stage != chain[-1]:
            seconds += 2 * _hop(costs, placement, stage)
    return seconds


def _memory_bound(costs: Costs, placement: Placement, rank: int, num_microbatches: int, memory_cap: float) -> float:
    stages = placement.stages_of(rank)
    room = memory_cap - sum(costs.fixed_bytes[placement.position(stage)] for stage in stages)
    area = 0.0
    for chain in placement.chains:
        for number, stage in enumerate(chain):
            if placement.ranks[stage] == rank:
                held = costs.activation_bytes[number] * _round_trip(costs, placement, chain, number)
                held += costs.pending_bytes[number] * costs.backward_weight[number]
                area += held * len(placement.microbatches(stage, num_microbatches))
    return 0.0 if area == 0 else area / room + min(head(costs, placement, stage) for stage in stages) if room > 0 else math.inf
