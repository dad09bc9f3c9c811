"""A forward pass of one microbatch and a backward pass of another at the same time (DeepSeek-V3, arXiv:2412.19437, section 3.2 and figure 4).

Both are taken region by region in turn:   F layers.0, B layers.7, F layers.1, B layers.6, ...

On a GPU they run on two streams, and what one says to other ranks (expert all-to-all, gathers of shards) lies under what the other computes: the
launches of both must come in turn, as a region that was launched after all of the other microbatch would also run after it. On a CPU the
order is the same, one after the other.

A backward pass runs on the stream of its forward pass, as autograd does it; so the forward pass of a pair takes the stream that the backward
pass's microbatch has not.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineContext

from ftc.pipeline.split_backward_shell import between_steps

_streams: weakref.WeakKeyDictionary[Any, _Streams] = weakref.WeakKeyDictionary()


class Pairs(Protocol):
    """What a schedule has for its pairs to be run: `Schedule`, or `_OfTorch` for torch's own."""

    def stage(self, number: int) -> Any: ...

    def forward(self, number: int, microbatch: int, beside: contextlib.AbstractContextManager | None = None) -> None: ...

    def backward(self, number: int, microbatch: int, full: bool) -> None: ...

    def wait_backward(self, number: int, microbatch: int) -> None: ...

    def loss_of(self, number: int, microbatch: int) -> Tensor | None: ...


def overlapped(pairs: Pairs, key: Any, forward: _Action, backward: _Action) -> None:
    """Run a forward and a backward action interleaved; one after the other where the backward pass is not on a tape, and both are of one sharded stage.

    `key`: the schedule that they are of, for which streams are kept."""
    full = backward.computation_type == _ComputationType.FULL_BACKWARD
    stage = pairs.stage(backward.stage_index)
    if not stage.has_backward:
        pairs.forward(forward.stage_index, forward.microbatch_index)
        return
    # FSDP2 knows one state of a module, forward or backward, so a stage is not interleaved with itself.
    sharded_alone = forward.stage_index == backward.stage_index and isinstance(stage.submod, FSDPModule)
    if backward.microbatch_index not in stage._tapes or sharded_alone:
        pairs.forward(forward.stage_index, forward.microbatch_index)
        pairs.backward(backward.stage_index, backward.microbatch_index, full)
        return
    pairs.wait_backward(backward.stage_index, backward.microbatch_index)
    loss = pairs.loss_of(backward.stage_index, backward.microbatch_index)
    streams = _streams_of(key, stage.device)
    advance = stage.backward_steps(backward.microbatch_index, loss, full)
    if streams is None:
        pairs.forward(forward.stage_index, forward.microbatch_index, between_steps(advance))
        pairs.backward(backward.stage_index, backward.microbatch_index, full)
        return
    main = torch.cuda.current_stream(streams.side.device)
    streams.side.wait_stream(main)
    behind = streams.side if streams.aside.pop((backward.stage_index, backward.microbatch_index), False) else main
    before = main if behind is streams.side else streams.side
    streams.aside[forward.stage_index, forward.microbatch_index] = before is streams.side

    def advance_behind() -> None:
        with torch.cuda.stream(behind):  # at the end of a backward pass the current stream waits for it
            advance()

    beside = contextlib.ExitStack()
    beside.enter_context(between_steps(advance_behind))
    beside.enter_context(torch.cuda.stream(before))
    pairs.forward(forward.stage_index, forward.microbatch_index, beside)
    pairs.backward(backward.stage_index, backward.microbatch_index, full)
    main.wait_stream(streams.side)


@dataclass
class _Streams:
    """The second stream of a schedule, and whether microbatches that were in a pair were computed on it, by (stage, microbatch)."""

    side: torch.cuda.Stream
    aside: dict[tuple[int, int], bool] = field(default_factory=dict)


def _streams_of(schedule: Any, device: Any) -> _Streams | None:
    """None where there are no streams: on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    if schedule not in _streams:
        _streams[schedule] = _Streams(torch.cuda.Stream(device))
    return _streams[schedule]


# ------------------------------------------------------------------------------------------------------------ torch's schedules


def register(schedule: Any) -> None:
    """Let one of torch's own schedules over our stages run its pairs interleaved, as `ftc.pipeline.runtime.Schedule` does by itself; in place.

    schedule: a `_PipelineScheduleRuntime` such as torch's ScheduleDualPipeV, whose stages are `PipelineStage`s of ours.
    """
    for action in schedule.pipeline_order[schedule.rank]:
        if action is not None and action.computation_type == _ComputationType.OVERLAP_F_B:
            backward = action.sub_actions[1]
            stage = next(stage for stage in schedule._stages if stage.stage_index == backward.stage_index)
            stage.split()
            stage.taped.add(backward.microbatch_index)

    def run(action: _Action, context: _PipelineContext) -> None:
        overlapped(_OfTorch(context), context.schedule_ref, *action.sub_actions)

    schedule.register_custom_function(_ComputationType.OVERLAP_F_B, run)


class _OfTorch:
    """One action of torch's runtime: what its `_perform_action` does for a forward and a backward."""

    def __init__(self, context: _PipelineContext):
        self.context, self.schedule = context, context.schedule_ref
        self.at = {stage.stage_index: stage for stage in self.schedule._stages}

    def stage(self, number: int) -> Any:
        self.schedule._assert_unsharded(self.at[number])
        return self.at[number]

    def forward(self, number: int, microbatch: int, beside: contextlib.AbstractContextManager | None = None) -> None:
        stage, context = self.stage(number), self.context
        works = self.schedule.fwd_recv_ops.pop((number, microbatch), None)
        if works is not None:
            torch_schedules._wait_batch_p2p(works)
        with beside or contextlib.nullcontext():
            output = stage.forward_one_chunk(microbatch, context.arg_mbs[microbatch], context.kwarg_mbs[microbatch])
            self.schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
        if number + 1 in self.at:
            self.at[number + 1].set_local_fwd_input(output, microbatch)

    def backward(self, number: int, microbatch: int, full: bool) -> None:
        stage, schedule = self.stage(number), self.schedule
        self.wait_backward(number, microbatch)
        if full:
            schedule.backward_counter[number] += 1
        last = full and schedule.backward_counter[number] == schedule._n_microbatches
        stage.backward_one_chunk(microbatch, loss=self.loss_of(number, microbatch), full_backward=full, last_backward=last)
        if number - 1 in self.at:
            self.at[number - 1].set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)

    def wait_backward(self, number: int, microbatch: int) -> None:
        works = self.schedule.bwd_recv_ops.pop((number, microbatch), None)
        if works is not None:
            torch_schedules._wait_batch_p2p(works)

    def loss_of(self, number: int, microbatch: int) -> Tensor | None:
        return self.schedule._maybe_get_loss(self.at[number], microbatch)
