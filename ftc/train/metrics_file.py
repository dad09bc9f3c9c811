"""A run's metrics.jsonl: one JSON object a logged step, and one a measurement of the validation sample.

Readable without torchtitan. A row of training has "loss", one of validation "validation_bits_per_byte" and
"validation_loss", each a table by source.
"""

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


def curve(rows: list[dict[str, Any]], key: str, most: int) -> list[list[float]]:
    """[step, value] of the rows that have `key`, thinned to about `most` points, the last one kept."""
    points = [[row["step"], row[key]] for row in rows if key in row]
    stride = max(1, len(points) // most)
    return points[::stride] + ([points[-1]] if points and (len(points) - 1) % stride else [])


def curves(rows: list[dict[str, Any]], key: str, most: int) -> dict[str, list[list[float]]]:
    """`curve` of each source that the tables under `key` name."""
    tables = [(row["step"], row[key]) for row in rows if key in row]
    names = dict.fromkeys(name for _, table in tables for name in table)
    return {name: curve([{"step": step, **table} for step, table in tables], name, most) for name in names}


def keep_steps_before(path: Path, step: int) -> float:
    """Drop what an interrupted run logged from `step` on; returns the training seconds of what is kept."""
    kept = [row for row in read_metrics(path) if row["step"] < step]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept[-1]["time"] if kept else 0.0
