"""What the parts of a program cost: embedding, regions, head; and the same as `Costs` for the planner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ftc.plan.costs import Costs


@dataclass(frozen=True)
class PartCost:
    """One region, or a part of the shell. Seconds of a microbatch, and bytes."""

    name: str
    forward: float
    input_gradient: float
    weight_gradient: float
    activation_bytes: int  # kept from the forward to the backward pass
    pending_bytes: int  # kept for W once I is done
    output_bytes: int  # what the next part is given
    num_parameters: int

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class RunCosts:
    """All parts of a program in order: embedding, regions, head."""

    first: PartCost
    regions: tuple[PartCost, ...]
    last: PartCost
    source: str  # where the numbers come from, in words

    def costs(self, bytes_per_parameter: float, microbatches: int, hop_latency: float = 0.0, bytes_per_second: float = math.inf, exchange: float = 0.0) -> Costs:
        """For the planner. bytes_per_parameter: of weights, gradients and optimizer state on one rank. exchange: seconds of exposed communication in each
        region's forward, and again in its backward."""
        first, last = ([_as_costs([part], bytes_per_parameter)] for part in (self.first, self.last))
        inside = replace(
            _as_costs(self.regions, bytes_per_parameter), exchange_forward=(exchange,) * len(self.regions), exchange_backward=(exchange,) * len(self.regions),
            boundary_bytes=tuple(part.output_bytes for part in self.regions[:-1]), hop_latency=hop_latency, bytes_per_second=bytes_per_second, microbatches=microbatches,
        )  # fmt: skip
        return inside.with_ends(*first, *last)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"source": self.source, "parts": [vars(part) for part in (self.first, *self.regions, self.last)]}


def _as_costs(parts: Sequence[PartCost], bytes_per_parameter: float) -> Costs:
    """Costs without boundaries."""
    return Costs(
        tuple(p.forward for p in parts), tuple(p.input_gradient for p in parts), tuple(p.weight_gradient for p in parts),
        activation_bytes=tuple(p.activation_bytes for p in parts), pending_bytes=tuple(p.pending_bytes for p in parts),
        fixed_bytes=tuple(p.num_parameters * bytes_per_parameter for p in parts),
    )  # fmt: skip


def part_cost(name: str, times: tuple[float, float, float], kept: tuple[int, int], weights: list[Tensor], outputs: list[Tensor]) -> PartCost:
    """times: of F, I and W; kept: bytes for I and for W."""
    return PartCost(name, *times, *kept, sum(t.numel() * t.element_size() for t in outputs), sum(t.numel() for t in weights))
