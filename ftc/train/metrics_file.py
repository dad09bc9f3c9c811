"""A run's metrics.jsonl: one JSON object a logged step. Readable without torchtitan."""

import json
from pathlib import Path
from typing import Any

from ftc.files import atomic_write

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a half-written last line is left out."""
    rows = []
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def keep_steps_before(path: Path, step: int) -> float:
    """Drop what an interrupted run logged from `step` on; returns the training seconds of what is kept."""
    kept = [row for row in read_metrics(path) if row["step"] < step]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept[-1]["time"] if kept else 0.0
