"""A stage as torch's pipelines drive it, with a backward pass of two parts at graph level."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage as TorchStage

from ftc.errors import FtcFailure
from ftc.pipeline.split_backward import split_backward
from ftc.pipeline.split_backward_shell import Tape, taped
from ftc.pipeline.weight_gradients_store import AtOnce, WeightGradients, putting_off


class PipelineStage(TorchStage):
    """torch's PipelineStage (same arguments) whose BACKWARD_INPUT leaves weight gradients to BACKWARD_WEIGHT, for every captured region.

    A module without regions is split as torch does it, by a walk over its autograd graph. With FSDP2 weight gradients join the accumulated ones
    of each microbatch in the reduce dtype, as those of a whole backward pass do. Buffers for what is received live from the receive to the
    computation that reads them, where torch keeps those of all microbatches for good. To be made after the module was recomputed, compiled and sharded.

    splits      whether backward passes can be split from the start. `Schedule` asks for it where its actions need it; with torch's own schedules
                of I and W, say True. Without, a backward pass of inputs alone is torch's
    taped       the microbatches whose backward pass may run in steps beside another forward pass (`ftc.pipeline.dualpipe`)
    """

    def __init__(self, submodule: nn.Module, stage_index: int, num_stages: int, device: torch.device, *args: Any, splits: bool = False, **kwargs: Any):
        self.splits = False
        self.taped: set[int] = set()
        self._tapes: dict[int, Tape] = {}
        self._running: dict[int, tuple[Iterator[None], WeightGradients | None]] = {}
        self._at: int = -1  # the microbatch of the backward pass that is under way
        self._later: WeightGradients | None = None
        self._groups: list[Any] | None = None  # FSDP2's, known from the first weight gradients on
        super().__init__(submodule, stage_index, num_stages, device, *args, **kwargs)
        if splits:
            self.split()

    def split(self) -> None:
        """Let backward passes be split, where the module has regions; before its first forward pass."""
        for body in splittable(self.submod):
            split_backward(body)
            self.splits, self.dw_builder = True, self._weight_work

    # ------------------------------------------------------------------------------------------------------------ forward

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch; see torch's. Onto a tape where its backward pass may run in steps."""
        tape = Tape() if fwd_chunk_id in self.taped and self.splits and self.has_backward else None
        with taped(tape):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if tape is not None:
            self._tapes[fwd_chunk_id] = tape
        if not self.is_first:
            self._let_go(self.args_recv_info[fwd_chunk_id])
        return output

    # ----------------------------------------------------------------------------------------------------------- backward

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False) -> None:
        """Backward of one microbatch, of its inputs alone where not `full_backward`; goes on with what `backward_steps` began."""
        if not self.has_backward:
            return
        _, began = self._running.get(bwd_chunk_id, (None, None))
        if not self.splits:
            super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)
            self._let_go(self.grad_recv_info[bwd_chunk_id])
            return
        whole = AtOnce() if bwd_chunk_id in self._tapes else None
        self._at, self._later = bwd_chunk_id, began if began is not None else whole if full_backward else WeightGradients()
        with putting_off(self._later):
            super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)
        self._let_go(self.grad_recv_info[bwd_chunk_id])

    def backward_steps(self, chunk: int, loss: Tensor | None, full_backward: bool) -> Callable[[], None]:
        """Begin the backward pass of a taped microbatch: a function that does its next step, of which it may be called more often than there are.

        `backward_one_chunk` has to follow, which does the steps that are left.
        """
        outputs, _ = self.fwd_cache[chunk]
        if self.is_last:
            roots, gradients = [loss], [None]
        else:
            received = self._retrieve_recv_grads(chunk)
            pairs = [(o, g) for o, g in zip(outputs, received, strict=True) if o.requires_grad]
            roots, gradients = [o for o, _ in pairs], [g for _, g in pairs]
        later = AtOnce() if full_backward else WeightGradients()
        steps = self._tapes.pop(chunk).backward(roots, gradients)
        self._running[chunk] = steps, later
        self._hold_back_reductions()

        def advance() -> None:
            with putting_off(later), torch.enable_grad():
                next(steps, None)

        return advance

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> tuple:
        """torch's, for a taped microbatch step by step."""
        tape = self._tapes.pop(self._at, None)
        steps, _ = self._running.pop(self._at, (None, None))
        if steps is None and tape is not None:
            outputs, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            gradients = [None] * len(outputs) if gradients is None else list(gradients)
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
            steps = tape.backward([o for o, _ in pairs], [g for _, g in pairs])
        if steps is None:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward=last_backward)
        self._hold_back_reductions()
        for _ in steps:
            pass
        found = []
        for value in bwd_kwargs["input_values"]:
            found.append(value.grad if isinstance(value, Tensor) else None)
            if isinstance(value, Tensor):
                value.grad = None
        return tuple(found), None

    def _weight_work(self) -> Callable[[], None]:
        return (lambda: None) if self._later is None else self._later.compute

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Weight gradients of one microbatch, added to `.grad`."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        if not self.splits or not self.has_backward:
            return
        if self._groups is None:
            self._groups = _sharded_groups(self.submod)
        for group in self._groups:
            for parameter in group.fsdp_params:
                if hasattr(parameter, "_unsharded_param"):
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """torch's; FtcFailure where weight gradients were put off and never asked for."""
        if self.dw_runner:
            raise FtcFailure(f"stage {self.stage_index} reduces its gradients, and those of microbatches {sorted(self.dw_runner)} were not computed: a W is missing")
        super().perform_reduce_grad(grad_scale_factor)

    def clear_runtime_states(self) -> None:
        """Forget the last step, also what one that failed has left. Not torch's, whose 2.11 expects buffers that are for good."""
        for kept in (self.fwd_cache, self.bwd_cache, self.output_chunks, self._tapes, self._running, self.dw_runner):
            kept.clear()

    def _hold_back_reductions(self) -> None:
        if isinstance(self.submod, FSDPModule):
            self.submod.set_is_last_backward(False)
            self.submod.set_reshard_after_backward(False)
            self.submod.set_requires_gradient_sync(False)

    # ------------------------------------------------------------------------------------------------------------ buffers

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with buffers_kept(self.submod):
            found = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            self._let_go(infos)
        return found

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with buffers_kept(self.submod):
            found = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            self._let_go(infos)
        return found

    def _let_go(self, infos: tuple) -> None:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None:
                meta = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device="meta")
                info.ftc_layout = getattr(info, "ftc_layout", meta.requires_grad_(buffer.requires_grad))
                info.buffer = None

    def _make_room(self, infos: tuple) -> None:
        for info in infos:
            layout = getattr(info, "ftc_layout", None)
            if layout is not None and info.buffer is None:
                made = torch.empty_strided(layout.shape, layout.stride(), dtype=layout.dtype, device=self.device)
                info.buffer = made.requires_grad_(layout.requires_grad)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list:
        """torch's, into new buffers."""
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list:
        """torch's, into new buffers."""
        if self.has_backward and not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """torch's; a missing gradient is zero."""
        self._make_room(self.grad_recv_info[mb_index])
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


def splittable(module: nn.Module) -> list[nn.Module]:
    """What in a stage's module can be split: the bodies of stages and trees of regions, outermost alone."""
    if hasattr(module, "regions"):
        return [module]
    return [body for child in module.children() for body in splittable(child)]


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers have the values they had when it ends: torch finds out shapes by running a microbatch, which is not to be counted anywhere."""
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _sharded_groups(module: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters below a module."""
    found = []
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state = fully_shard.state(part)
            if hasattr(state, "_fsdp_param_groups"):
                found += state._fsdp_param_groups
            elif state._fsdp_param_group is not None:  # torch 2.11
                found.append(state._fsdp_param_group)
    return found
