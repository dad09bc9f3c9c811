"""A schedule that runs: lists of actions with sends and receives in torch's order, over one chain of stages or two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime
from torch.profiler import record_function

from ftc.errors import FtcError
from ftc.pipeline.dualpipe import overlapped
from ftc.pipeline.runtime_stage import PipelineStage
from ftc.plan.actions import PAIR, B, F, I, Placement, W, parts
from ftc.plan.actions import Schedule as Lists
from ftc.plan.messages import RECV_B, RECV_F, SEND_B, SEND_F
from ftc.plan.prove import prove

UNSHARD, RESHARD, REDUCE = _ComputationType.UNSHARD, _ComputationType.RESHARD, _ComputationType.REDUCE_GRAD


class Schedule(_PipelineScheduleRuntime):
    """torch's pipeline schedule (`step`, `eval`, losses) for any lists of actions that are proved to be whole and free of deadlock.

    It differs from torch's runtime in this: losses belong to microbatches whatever order they are run in; stages may lie on two chains (DualPipe);
    pairs of a forward and a backward are interleaved (`ftc.pipeline.dualpipe`); buffers and finished sends are let go as soon as they can be.

    stages: this rank's, those of the first chain first, with `stage_index` their place in their chain. actions, placement: the whole pipeline's.
    FtcError where the lists or the stages do not fit the placement.
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        num_microbatches: int,
        actions: Lists,
        placement: Placement,
        loss_fn: Callable | None = None,
        *,
        scale_grads: bool = True,
        interleave: bool = True,
        name: str = "schedule",
    ):
        self.placement, self.interleave, self.name = placement, interleave, name
        rank, size = stages[0].group_rank, stages[0].group_size
        if size != placement.num_ranks:
            raise FtcError(f"{name} is a schedule for {placement.num_ranks} ranks, and the pipeline has {size}")
        proof = prove(actions, placement, num_microbatches)
        super().__init__(list(stages), num_microbatches, loss_fn=loss_fn, scale_grads=scale_grads)
        self.pipeline_order = actions
        self._at = self._numbered(stages, rank)
        self.pipeline_order_with_comms = {rank: _with_shards(list(proof.with_messages[rank]), placement, num_microbatches)}
        for number, stage in self._at.items():
            chain = next(chain for chain in placement.chains if number in chain)
            stage.stage_index_to_group_rank = {place: placement.ranks[other] for place, other in enumerate(chain)}
        self._losses: dict[int, Tensor] = {}
        self._sent: list[list[dist.Work]] = []
        self._prepare([action for action in actions[rank] if action is not None])

    def _prepare(self, own: list[_Action]) -> None:
        """Have the stages split their backward passes, and keep tapes, where this rank's actions need it."""
        pairs = [action for action in own if action.computation_type == PAIR] if self.interleave else []
        if pairs or any(part.computation_type in (I, W) for action in own for part in parts(action)):
            for stage in self._stages:
                stage.split()
        for action in pairs:
            backward = action.sub_actions[1]
            self._at[backward.stage_index].taped.add(backward.microbatch_index)

    def _numbered(self, stages: Sequence[PipelineStage], rank: int) -> dict[int, PipelineStage]:
        """This rank's stages by their number in the placement."""
        own, length = self.placement.stages_of(rank), len(self.placement.chains[0])
        wanted = [self.placement.position(number) for number in own]
        if [stage.stage_index for stage in stages] != wanted or any(stage.num_stages != length for stage in stages):
            given = ", ".join(f"{stage.stage_index} of {stage.num_stages}" for stage in stages)
            raise FtcError(f"{self.name} on rank {rank} runs the stages {wanted} of {length}, in this order, and was given {given}")
        return dict(zip(own, stages, strict=True))

    # --------------------------------------------------------------------------------------------------------------- step

    def _initialize_stages(self, args: tuple, kwargs: Any, target: Any = None, loss_kwargs: Any = None) -> None:
        """torch's, one chain after the other: shapes travel along a chain."""
        before = self._stages_forward_initialized, self._stages_backward_initialized
        after = before
        for chain in self.placement.chains:
            stages = [self._at[number] for number in chain if number in self._at]
            if hasattr(self, "_initialize_pp_stages"):
                after = self._initialize_pp_stages(stages, args, kwargs, target, *before, loss_kwargs=loss_kwargs)
            else:
                after = self._initialize_chain(stages, args, kwargs, *before)
        self._stages_forward_initialized, self._stages_backward_initialized = after

    def _initialize_chain(self, stages: list[PipelineStage], args: tuple, kwargs: Any, forward: bool, backward: bool) -> tuple[bool, bool]:
        """What torch 2.11 does for all stages of a rank, for those of one chain."""
        if not forward:
            first = [o for stage in stages for o in stage._get_init_p2p_neighbors_ops() if o.group_peer != stage.group_rank]
            torch_schedules._wait_batch_p2p(torch_schedules._batch_p2p(first) if first else [])
            known: tuple = ()
            for stage in stages:
                known = stage._prepare_forward_infra(self._n_microbatches, args if stage.is_first else known, kwargs)
        if self._has_backward and not backward:
            for stage in stages:
                stage._prepare_backward_infra(self._n_microbatches)
        return True, backward or self._has_backward

    def _step_microbatches(
        self, arg_mbs: list | None = None, kwarg_mbs: list | None = None, target_mbs: list | None = None, losses: list | None = None,
        return_outputs: bool = True, loss_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._batch = (*self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses), target_mbs, return_outputs, loss_kwargs)
        self._initialize_stages(self._batch[0][0], self._batch[1][0], None if target_mbs is None else target_mbs[0], loss_kwargs)
        self.backward_counter.clear()
        self._losses = {}
        for action in self.pipeline_order_with_comms[self.rank]:
            with record_function(f"PP:{action}"):
                self._perform(action)
        while self._sent:
            torch_schedules._wait_batch_p2p(self._sent.pop())
        if losses is not None and any(stage.is_last for stage in self._stages):
            losses[:] = [self._losses[microbatch] for microbatch in sorted(self._losses)]
        self._batch = None

    def _perform(self, action: _Action) -> None:
        kind, number, microbatch = action.computation_type, action.stage_index, action.microbatch_index
        if kind == PAIR:
            overlapped(self, self, *action.sub_actions)
            return
        stage = self._at[number]
        if kind == F:
            self.forward(number, microbatch)
        elif kind in (B, I):
            if self._has_backward:
                self.backward(number, microbatch, full=kind == B)
        elif kind == W:
            self.stage(number).backward_weight_one_chunk(microbatch, last_backward=self._is_last_backward(number))
        elif kind in (SEND_F, RECV_F):
            self._message(stage, kind, number, microbatch)
        elif kind in (SEND_B, RECV_B):
            if self._has_backward:
                self._message(stage, kind, number, microbatch)
        elif kind == UNSHARD:
            self._unshard(stage)
        elif kind == RESHARD:
            self._reshard(stage)
        elif self._has_backward:
            stage.perform_reduce_grad(1)

    # ------------------------------------------------------------------------------------------------------------ compute

    def stage(self, number: int) -> PipelineStage:
        """This rank's stage of that number, whose weights are there."""
        self._assert_unsharded(self._at[number])
        return self._at[number]

    def forward(self, number: int, microbatch: int, beside: contextlib.AbstractContextManager | None = None) -> None:
        """Forward of a microbatch on stage `number`, once its input is there; `beside` is entered around the computation."""
        stage = self.stage(number)
        self.wait_forward(number, microbatch)
        arg_mbs, kwarg_mbs, target_mbs, return_outputs, loss_kwargs = self._batch
        with beside or contextlib.nullcontext():
            output = stage.forward_one_chunk(microbatch, arg_mbs[microbatch], kwarg_mbs[microbatch], save_forward_output=return_outputs)
            if stage.is_last and self._loss_fn is not None and target_mbs is not None:
                self._losses[microbatch] = self._loss_fn(output, target_mbs[microbatch], **(loss_kwargs or {}))
        following = self.placement.following[number]
        if following in self._at:
            self._at[following].set_local_fwd_input(output, microbatch)

    def backward(self, number: int, microbatch: int, full: bool) -> None:
        """Backward of a microbatch on stage `number`, of its input alone where not `full`, once the gradient of its output is there."""
        stage = self.stage(number)
        self.wait_backward(number, microbatch)
        last = self._is_last_backward(number) if full else False
        stage.backward_one_chunk(microbatch, loss=self.loss_of(number, microbatch), full_backward=full, last_backward=last)
        previous = self.placement.previous[number]
        if previous in self._at:
            self._at[previous].set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)

    def loss_of(self, number: int, microbatch: int) -> Tensor | None:
        """What the backward pass of a microbatch begins with on a last stage. Scaled here, where torch scales what is in `.grad` after the step, and so
        once more what earlier steps have left there."""
        if not self._at[number].is_last:
            return None
        return self._losses[microbatch] / self._n_microbatches if self.scale_grads else self._losses[microbatch]

    def _is_last_backward(self, number: int) -> bool:
        self.backward_counter[number] += 1
        return self.backward_counter[number] == len(self.placement.microbatches(number, self._n_microbatches))

    # ----------------------------------------------------------------------------------------------------------- messages

    def wait_forward(self, number: int, microbatch: int) -> None:
        """Wait for the input of a microbatch, where another rank sends it."""
        works = self.fwd_recv_ops.pop((number, microbatch), None)
        if works is not None:
            torch_schedules._wait_batch_p2p(works)

    def wait_backward(self, number: int, microbatch: int) -> None:
        """Wait for the gradient of a microbatch's output, where another rank sends it."""
        works = self.bwd_recv_ops.pop((number, microbatch), None)
        if works is not None:
            torch_schedules._wait_batch_p2p(works)

    def _message(self, stage: PipelineStage, kind: _ComputationType, number: int, microbatch: int) -> None:
        if kind == RECV_F:
            self.fwd_recv_ops[number, microbatch] = torch_schedules._batch_p2p(stage.get_fwd_recv_ops(microbatch))
        elif kind == RECV_B:
            self.bwd_recv_ops[number, microbatch] = torch_schedules._batch_p2p(stage.get_bwd_recv_ops(microbatch))
        else:
            operations = stage.get_fwd_send_ops(microbatch) if kind == SEND_F else stage.get_bwd_send_ops(microbatch)
            self._sent.append(torch_schedules._batch_p2p(operations))

    # ------------------------------------------------------------------------------------------------------------- shards

    def _unshard(self, stage: PipelineStage) -> None:
        if isinstance(stage.submod, FSDPModule):
            self.unshard_ops[stage.stage_index] = [
                module.unshard(async_op=True) for module in stage.submod.modules() if isinstance(module, FSDPModule)
            ]

    def _reshard(self, stage: PipelineStage) -> None:
        if isinstance(stage.submod, FSDPModule):
            self._assert_unsharded(stage)
            for module in stage.submod.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            self.unsharded_stages.remove(stage.stage_index)


def _with_shards(actions: list[_Action], placement: Placement, num_microbatches: int) -> list[_Action]:
    """A rank's actions with a gather of each stage's weights before its first use, a release after its last, and the reduction of its gradients
    after its last backward pass. Stages stay gathered in between: a rank of a pipeline has few, and each comes again and again."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    done: dict[int, int] = {}
    for place, action in enumerate(actions):
        for part in parts(action) if action.is_compute_op else ():
            first.setdefault(part.stage_index, place)
            last[part.stage_index] = place
            done[part.stage_index] = place if part.computation_type in (B, W) else done.get(part.stage_index, place)
    result = []
    for place, action in enumerate(actions):
        result += [_Action(stage, UNSHARD, None) for stage, at in first.items() if at == place]
        result.append(action)
        result += [_Action(stage, REDUCE, None) for stage, at in done.items() if at == place]
        result += [_Action(stage, RESHARD, None) for stage, at in last.items() if at == place]
    return result
