"""Stages that torch's pipeline runtime drives by their graphs, and pairs of them as one graph: DualPipeV with overlap by graph.

    stages = [GraphStage(stage, index, number, device, example=microbatch, group=group) for ...]
    schedule = ScheduleDualPipeV(stages, num_microbatches, loss_fn=...)
    register_graph_pairs(schedule, machine=H100)
    schedule.step(**batch)

Every forward, input gradient and weight gradient runs as a graph, and each OVERLAP_F_B as the merged graph of its two stages, so that what one says to
other ranks (experts, gathers of shards) lies under what the other computes. Losses and gradients have the bits of the actions run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineContext
from torch.utils._pytree import tree_flatten

from ftc.errors import FtcError, FtcFailure
from ftc.pipeline.dualpipe import _OfTorch
from ftc.pipeline.interleave_costs import Machine
from ftc.pipeline.overlapped import OverlappedPair, StageGraphs
from ftc.pipeline.runtime_stage import buffers_kept


@dataclass
class _Beside:
    """The backward pass that the next forward pass of a stage is to be run with."""

    pair: OverlappedPair
    back: GraphStage
    chunk: int
    gradients: list[Tensor]


class GraphStage(TorchStage):
    """torch's PipelineStage whose passes are graphs; see the module's docstring.

    submodule: a `Stage` of `ftc.pipeline.cut`, or a module around one (the last gives the loss, or what `loss_fn` takes). `example`: the program's
    keyword inputs of one microbatch; all microbatches have its sizes. `takes`: what the stage before gives (`Stage.examples`), tensors on any device that
    know whether they have a gradient. `graphs` go to `StageGraphs` (sharding, shards, compile_options). The rest goes to torch's PipelineStage.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *args: Any,
        example: Mapping[str, Any],
        takes: tuple[Tensor, ...] = (),
        graphs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.names = list(example)
        crossing = tuple(torch.zeros(t.shape, dtype=t.dtype, device=device) for t in takes)
        with buffers_kept(submodule):
            self.graphs = StageGraphs(submodule, crossing, example, differentiable=[i for i, t in enumerate(takes) if t.requires_grad], **(graphs or {}))
        self.beside: _Beside | None = None
        self._chunk, self._full = -1, True
        self._saved: dict[int, list[Tensor]] = {}
        self._results: dict[int, list[Tensor]] = {}  # leaves that stand for a forward's results, for what comes behind them
        self._done: dict[int, list[Tensor]] = {}  # gradients of inputs that a pair gave
        self._kept: dict[int, list[Tensor]] = {}  # what weight gradients start from
        super().__init__(submodule, stage_index, num_stages, device, *args, dw_builder=self._weights, **kwargs)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch, with the backward that is to go `beside` it where there is one; see torch's."""
        self._chunk = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """The forward graph, or that of the pair."""
        if missing := [name for name in self.names if name not in kwargs]:
            raise FtcError(f"stage {self.stage_index} was traced with the inputs {', '.join(self.names)}, and a microbatch comes without {missing[0]}")
        given = tree_flatten((args, {name: kwargs[name] for name in self.names}))[0]
        inputs = [x.detach() for x in given if isinstance(x, Tensor)]
        beside, self.beside = self.beside, None
        if beside is None:
            results, saved = self.graphs.forward(inputs)
        else:
            results, saved, done = beside.pair.run(inputs, beside.back._saved.pop(beside.chunk), beside.gradients)
            beside.back._done[beside.chunk] = done
        if self.has_backward:
            self._saved[self._chunk] = saved
        results = [r.detach().requires_grad_(i in self.graphs.trained_results) for i, r in enumerate(results)]
        self._results[self._chunk] = results
        return results[0] if self.is_last and len(results) == 1 else tuple(results)

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False) -> None:
        """Backward of one microbatch, of its inputs alone where not `full_backward`; what a pair has computed is taken from it."""
        self._chunk, self._full = bwd_chunk_id, full_backward
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> tuple:
        """The backward graph, or that of the inputs alone."""
        found = self._done.pop(self._chunk, None)
        if found is None:
            loss = bwd_kwargs["stage_output"] if self.is_last else None
            gradients, saved = self.gradients_of(self._chunk, loss), self._saved.pop(self._chunk)
            if self._full:
                found = self.graphs.backward(saved, gradients)
            else:
                found, self._kept[self._chunk] = self.graphs.backward_input(saved, gradients)
        self._results.pop(self._chunk, None)
        values: list = [None] * len(bwd_kwargs["input_values"])
        for place, gradient in zip(self.graphs.trained_inputs, found, strict=True):  # crossing tensors come first, and all of these are tensors
            values[place] = gradient
        return tuple(values), None

    def gradients_of(self, chunk: int, loss: Tensor | None) -> list[Tensor]:
        """Gradients of the trained results of a microbatch: received, or from its loss where the stage is the last."""
        wanted, results = self.graphs.trained_results, self._results[chunk]
        if self.is_last:
            found = torch.autograd.grad(loss, [results[i] for i in wanted], allow_unused=True, materialize_grads=True)
            return list(found)
        received = self._retrieve_recv_grads(chunk)
        return [torch.zeros_like(results[i]) if received[i] is None else received[i].contiguous() for i in wanted]

    def is_paired(self, chunk: int) -> bool:
        """Whether the backward of a microbatch is still to run, so that a pair can run it."""
        return chunk in self._saved

    def _weights(self) -> Callable[[], None]:
        kept = self._kept.pop(self._chunk, None)
        return (lambda: None) if kept is None else lambda: self.graphs.backward_weights(kept)

    def clear_runtime_states(self) -> None:
        """torch's, and forget what a step that failed left behind."""
        super().clear_runtime_states()
        for left in (self._saved, self._results, self._done, self._kept, self.dw_runner):
            left.clear()
        self.beside = None


def register_graph_pairs(schedule: Any, machine: Machine, more_bytes: int | None = 0, group: Any = None, parts: bool = False) -> dict[tuple[int, int], OverlappedPair]:
    """Let a schedule of torch's over `GraphStage`s run each OVERLAP_F_B as one graph; in place.

    Returns the pairs by (stage of the forward, stage of the backward), filled as they are first met. The arguments are those of `OverlappedPair`;
    `group` names ranks that share a stage's collectives and may differ in sizes. FtcError where a stage is of another kind.
    """
    pairs: dict[tuple[int, int], OverlappedPair] = {}
    for stage in schedule._stages:
        if not isinstance(stage, GraphStage):
            raise FtcError(f"stage {stage.stage_index} is a {type(stage).__name__}; pairs by graph take GraphStages")

    def run(action: _Action, context: _PipelineContext) -> None:
        forward, backward = action.sub_actions
        actions = _OfTorch(context)
        front, back = actions.stage(forward.stage_index), actions.stage(backward.stage_index)
        full = backward.computation_type == _ComputationType.FULL_BACKWARD
        if full and back.has_backward and back.is_paired(backward.microbatch_index):
            actions.wait_backward(backward.stage_index, backward.microbatch_index)
            loss = actions.loss_of(backward.stage_index, backward.microbatch_index)
            key = (forward.stage_index, backward.stage_index)
            if key not in pairs:
                pairs[key] = OverlappedPair(front.graphs, back.graphs, machine=machine, more_bytes=more_bytes, group=group, parts=parts)
            front.beside = _Beside(pairs[key], back, backward.microbatch_index, back.gradients_of(backward.microbatch_index, loss))
        actions.forward(forward.stage_index, forward.microbatch_index)
        if front.beside is not None:
            raise FtcFailure(f"the forward of {forward} did not run, and its pair with {backward} neither")
        actions.backward(backward.stage_index, backward.microbatch_index, full)

    schedule.register_custom_function(_ComputationType.OVERLAP_F_B, run)
    return pairs
