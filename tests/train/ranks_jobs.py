"""What test_parallel and test_parallel_division share: runs on one process and several, each of two steps, in one pool of ranks."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from ftc.train.config import dump_toml
from ftc.train.launch import resolve

Run = tuple[int, int, dict]  # ranks, batch of a rank, changes of the run file


def mixture(work: Path) -> list[dict]:
    """A held and a streamed source of 90 records each, no two alike."""
    for name in ("held", "records"):
        lines = [json.dumps({"text": f"{name} {number * number} " * (3 + number % 5)}) for number in range(90)]
        (work / f"{name}.jsonl").write_text("\n".join(lines))
    streamed = {"path": str(work / "records.jsonl"), "name": "records", "streaming": True}
    return [{"path": str(work / "held.jsonl"), "name": "held", "weight": 2.0}, streamed]


def run_file(work: Path, data: Path, name: str, run: Run) -> str:
    _, batch, changes = run
    values = {
        "model": {"name": "ftc", "flavor": "tiny"},
        "ftc": {"data": str(data), "vocab_size": 300, "validation_fraction": 0.3},
        "training": {"steps": 2, "local_batch_size": batch, "seq_len": 32, "mixed_precision_param": "float32"},
        "metrics": {"log_freq": 1},
        "lr_scheduler": {"warmup_steps": 1},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }
    changes = {key: mixture(work) if value == "MIXTURE" else value for key, value in changes.items()}
    path = work / f"{name}.toml"
    path.write_text(dump_toml(resolve(values, changes)))
    return str(path)


def finished(ranks: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit codes; when one rank fails, or time is over, the others, which would wait for it, are killed."""
    end = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks) or time.monotonic() > end:
            time.sleep(1)
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    return [rank.wait() for rank in ranks]


def results_of(
    runs: Mapping[str, Run], work: Path, data: Path, steps: Mapping | None = None, after: Mapping | None = None, weights: Sequence[str] = (),
    poison: Mapping | None = None,
) -> dict:  # fmt: skip
    """Losses and gradients of each run, trained one after another; see ranks_worker.py."""
    jobs = [
        {"name": n, "ranks": run[0], "arguments": ["--job.config_file", run_file(work, data, n, run)]}
        | {"steps": (steps or {}).get(n, 2), "after": (after or {}).get(n), "weights": n in weights, "poison": (poison or {}).get(n)}
        for n, run in runs.items()
    ]
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("ranks_worker.py")
    logs = [(work / f"rank{rank}.log").open("w") for rank in range(4)]
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(work)], stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    codes = finished(ranks, seconds=max(400, 30 * len(jobs)))
    failed = next((i for i, code in enumerate(codes) if code not in (0, -signal.SIGKILL)), 0)
    assert codes == [0] * 4, (work / f"rank{failed}.log").read_text()[-3000:]
    return {name: torch.load(work / f"{name}.pt", weights_only=True) for name in runs}


def assert_alike(expected: dict, found: dict) -> None:
    """Losses and every gradient to 1e-5, of the largest value of a gradient or a thousandth of the largest of all."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    largest = max(g.abs().max() for g in expected["gradients"].values())
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        scale = max(gradient.abs().max(), 1e-3 * largest)
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * scale, name
