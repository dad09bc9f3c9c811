"""Seconds of what runs inside: of a device, or by the roofline of a machine that is not here."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch

from ftc.errors import FtcError
from ftc.plan.roofline import Machine, Roofline


@contextlib.contextmanager
def clock(device: torch.device, machine: Machine | None) -> Iterator[list[float]]:
    """Yields a list that holds the seconds of what ran inside, once it has ended."""
    taken: list[float] = []
    if machine is not None:
        with Roofline(machine) as model:
            yield taken
        taken.append(model.seconds)
        return
    synchronize(device)
    started = time.perf_counter()
    yield taken
    synchronize(device)
    taken.append(time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Reader:
    """Reads the clock at marks within one forward pass."""

    def __init__(self, device: torch.device, machine: Machine | None):
        self.device, self.model = device, None if machine is None else Roofline(machine)
        self.marks: list[float] = []

    def mark(self) -> None:
        synchronize(self.device)
        self.marks.append(time.perf_counter() if self.model is None else self.model.seconds)

    def laps(self) -> tuple[float, ...]:
        """Seconds from the start to the first region, to the last region, and to the end. Where marks are missing, an error."""
        if len(self.marks) != 4 or any(not math.isfinite(m) for m in self.marks):
            raise FtcError("the step does not run its first and its last region once each; its costs cannot be known")
        return tuple(b - a for a, b in zip(self.marks, self.marks[1:], strict=False))

    def __enter__(self) -> Reader:
        if self.model is not None:
            self.model.__enter__()
        self.mark()
        return self

    def __exit__(self, *error: object) -> None:
        self.mark()
        if self.model is not None:
            self.model.__exit__(*error)
