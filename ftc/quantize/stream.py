"""A program run on all of its calibration text at once, stopped at each region: what goes in is there for every batch before anything goes on.

Each batch runs in a thread of its own, one at a time, so that whatever stands between the regions runs as in any call and only the values that the
next region reads are in memory. Several streams go side by side (the original's values and those after quantisation).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ftc.capture.program import Program
from ftc.errors import FtcFailure
from ftc.rewrite.calibration import Batches

Call = tuple[tuple, dict]
Visit = Callable[[str, list[list[Call]]], list[list[Any]]]


class _Stop(BaseException):
    """Ends a run whose results nobody wants."""


class _Worker(threading.Thread):
    """One batch of one stream; runs only between `advance` and the next region."""

    def __init__(self, program: Program, batch: dict):
        super().__init__(daemon=True)
        self.program, self.batch = program, batch
        self.go, self.parked = threading.Semaphore(0), threading.Semaphore(0)
        self.region: str | None = None
        self.call: Call | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.stopped = False

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                with torch.no_grad():
                    self.program(**self.batch)
        except _Stop:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by `advance`
            self.error = error
        self.region = None
        self.parked.release()

    def at(self, region: str, args: tuple, kwargs: dict) -> Any:
        """Called by the region: wait until the visit of all batches has its result."""
        self.region, self.call = region, (args, kwargs)
        self.parked.release()
        self.go.acquire()
        if self.stopped:
            raise _Stop
        return self.result

    def advance(self) -> None:
        self.go.release()
        self.parked.acquire()
        if self.error is not None:
            raise self.error


def walk(program: Program, batches: Batches, visit: Visit, names: Sequence[str], streams: int = 2) -> None:
    """Call `visit(region, calls)` once for each region in `names`, in the order in which the program runs them, with calls[stream][batch] = (args,
    kwargs) and the results that go on in their places as its answer. Other regions run as they are. Eval mode; `around` and modes are restored.

    Raises FtcFailure where batches do not go through the same regions in one order.
    """
    before = {name: program._regions[name].around for name in names}
    training, left = program.training, set(names)
    workers = [[_Worker(program, batch) for batch in batches] for _ in range(streams)]
    everyone = [worker for stream in workers for worker in stream]

    def around(name: str):
        return lambda run, args, kwargs: threading.current_thread().at(name, args, kwargs)

    try:
        program.eval()
        for name in names:
            program._regions[name].around = around(name)
        for worker in everyone:
            worker.start()
        while left:
            for worker in everyone:
                worker.advance()
            places = {worker.region for worker in everyone}
            if len(places) > 1 or None in places or not places <= left:
                raise FtcFailure(f"the batches of calibration text do not go through the same blocks in one order: {sorted(map(str, places))}")
            (name,) = places
            left.discard(name)
            results = visit(name, [[worker.call for worker in stream] for stream in workers])
            for stream, values in zip(workers, results, strict=True):
                for worker, value in zip(stream, values, strict=True):
                    worker.result, worker.call = value, None
    finally:
        for worker in everyone:
            worker.stopped = True
            worker.go.release()
        for worker in everyone:
            if worker.is_alive():
                worker.join()
        for name, function in before.items():
            program._regions[name].around = function
        program.train(training)
