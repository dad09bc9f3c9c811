"""The benchmark of overlap runs without a GPU, and what it compares gives the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_small_benchmark_measures_all_it_names():
    command = [sys.executable, str(ROOT / "benchmarks" / "overlap.py"), "--cpu", "--rounds", "2", "--shares", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["benchmark"] == "overlap" and len(record["results"]) == 2
    for result in record["results"]:
        assert result["same_bits"] and result["units"] >= 1
        assert set(result["seconds"]) == {"compute", "copies", "one by one", "interleaved"}
        model = result["model"]
        assert model["bound_ms"] <= model["interleaved_ms"] * (1 + 1e-9) and model["interleaved_ms"] <= model["concatenated_ms"]
        assert model["exposed_interleaved_ms"] < model["exposed_concatenated_ms"]
    assert record["results"][0]["model"]["peak_bytes_interleaved"] <= record["results"][0]["model"]["peak_bytes_concatenated"]
