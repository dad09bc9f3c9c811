"""A folder of plans: plan.html to look at, plan.json to read, schedule.csv, the searched one for torch's runtime and `ftc train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ftc.files import MARKER, atomic_write, check_replaceable
from ftc.plan import table
from ftc.plan.compare import Compared
from ftc.plan.page import how_to_run, write_page
from ftc.plan.plans import Plan

KIND = "plan"
PAGE, NUMBERS, SCHEDULE = "plan.html", "plan.json", "schedule.csv"


def as_dict(found: Compared, run: Any, cap: float | None) -> dict[str, Any]:
    """JSON-ready: the costs, every plan, and which is best. run: a `PlannedRun`."""
    return {
        "ranks": run.ranks,
        "memory_cap_bytes": cap,
        "costs": run.costs.as_dict(),
        "best": found.best.name,
        "bound_of_any_partition_seconds": found.bound_seconds,
        "left_out": found.left_out,
        "plans": [_plan(plan) for plan in found.plans],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "step_seconds": plan.step_seconds,
        "idle_share": plan.result.idle_share,
        "peak_bytes": list(plan.result.peak_bytes),
        "bound_seconds": plan.bound_seconds,
        "gap": plan.gap,
        "microbatches": plan.num_microbatches,
        "bounds": list(plan.partition),
        "placement": list(plan.placement.ranks),
        "style": plan.placement.style,
    }


def write_folder(folder: Path, found: Compared, run: Any, cap: float | None, title: str) -> dict[str, Path]:
    """Write the three files, each in one step; returns their paths. FtcError where the folder holds something else."""
    check_replaceable(folder, KIND)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / MARKER, json.dumps({"kind": KIND}) + "\n")
    atomic_write(folder / NUMBERS, json.dumps(as_dict(found, run, cap), indent=1) + "\n")
    schedule, half = folder / SCHEDULE, folder / f".{SCHEDULE}.new"
    table.write(found.searched.schedule, half)
    os.replace(half, schedule)
    write_page(folder / PAGE, title, found.plans, found.best, run.costs, how_to_run(found.best, str(schedule), run.microbatch_size), cap)
    return {"page": folder / PAGE, "schedule": schedule, "numbers": folder / NUMBERS}
