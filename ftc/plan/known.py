"""The schedules of torch and of DeepSeek by name, as plain action lists, made without stages or process groups.

The orders come from torch's own classes (1F1B's, which torch has in its loop alone, is written out), so a schedule here is the one that a
run of that name executes.

| name | stages a rank | source |
|---|---|---|
| GPipe | 1 | Huang et al. 2019, arXiv:1811.06965 |
| 1F1B | 1 | Narayanan et al. 2019, PipeDream; Fan et al. 2021 |
| Interleaved1F1B | any, "loop" | Narayanan et al. 2021, arXiv:2104.04473 |
| InterleavedZeroBubble, ZB1P (one stage a rank) | any, "loop" | Qi et al. 2023, arXiv:2401.10241 |
| ZBVZeroBubble | 2, "v" | Qi et al. 2024, arXiv:2405.15362 |
| DualPipeV | 2, "v" | DeepSeek, DualPipe's "cut in half" |
| DualPipe | 2, "bidirectional" | DeepSeek-V3, arXiv:2412.19437 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import _Action

from ftc.errors import FtcError, nearest
from ftc.plan.actions import B, F, Placement, Schedule, place

ONE_STAGE = ("GPipe", "1F1B", "ZB1P")
LOOPS = ("Interleaved1F1B", "InterleavedZeroBubble")
VS = ("ZBVZeroBubble", "DualPipeV")
NAMES = (*ONE_STAGE, *LOOPS, *VS, "DualPipe")


def known(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> tuple[Schedule, Placement]:
    """The schedule `name` and its placement, empty slots left out.

    `stages_per_rank` is a choice for the interleaved ones alone (2 unless told). Raises FtcError naming the numbers that do not
    fit and those that would.
    """
    stages = check_numbers(name, num_ranks, num_microbatches, stages_per_rank)
    if name == "DualPipe":
        # Imported here: the runtime of that schedule is no concern of the planner's.
        from ftc.pipeline.bidirectional import actions

        return _tidy(actions(num_ranks, num_microbatches)), place("bidirectional", num_ranks, 2)
    placement = place("v" if name in VS else "loop", num_ranks, stages)
    return _tidy(_MAKERS[name](num_ranks, num_microbatches, stages)), placement


def fits(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> bool:
    """Whether `known` has this schedule for these numbers."""
    try:
        check_numbers(name, num_ranks, num_microbatches, stages_per_rank)
    except FtcError:
        return False
    return True


def check_numbers(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> int:
    """Stages a rank of a known schedule; FtcError, with numbers that would do, where it does not have one for these."""
    if name not in NAMES:
        raise FtcError(f"schedule {name!r}: {nearest(name, NAMES)}")
    if num_ranks < 1 or num_microbatches < 1:
        raise FtcError(f"{name} on {num_ranks} ranks with {num_microbatches} microbatches: both must be at least 1")
    usual = 1 if name in ONE_STAGE else 2
    stages = usual if stages_per_rank is None else stages_per_rank
    if stages < 1 or (name not in LOOPS and stages != usual):
        raise FtcError(f"{name} with {stages} stages a rank: it has {usual}")
    if name == "DualPipeV" and num_microbatches < num_ranks * 2:
        raise FtcError(f"DualPipeV on {num_ranks} ranks with {num_microbatches} microbatches: at least {num_ranks * 2} (its stages)")
    if name == "DualPipe" and (num_ranks % 2 or num_microbatches % 2 or num_microbatches < num_ranks * 2):
        raise FtcError(
            f"DualPipe on {num_ranks} ranks with {num_microbatches} microbatches: ranks and microbatches are even, microbatches at least "
            f"{num_ranks * 2}"
        )
    rounds = max(1, num_microbatches // num_ranks)
    if (name in LOOPS or name == "ZB1P") and num_microbatches % rounds:
        raise FtcError(
            f"{name} on {num_ranks} ranks with {num_microbatches} microbatches: a multiple of the {rounds} rounds, such as "
            f"{num_microbatches // rounds * rounds} or {num_microbatches + -num_microbatches % rounds}"
        )
    return stages


def _orders(kind: type, num_ranks: int, num_microbatches: int, stages: int) -> Schedule:
    """The action lists of a torch schedule class; only what its order depends on is filled in, as its constructor wants real stages."""
    maker: Any = object.__new__(kind)
    maker.pp_group_size, maker._n_microbatches = num_ranks, num_microbatches
    maker.num_stages = maker._num_stages = num_ranks * stages
    maker.n_local_stages = stages
    maker.number_of_rounds = max(1, num_microbatches // num_ranks)
    maker.microbatches_per_round = num_microbatches // maker.number_of_rounds
    if hasattr(kind, "_get_pipeline_order"):
        return maker._get_pipeline_order()
    return {rank: maker._calculate_single_rank_operations(rank) for rank in range(num_ranks)}


def _maker(kind: type) -> Callable[[int, int, int], Schedule]:
    return lambda ranks, microbatches, stages: _orders(kind, ranks, microbatches, stages)


_MAKERS: dict[str, Callable[[int, int, int], Schedule]] = {
    "GPipe": _maker(torch_schedules.ScheduleGPipe),
    "1F1B": lambda ranks, microbatches, stages: _one_forward_one_backward(ranks, microbatches),
    "ZB1P": _maker(torch_schedules.ScheduleInterleavedZeroBubble),
    "Interleaved1F1B": _maker(torch_schedules.ScheduleInterleaved1F1B),
    "InterleavedZeroBubble": _maker(torch_schedules.ScheduleInterleavedZeroBubble),
    "ZBVZeroBubble": _maker(torch_schedules.ScheduleZBVZeroBubble),
    "DualPipeV": _maker(torch_schedules.ScheduleDualPipeV),
}


def _one_forward_one_backward(num_ranks: int, num_microbatches: int) -> Schedule:
    """P - r forwards, then backward and forward in turn; written out, as torch's own list for it (2.13) lacks the last rank's first forward."""
    schedule: Schedule = {}
    for rank in range(num_ranks):
        warmup = min(num_microbatches, num_ranks - rank)
        forwards = [_Action(rank, F, microbatch) for microbatch in range(num_microbatches)]
        backwards = [_Action(rank, B, microbatch) for microbatch in range(num_microbatches)]
        steady = [action for both in zip(backwards, forwards[warmup:], strict=False) for action in both]
        schedule[rank] = [*forwards[:warmup], *steady, *backwards[num_microbatches - warmup :]]
    return schedule


def _tidy(schedule: Schedule) -> Schedule:
    """Compute alone, no empty slots. A pair whose two halves do not both exist would be a defect of the maker and shows in the proof."""
    return {rank: [action for action in schedule[rank] if action is not None and action.is_compute_op] for rank in sorted(schedule)}

