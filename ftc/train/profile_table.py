"""From the profiler's events to tables: time by phase and region, by operator, and each matrix product on the roofline.

    phase          forward, backward, recomputation (forward code run again inside backward), optimizer, data, validation, other
    region         a block of the model by name, "shell" for what is around the blocks (embedding, final norm, head, loss)
    roofline       bound = min(peak FLOP/s, intensity x bandwidth), intensity = FLOPs / bytes read and written once

An operator of the backward pass belongs to the region of the forward operator with its sequence number. Times are self times, so
that they add up: those of the CPU, or of the device's kernels where there are any. (Williams, Waterman, Patterson 2009: roofline.)
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

REGION, PHASE = "ftc.region:", "ftc.phase:"
SHELL, OTHER = "shell", "other"
_BACKWARD = "autograd::engine::evaluate_function"
# Products by their matrices' places among the arguments.
_ATTENTION = ("aten::_scaled_dot_product_flash", "aten::_scaled_dot_product_efficient", "aten::_scaled_dot_product_cudnn")
_OPERANDS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}


@dataclass(frozen=True)
class Operation:
    """One operator call: seconds of its own, where it belongs, bytes it left allocated, and of a product FLOPs and bytes moved."""

    name: str
    phase: str
    region: str
    seconds: float
    kept_bytes: int = 0
    shapes: str = ""
    flops: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Roof:
    """What the machine can do: FLOP/s in the training dtype, bytes/s of memory."""

    flops: float
    bandwidth: float

    def bound(self, intensity: float) -> float:
        """FLOP/s that a product of `intensity` FLOPs a byte can reach."""
        return min(self.flops, intensity * self.bandwidth)


def operations(events: Iterable[Any], itemsize: int) -> list[Operation]:
    """Every operator among the profiler's events (`profile.events()`), annotations left out. itemsize: bytes of an element."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    places = _Places(events)
    return [places.operation(event, itemsize) for event in events if not _is_annotation(event)]


class _Places:
    """Phase and region of each event."""

    def __init__(self, events: Sequence[Any]):
        self.on_device = any(event.self_device_time_total > 0 for event in events)
        self._forward: dict[int, str] = {}
        for event in events:
            if event.sequence_nr >= 0 and not self._ancestor(event, _BACKWARD):
                region = self._region(event)
                if region is not None:
                    self._forward.setdefault(event.sequence_nr, region)

    def operation(self, event: Any, itemsize: int) -> Operation:
        phase, region = self._place(event)
        seconds = (event.self_device_time_total if self.on_device else event.self_cpu_time_total) * 1e-6
        flops, num_bytes, shapes = _product(event, itemsize)
        kept = event.self_device_memory_usage if self.on_device else event.self_cpu_memory_usage
        return Operation(event.name, phase, region, seconds, kept, shapes, flops, num_bytes)

    def _place(self, event: Any) -> tuple[str, str]:
        backward = self._ancestor(event, _BACKWARD)
        if backward is None:
            phase = self._ancestor(event, PHASE)
            name = phase.name.removeprefix(PHASE) if phase is not None else OTHER
            region = self._region(event)
            return (name, region) if name == "forward" else (name, "")
        region = self._region(event, within=backward)
        if region is not None:
            return "recomputation", region
        return "backward", self._forward.get(backward.sequence_nr, SHELL)

    def _region(self, event: Any, within: Any = None) -> str | None:
        """The innermost region around the event, below `within`; the shell's for a forward event in none."""
        while event is not None and event is not within:
            if event.name.startswith(REGION):
                return event.name.removeprefix(REGION)
            event = event.cpu_parent
        return SHELL if within is None else None

    def _ancestor(self, event: Any, start: str) -> Any | None:
        while event is not None:
            if event.name.startswith(start):
                return event
            event = event.cpu_parent
        return None


def _is_annotation(event: Any) -> bool:
    return event.name.startswith((REGION, PHASE, "ProfilerStep", "[memory]"))


def _product(event: Any, itemsize: int) -> tuple[int, int, str]:
    """FLOPs (2 a multiplication with its addition), bytes of operands and result, and the operands' shapes, of a product or
    of attention; else zeros."""
    if event.name.startswith(_ATTENTION):
        return _attention(event, itemsize)
    places, shapes = _OPERANDS.get(event.name), event.input_shapes or []
    if places is None or max(places) >= len(shapes) or not all(shapes[p] for p in places):
        return 0, 0, ""
    left, right = (list(shapes[p]) for p in places)
    operator = getattr(torch.ops.aten, "bmm" if len(left) == 3 else "mm")
    flops = flop_registry[operator](left, right)
    elements = _size(left) + _size(right) + _size([*left[:-1], right[-1]])
    return int(flops), elements * itemsize, f"{_shown(left)} @ {_shown(right)}"


def _attention(event: Any, itemsize: int) -> tuple[int, int, str]:
    """Of fused attention: queries, keys and values are its first [B, H, T, D], after the gradient in backward."""
    backward = "_backward" in event.name
    shapes = [list(s) for s in event.input_shapes or [] if len(s) == 4]
    if len(shapes) < (4 if backward else 3):
        return 0, 0, ""
    query, key = shapes[1:3] if backward else shapes[:2]
    if backward:
        flops, moved = sdpa_backward_flop_count(*shapes[:4]), [*shapes[:4], *shapes[1:4]]
    else:
        flops, moved = sdpa_flop_count(*shapes[:3]), [*shapes[:3], shapes[0]]
    return int(flops), itemsize * sum(_size(shape) for shape in moved), f"attention {_shown(query)}, {_shown(key)}"


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _size(shape: Sequence[int]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


@dataclass(frozen=True)
class Profile:
    """What a few steps took. `seconds`: of all of them, by the clock; `peak_bytes`: the most that the allocator had handed out."""

    operations: Sequence[Operation]
    seconds: float
    steps: int
    roof: Roof
    dtype: str
    device: str
    peak_bytes: int = 0

    @cached_property
    def total(self) -> float:
        """Seconds of all operators."""
        return sum(op.seconds for op in self.operations)

    def by_region(self) -> list[dict[str, Any]]:
        """One row for each region and phase: seconds a step, share of the step, FLOPs of its products, FLOP/s."""
        return self._grouped(lambda op: (op.phase, op.region), ("phase", "region"))

    def by_operator(self) -> list[dict[str, Any]]:
        """One row for each operator."""
        return self._grouped(lambda op: (op.name,), ("operator",))

    def products(self) -> list[dict[str, Any]]:
        """One row for each kind of matrix product and attention: shapes, intensity, FLOP/s reached, its bound, and the share of it reached."""
        rows = self._grouped(lambda op: (op.name, op.shapes, op.phase), ("operator", "shapes", "phase"), products=True)
        for row in rows:
            row["intensity"] = row["flops"] / row["bytes"]
            row["bound"] = self.roof.bound(row["intensity"])
            row["limit"] = "compute" if row["bound"] == self.roof.flops else "memory"
            row["of_roof"] = row["flops_per_second"] / row["bound"]
        return rows

    def _grouped(self, key: Any, names: Sequence[str], products: bool = False) -> list[dict[str, Any]]:
        groups: Mapping[tuple, list[Operation]] = defaultdict(list)
        for op in self.operations:
            if not products or op.flops:
                groups[key(op)].append(op)
        rows = []
        for values, members in groups.items():
            seconds, flops = sum(op.seconds for op in members), sum(op.flops for op in members)
            row = dict(zip(names, values, strict=True))
            row |= {"seconds": seconds / self.steps, "share": seconds / self.seconds, "calls": len(members) / self.steps}
            row["kept_bytes"] = sum(op.kept_bytes for op in members) / self.steps
            row |= {"flops": flops / self.steps, "bytes": sum(op.num_bytes for op in members) / self.steps}
            row["flops_per_second"] = flops / seconds if seconds else 0.0
            rows.append(row)
        return sorted(rows, key=lambda row: -row["seconds"])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "steps": self.steps, "seconds_per_step": self.seconds / self.steps, "in_operators": self.total / self.seconds,
            "device": self.device, "dtype": self.dtype, "peak_flops": self.roof.flops, "bandwidth": self.roof.bandwidth,
            "peak_bytes": self.peak_bytes,
            "regions": self.by_region(), "operators": self.by_operator(), "products": self.products(),
        }  # fmt: skip
