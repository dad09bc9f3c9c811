"""Schedules by name or from a CSV, for the stages of this rank.

    stages = [PipelineStage(part, index, num_stages, device, group=group) for index, part in own]
    schedule = schedule_from("DualPipeV", stages, num_microbatches=16, loss_fn=loss)
    schedule.step(**batch, target=labels, losses=[])

Names are those of `ftc.plan.known` (torch's, and "DualPipe"); a path that ends in .csv is a file as torch's runtime and `ftc plan` write them,
with compute actions alone. Every schedule is proved whole and free of deadlock before it runs.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.pipelining.schedules import _Action

from ftc.errors import FtcError
from ftc.pipeline.runtime_schedule import Schedule
from ftc.pipeline.runtime_stage import PipelineStage
from ftc.plan.actions import Schedule as Lists
from ftc.plan.actions import placement_of
from ftc.plan.known import known

__all__ = ["PipelineStage", "Schedule", "actions_from", "schedule_from"]


def schedule_from(
    name_or_path: str,
    stages: Sequence[PipelineStage],
    num_microbatches: int,
    loss_fn: Callable | None = None,
    *,
    scale_grads: bool = True,
    interleave: bool = True,
) -> Schedule:
    """The schedule to run; all ranks of the stages' group must call it.

    stages: this rank's, in the order of the model; for "DualPipe" the part r and then the part P-1-r, each with its place in the model as `stage_index` and
    P as `num_stages`, where ranks 0 and P-1 know the losses of half of the batch each. What several stages hold, as the copies of DualPipe or a tied embedding, is
    summed by `ftc.pipeline.TiedParameters` after the step. `loss_fn(output, target)` is a microbatch's loss; with `scale_grads` gradients
    are divided by the number of microbatches, as for a loss that is a mean. `interleave`: pairs of a forward and a backward region by region,
    else one after the other. FtcError names what does not fit: an unknown name, numbers of ranks, stages or microbatches, a file without such a
    schedule, an action that is missing, a deadlock.
    """
    lists, placement = actions_from(name_or_path, stages[0].group_size, num_microbatches, len(stages))
    return Schedule(stages, num_microbatches, lists, placement, loss_fn, scale_grads=scale_grads, interleave=interleave, name=name_or_path)


def actions_from(name_or_path: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> tuple[Lists, Any]:
    """The lists of actions and the placement of a schedule by name or from a CSV; FtcError as `schedule_from`."""
    if not name_or_path.lower().endswith(".csv"):
        several = stages_per_rank if name_or_path.startswith("Interleaved") else None
        return known(name_or_path, num_ranks, num_microbatches, several)
    lists = read_csv(name_or_path)
    if len(lists) != num_ranks:
        raise FtcError(f"{name_or_path} is a schedule for {len(lists)} ranks, and the pipeline has {num_ranks}")
    return lists, placement_of(lists, "loop")


def read_csv(path: str) -> Lists:
    """A schedule as torch writes it with format="compute_only": a row a rank, a cell an action. FtcError with row and column where it is none."""
    try:
        with Path(path).open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise FtcError(f"cannot read the schedule {path}: {error}") from error
    return {rank: [_action(cell, f"{path}: row {rank + 1}, column {column + 1}") for column, cell in enumerate(row)] for rank, row in enumerate(rows)}


def _action(cell: str, where: str) -> _Action | None:
    try:
        action = _Action.from_str(cell)
    except (RuntimeError, ValueError, KeyError) as error:
        raise FtcError(f"{where} is {cell!r}, which is no action; one is like 0F3, 2I1, 2W1, 1B0 or (0F3;1B0)OVERLAP_F_B") from error
    if action is not None and not action.is_compute_op:
        raise FtcError(f"{where} is {cell!r}: give the computation alone, sends and receives are added here")
    return action
