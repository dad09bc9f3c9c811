"""Memory that torch's CPU allocator hands out and takes back, from the profiler's own record of both."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from ftc.train.ledger import num_bytes


def allocator_events(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The result of `function()`, and the bytes that each allocation (positive) and release (negative) on the CPU took
    meanwhile, in order, of the threads that the profiler sees (not those of gloo)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    return result, memory_events(profile)


def memory_events(profile: Any) -> list[int]:
    """The bytes of each allocation (positive) and release (negative) on the CPU that a profile with memory recorded, in order."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == torch.autograd.DeviceType.CPU]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def peak_bytes(events: list[int], before: int = 0) -> int:
    """The highest sum of `events` so far, over `before` bytes that were in use when they began."""
    peak = current = before
    for nbytes in events:
        current += nbytes
        peak = max(peak, current)
    return peak


def bytes_in_use() -> int:
    """Bytes of all CPU tensors that Python can reach. Call it between steps, when autograd holds none."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return num_bytes(t for t in tensors if t.device.type == "cpu" and not is_fake(t))


def step_peaks(step: Callable[[], Any], steps: int = 2) -> list[int]:
    """The most bytes that the CPU allocator had handed out during each of `steps` calls of `step`.

    What is in use is counted anew before each: the profiler does not see what gloo's threads release, and the sum of the
    events would grow with each step. Within a step such releases still count as not made.
    """
    peaks = []
    for _ in range(steps):
        before = bytes_in_use()
        _, events = allocator_events(step)
        peaks.append(peak_bytes(events, before))
    return peaks
