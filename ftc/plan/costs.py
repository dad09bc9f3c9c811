"""What a stage, or a region, costs: seconds of compute, exposed communication, hops between neighbours, bytes that stay alive.

One `Costs` holds n parts of a model in their order. The planner starts from regions (n = L), joins neighbours into stages with
`joined`, and reads stages (n = S). All seconds and activation bytes are for one microbatch of `1 / microbatches` of the step's batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ftc.errors import FtcError

_PER_PART = (
    "forward", "backward_input", "backward_weight", "exchange_forward", "exchange_backward", "activation_bytes", "pending_bytes", "fixed_bytes",
)


@dataclass(frozen=True)
class Costs:
    """Costs of n neighbouring parts of a model; every tuple has n entries but `boundary_bytes`, which has n - 1.

    forward, backward_input, backward_weight: seconds of compute of F, I and W; a full backward takes I + W.
    exchange_forward, exchange_backward: seconds of communication inside F and inside I (or B), such as an expert all-to-all, that
        compute of the same microbatch waits for; a pair F&B hides them (`pair_seconds`).
    activation_bytes: kept from the start of F to the end of I (or B).   pending_bytes: what W needs, kept from the end of I to the end of W.
    fixed_bytes: weights, gradients and optimizer state.
    boundary_bytes: what a microbatch sends over the boundary after each part but the last; its gradient is as large.
    hop_latency (seconds) and bytes_per_second: a hop between two ranks takes hop_latency + boundary_bytes / bytes_per_second.
    hidden_share: how much of what a pair could hide it does hide, 0 to 1 (measured; 1 is perfect overlap).
    launch_seconds: the part of each F, I and W of one part that does not shrink with the microbatch.
    microbatches: the number of microbatches of a step these costs are for.
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    exchange_forward: tuple[float, ...] = ()
    exchange_backward: tuple[float, ...] = ()
    activation_bytes: tuple[float, ...] = ()
    pending_bytes: tuple[float, ...] = ()
    fixed_bytes: tuple[float, ...] = ()
    boundary_bytes: tuple[float, ...] = ()
    hop_latency: float = 0.0
    bytes_per_second: float = math.inf
    hidden_share: float = 1.0
    launch_seconds: float = 0.0
    microbatches: int = 1

    def __post_init__(self) -> None:
        count = len(self.forward)
        for name in (*_PER_PART, "boundary_bytes"):
            expected = count - (name == "boundary_bytes")
            values = tuple(float(value) for value in getattr(self, name)) or (0.0,) * expected
            if len(values) != expected:
                raise FtcError(f"{name} has {len(values)} entries: {expected} expected for {count} parts")
            for index, value in enumerate(values):
                if not (math.isfinite(value) and value >= 0):
                    raise FtcError(f"{name}[{index}] = {value}: a cost is finite and not negative")
            object.__setattr__(self, name, values)
        if count == 0 or not sum(self.forward) + sum(self.backward_input) + sum(self.backward_weight) > 0:
            raise FtcError("costs need at least one part, and some of the compute must take time")
        if not (math.isfinite(self.hop_latency) and self.hop_latency >= 0 and self.bytes_per_second > 0 and self.launch_seconds >= 0):
            raise FtcError(
                f"hop_latency {self.hop_latency}, bytes_per_second {self.bytes_per_second}, launch_seconds {self.launch_seconds}: "
                "latencies are not negative, the bandwidth is above 0"
            )
        if not 0 <= self.hidden_share <= 1 or self.microbatches < 1:
            raise FtcError(f"hidden_share {self.hidden_share} must be from 0 to 1, microbatches {self.microbatches} at least 1")

    def __len__(self) -> int:
        return len(self.forward)

    @classmethod
    def uniform(cls, count: int, forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0, **others: object) -> Costs:
        """`count` equal parts; `activation_bytes`, `exchange_forward` and the like are one number each for all of them."""
        spread = {name: (value,) * count if name in _PER_PART else value for name, value in others.items()}
        return cls((forward,) * count, (backward_input,) * count, (backward_weight,) * count, **spread)

    def hop(self, part: int) -> float:
        """Seconds from `part` to the next one on another rank, either way."""
        return self.hop_latency + self.boundary_bytes[part] / self.bytes_per_second

    def work(self, part: int) -> float:
        """Seconds of compute of one microbatch in this part: F + I + W."""
        return self.forward[part] + self.backward_input[part] + self.backward_weight[part]

    def exchange(self, part: int) -> float:
        """Seconds of exposed communication of one microbatch in this part."""
        return self.exchange_forward[part] + self.exchange_backward[part]

    def pair_seconds(self, forward_part: int, backward_part: int, full: bool = True) -> float:
        """Seconds of the forward of one part and the backward of another at the same time.

        Compute goes one after the other on the device, communication on the network, and each half is a chain of its own:

            ideal = max(f + b, xf + xb, f + xf, b + xb),    serial = f + b + xf + xb,    b = I + W (`full`) or I
            pair  = serial - hidden_share (serial - ideal)
        """
        f, xf = self.forward[forward_part], self.exchange_forward[forward_part]
        b, xb = self.backward_input[backward_part], self.exchange_backward[backward_part]
        if full:
            b += self.backward_weight[backward_part]
        serial = f + b + xf + xb
        return serial - self.hidden_share * (serial - max(f + b, xf + xb, f + xf, b + xb))

    def joined(self, bounds: Sequence[int]) -> Costs:
        """The costs of stages made of neighbouring parts; `bounds` is the index of the first part of each stage but the first.

        Raises FtcError where bounds do not rise from 1 to n - 1.
        """
        edges = [0, *bounds, len(self)]
        if any(low >= high for low, high in zip(edges, edges[1:], strict=False)):
            raise FtcError(f"bounds {list(bounds)} for {len(self)} regions: they must rise from 1 to {len(self) - 1}, so that no stage is empty")
        sums = {name: tuple(sum(getattr(self, name)[low:high]) for low, high in zip(edges, edges[1:], strict=False)) for name in _PER_PART}
        return replace(self, **sums, boundary_bytes=tuple(self.boundary_bytes[bound - 1] for bound in bounds))

    def for_microbatches(self, microbatches: int) -> Costs:
        """The same model and batch, divided into another number of microbatches: all but `launch_seconds` and fixed bytes scale."""
        if microbatches < 1:
            raise FtcError(f"{microbatches} microbatches: at least 1")
        factor, launch = self.microbatches / microbatches, self.launch_seconds
        scaled = {name: tuple(value * factor for value in getattr(self, name)) for name in (*_PER_PART, "boundary_bytes") if name != "fixed_bytes"}
        for name in ("forward", "backward_input", "backward_weight"):
            scaled[name] = tuple(min(value, launch) + max(value - launch, 0.0) * factor for value in getattr(self, name))
        return replace(self, **scaled, microbatches=microbatches)

    def with_ends(self, first: Costs, last: Costs) -> Costs:
        """These parts, with what the embedding (`first`) and the head and loss (`last`) cost added to the first and the last of them."""
        for name, end in (("first", first), ("last", last)):
            if len(end) != 1:
                raise FtcError(f"{name} has {len(end)} parts: the costs of one end are one part")
        changed = {}
        for name in _PER_PART:
            values = list(getattr(self, name))
            values[0] += getattr(first, name)[0]
            values[-1] += getattr(last, name)[0]
            changed[name] = tuple(values)
        return replace(self, **changed)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
