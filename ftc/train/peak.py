"""What the machine can do at best: FLOP/s of a matrix product and bytes/s of memory, measured or from the device's table."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ftc.files import atomic_write

PEAK_FILE = "peak.json"
_SIDE = 1024  # of the measured product: 2.1 GFLOP
_COPY_BYTES = 1 << 27  # larger than the last-level caches
_SECONDS = 0.3


def measured_flops(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of the fastest of the products [1024, 1024] x [1024, 1024] that fit into 0.3 s, with the threads of this process."""
    side = _SIDE if device == "cpu" else 8 * _SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


def measured_bandwidth(device: str = "cpu") -> float:
    """Bytes/s, read and written, of the fastest of the copies of 128 MiB that fit into 0.3 s."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _fastest(lambda: target.copy_(source), device)


def _fastest(action: Callable[[], object], device: str) -> float:
    """Seconds of the fastest call after one to warm up."""
    wait = getattr(getattr(torch, device, None), "synchronize", lambda: None)
    action(), wait()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        action(), wait()
        best = min(best, time.perf_counter() - started)
    return best


def run_peak_flops(folder: Path, dtype: torch.dtype) -> float:
    """The CPU's FLOP/s in `dtype`, measured once for a run: all ranks at the same time, so that it is one rank's part of the
    machine. The first rank keeps it in the run's folder, so that a run that goes on has the same peak."""
    from ftc.train.ranks import is_first_rank

    place, key = folder / PEAK_FILE, f"{dtype} on {torch.get_num_threads()} threads"
    try:
        return float(json.loads(place.read_text())[key])
    except (OSError, ValueError, KeyError):
        flops = measured_flops(dtype)
    if is_first_rank():
        atomic_write(place, json.dumps({key: flops}) + "\n")
    return flops
