"""Work for the ranks of test_hang.py: waits that no other rank ends, until all have told where they stand."""

import contextlib
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ftc.train import hang
from ftc.train.hang import HangWatch

LIMIT = 0.5


@contextlib.contextmanager
def watched(folder, said):
    hang.GATHERING_SECONDS = 1.0
    place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    watch = HangWatch(Path(folder), place, (LIMIT, LIMIT, LIMIT), said.append)
    watch.beat(5, "in its step")
    try:
        yield watch
    finally:
        watch.close()


def oversleep(folder):
    """Longer than it takes to report."""
    end = time.monotonic() + 30
    while time.monotonic() < end and not (Path(folder) / "hang" / "report.txt").exists():
        time.sleep(0.05)


def a_rank_that_sleeps(folder):
    said = []
    for _ in range(2):
        dist.all_reduce(torch.ones(4))
    with watched(folder, said) as watch:
        if dist.get_rank() == 1:
            watch.beat(5, "reading data")
            oversleep(folder)
        dist.all_reduce(torch.ones(4))
        oversleep(folder)
    return said[0] if said else None


def a_rank_that_goes_on(folder, silence=3.0):
    said = []
    with watched(folder, said) as watch:
        end = time.monotonic() + silence
        while time.monotonic() < end and not said:
            time.sleep(0.05)
        watch.beat(6, "reading data", step_ended=True)
        while silence and len(said) < 2 and time.monotonic() < end + 3:
            time.sleep(0.05)
            watch.beat(6, "reading data")
    return said
