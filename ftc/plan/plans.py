"""A plan: a schedule together with what it was made for, what it takes on paper, and how far that is from what no schedule can beat."""

from __future__ import annotations

from dataclasses import dataclass, field

from ftc.plan.actions import Placement, Schedule
from ftc.plan.costs import Costs
from ftc.plan.simulate import Simulated


@dataclass(frozen=True)
class Plan:
    """One way to run a step.

    name: "searched", or the name of a known schedule.   schedule, placement: see `actions`.
    partition: the index of the first region of each stage but the first, as `ftc.pipeline.cut` takes it.
    num_microbatches: of the step.   costs: of the stages, for one microbatch.   result: the simulation of it.
    bound_seconds: no schedule of this partition, placement and number of microbatches takes less (`bound.step_bound`).
    """

    name: str
    schedule: Schedule = field(repr=False)
    placement: Placement
    partition: tuple[int, ...]
    num_microbatches: int
    costs: Costs = field(repr=False)
    result: Simulated = field(repr=False)
    bound_seconds: float

    @property
    def step_seconds(self) -> float:
        return self.result.step_seconds

    @property
    def peak_bytes(self) -> float:
        """Of the rank that holds most."""
        return max(self.result.peak_bytes)

    @property
    def gap(self) -> float:
        """Share by which the step is longer than its bound; 0 is a proof that nothing is faster."""
        return self.step_seconds / self.bound_seconds - 1


@dataclass(frozen=True)
class Progress:
    """What a search tells while it runs: seconds since its start, schedules tried, and the best plan's step, peak and gap so far."""

    elapsed_seconds: float
    seconds: float
    tried: int
    step_seconds: float
    peak_bytes: float
    gap: float
