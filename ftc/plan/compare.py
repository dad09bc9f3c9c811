"""Every known schedule that fits, with stages cut by cost, beside the one that a search finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ftc.errors import FtcError
from ftc.pipeline.partition import partition
from ftc.plan.bound import partition_bound, step_bound
from ftc.plan.costs import Costs
from ftc.plan.known import NAMES, known
from ftc.plan.plans import Plan, Progress
from ftc.plan.search import search
from ftc.plan.simulate import simulate

SEARCHED = "searched"


@dataclass(frozen=True)
class Compared:
    """Plans, fastest first; `best` is the fastest within the memory cap. left_out: known schedules that do not fit, and why."""

    plans: tuple[Plan, ...]
    best: Plan
    left_out: dict[str, str]
    bound_seconds: float  # no schedule of any partition takes less

    @property
    def searched(self) -> Plan:
        """The one that the search found."""
        return next(plan for plan in self.plans if plan.name == SEARCHED)


def known_plan(name: str, regions: Costs, num_ranks: int, num_microbatches: int) -> Plan:
    """A known schedule on its own placement, the regions cut so that its busiest rank has least. FtcError where it does not fit."""
    schedule, placement = known(name, num_ranks, num_microbatches)
    works = [regions.work(part) + regions.exchange(part) for part in range(len(regions))]
    style = "loop" if placement.style == "loop" else "v"  # a mirrored rank bears stages r and P - 1 - r, as the two halves of a V
    bounds = partition(works, len(placement.chains[0]), placement=style)
    costs = regions.for_microbatches(num_microbatches).joined(bounds)
    bound = step_bound(costs, placement, num_microbatches)
    return Plan(name, schedule, placement, bounds, num_microbatches, costs, simulate(schedule, costs, placement), bound)


def compare(
    regions: Costs, num_ranks: int, counts: Sequence[int], memory_cap: float | None = None, *, seconds: float = 30.0, seed: int = 0,
    tell: Callable[[str], None] = lambda said: None, follow: Callable[[Progress], None] = lambda progress: None,
) -> Compared:  # fmt: skip
    """Simulate and search. regions: costs of the model's regions, embedding and head at the ends; counts: numbers of microbatches to choose among.

    memory_cap: bytes that no rank may pass; known schedules past it are shown all the same, the search keeps to it. Raises FtcError for more
    ranks than regions, and for a cap below the possible.
    """
    if num_ranks > len(regions):
        raise FtcError(f"{num_ranks} ranks for {len(regions)} regions: each stage takes at least one; use {len(regions)} ranks or fewer")
    plans: dict[str, Plan] = {}
    left_out: dict[str, str] = {}
    for name in NAMES:
        tell(f"simulating {name}")
        tried = []
        for count in counts:
            try:
                tried.append(known_plan(name, regions, num_ranks, count))
            except FtcError as error:
                left_out[name] = str(error)
        if tried:
            left_out.pop(name, None)
            plans[name] = min(tried, key=lambda plan: (memory_cap is not None and plan.peak_bytes > memory_cap, plan.step_seconds))
    tell("searching")
    plans[SEARCHED] = search(regions, num_ranks, counts, memory_cap=memory_cap, seconds=seconds, seed=seed, tell=follow)
    ordered = tuple(sorted(plans.values(), key=lambda plan: plan.step_seconds))
    within = [plan for plan in ordered if memory_cap is None or plan.peak_bytes <= memory_cap]
    both_ways = "DualPipe" in plans  # it shares each region's work between two ranks, and may be below the bound of the others
    bound = min(partition_bound(regions.for_microbatches(count), num_ranks, count, both_ways) for count in counts)
    return Compared(ordered, within[0], left_out, bound)
