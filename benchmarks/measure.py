"""What the benchmarks share: alternating timings, peak memory in a process of its own, one table and one line of JSON.

A benchmark script imports this file as `import measure` (scripts in one folder see each other), times with `compare`, asks
`peak_memory` for the bytes a function takes, and ends with `finish`, which prints the table and, as the last line, the JSON.

A function for `peak_memory` stands at the top of its script as a *setup*: called with JSON-able keywords, it builds the inputs and
returns a function without arguments; only what that one takes above the inputs is measured. Scripts guard their main part with
`if __name__ == "__main__":` because the process that measures imports them.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate over the rounds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, float | int]:
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "rounds": len(self.seconds),
        }

    def __str__(self) -> str:
        return f"{_seconds(self.median)} ({_seconds(min(self.seconds))} to {_seconds(max(self.seconds))})"


@dataclass(frozen=True)
class Comparison:
    """Two candidates timed in turns; ratios are `candidate` over `baseline`, one for each round."""

    baseline: Timing
    candidate: Timing

    @property
    def ratios(self) -> list[float]:
        return [c / b for b, c in zip(self.baseline.seconds, self.candidate.seconds, strict=True)]

    @property
    def ratio(self) -> float:
        """Median over rounds of the ratio within a round, which a machine that slows down for a while disturbs least."""
        return statistics.median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        timings = {timing.name: timing.as_dict() for timing in (self.baseline, self.candidate)}
        return {**timings, "ratio": self.ratio, "ratio_min": min(self.ratios), "ratio_max": max(self.ratios)}


def timing_options(parser: argparse.ArgumentParser) -> None:
    """The options that benchmarks of time share: threads, rounds, where the JSON goes, and whether a missed number fails."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, garbage collected before and the accelerator waited for after."""
    gc.collect()
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def compare(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    names: tuple[str, str] = ("baseline", "candidate"),
    rounds: int = 5,
    warmup: int = 1,
) -> Comparison:
    """Time both in alternating rounds (AB, BA, AB, ...) so that drift and neighbours hit both alike."""
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    for _ in range(warmup):
        baseline()
        candidate()
    taken: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            taken[which].append(seconds((baseline, candidate)[which]))
    return Comparison(Timing(names[0], tuple(taken[0])), Timing(names[1], tuple(taken[1])))


def peak_memory(setup: Callable[..., Callable[[], Any]], threads: int | None = None, **keywords: Any) -> dict[str, int]:
    """Bytes that `setup(**keywords)()` takes at its peak, measured in a fresh Python process.

    Returns {"before": in use when the function starts, "peak": highest in use, "above": their difference}: resident memory of
    the process on CPU, allocated memory on CUDA where the function leaves any there. Raises RuntimeError with the child's output.
    """
    request = {"script": str(Path(setup.__code__.co_filename).resolve()), "setup": setup.__name__, "keywords": keywords}
    count = str(threads if threads is not None else torch.get_num_threads())
    # A fixed mmap threshold hands large blocks back to the system at once, so that resident memory follows live tensors.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "FTC_PEAK": json.dumps(request),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {setup.__name__}({keywords}) failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def finish(
    name: str,
    rows: list[tuple[str, str, str, bool | None]],
    result: dict[str, Any],
    fail: bool = False,
    json_out: str | None = None,
) -> None:
    """Print the table of `rows` (what, measured, asked, met or None), then one line of JSON with the machine it ran on.

    With `fail` the process exits with code 1 where a row is not met; with `json_out` the JSON is written to that file too.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "measured", "asked", "met", title=name)
    for what, measured, asked, met in rows:
        table.add_row(what, measured, asked, {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[met])
    Console().print(table)
    met = all(row[3] is not False for row in rows)
    record = {"benchmark": name, "met": met, **result, "machine": machine()}
    print(json.dumps(record), flush=True)
    if json_out is not None:
        Path(json_out).parent.mkdir(parents=True, exist_ok=True)
        Path(json_out).write_text(json.dumps(record, indent=1) + "\n")
    if fail and not met:
        sys.exit(1)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class _PeakResident:
    """Highest resident memory while inside: the kernel's own mark where it can be reset, else sampled every 2 ms."""

    def __enter__(self) -> "_PeakResident":
        self.before = self.peak = _status_bytes("VmRSS")
        self._thread = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _status_bytes("VmRSS"))

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            self.peak = _status_bytes("VmHWM")
        else:
            self._stop.set()
            self._thread.join()


def _measure_child(request: dict[str, Any]) -> dict[str, int]:
    script = Path(request["script"])
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, request["setup"])(**request["keywords"])
    gc.collect()
    cuda = torch.cuda.is_available() and torch.cuda.memory_allocated() > 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with _PeakResident() as resident:
        kept = function()
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        before, peak = resident.before, resident.peak
    del kept
    return {"before": before, "peak": peak, "above": peak - before}


if __name__ == "__main__":
    print(json.dumps(_measure_child(json.loads(os.environ["FTC_PEAK"]))))
