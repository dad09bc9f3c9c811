"""Schedules as CSV files, the ones that torch's runtime reads with `_load_csv(path, format="compute_only")`.

Row r holds the actions of rank r in their order, such as `0F3`, `7I3`, `7W3`, `0B3` or `(0F9;7B3)OVERLAP_F_B`; an empty field is a slot
without work.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from torch.distributed.pipelining.schedules import _Action, _ComputationType

from ftc.errors import FtcError
from ftc.plan.actions import PAIR, B, F, I, Schedule, pair

_SINGLE = re.compile(r"(\d+)(F|I|W|B)(\d+)")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_COMMUNICATION = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)\d*")
_WHAT = "an action is STAGE, F I W or B, MICROBATCH, as 0F3, or a pair such as (0F9;7B3)OVERLAP_F_B"


def read(path: str | Path) -> Schedule:
    """The schedule in a file; FtcError naming row and column (from 1) of what is no action, or where the file has none."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FtcError(f"{path}: not a readable CSV file: {error}") from error
    if not any(field.strip() for row in rows for field in row):
        raise FtcError(f"{path}: no action in it; row r holds the actions of rank r")
    schedule: Schedule = {}
    for rank, row in enumerate(rows):
        schedule[rank] = [_field(field.strip(), f"{path}: row {rank + 1}, column {column + 1}") for column, field in enumerate(row)]
        if not any(schedule[rank]):
            raise FtcError(f"{path}: row {rank + 1} (rank {rank}) has no action: every rank needs work")
    return schedule


def write(schedule: Schedule, path: str | Path) -> None:
    """Write what `read` and torch's runtime read back as the same schedule."""
    rows = [["" if action is None else repr(action) for action in schedule[rank]] for rank in range(len(schedule))]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _field(text: str, where: str) -> _Action | None:
    if not text:
        return None
    halves = _PAIR.fullmatch(text)
    if halves is None:
        return _single(text, where)
    forward, backward = (_single(half.strip(), where) for half in halves.groups())
    if forward.computation_type != F or backward.computation_type not in (B, I):
        raise FtcError(f"{where}: {text!r}: a pair is a forward F and then a backward B or I")
    return pair(forward, backward)


def _single(text: str, where: str) -> _Action:
    match = _SINGLE.fullmatch(text)
    if match is not None:
        return _Action(int(match[1]), _ComputationType(match[2]), int(match[3]))
    if _COMMUNICATION.fullmatch(text):
        raise FtcError(f"{where}: {text!r}: a schedule here holds compute alone; sends, receives and gathers are added when it is loaded")
    if text.endswith(PAIR.value):
        raise FtcError(f"{where}: {text!r}: {_WHAT}")
    raise FtcError(f"{where}: {text!r} is no action: {_WHAT}")
