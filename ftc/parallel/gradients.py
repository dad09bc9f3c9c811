"""Gradients on ranks: their norm where weights are divided, and their sum where each rank saw a share of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ftc.parallel.weights import bound_shards, full


def gradient_norm(program: nn.Module) -> Tensor:
    """The 2-norm of all gradients together, as of the whole weights; the same number on every rank (a collective).

    Divided weights count once for each rank's part, all others once. Gradients that are DTensors (FSDP2) are summed over their own mesh.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group

    shards = bound_shards(program)
    by_axis: dict[str | None, list[Tensor]] = {}  # gradients by the axis that their weights are divided over
    for name, parameter in program.named_parameters():
        if parameter.grad is not None:
            axis = shards[name].axis if name in shards else None
            by_axis.setdefault(axis, []).append(parameter.grad.detach())
    total = None
    for axis, gradients in by_axis.items():
        square = full(nn.utils.get_total_norm(gradients)).float().square()
        if axis is not None:
            dist.all_reduce(square, group=_resolve_process_group(program.bound[axis]))
        total = square if total is None else total + square
    return torch.zeros(()) if total is None else total.sqrt()


def clip_gradients(program: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients in place so that their norm is at most `max_norm`; returns the norm before (a collective)."""
    norm = gradient_norm(program)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in program.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.device))
    return norm


def sum_gradients(program: nn.Module, axis: str = "context") -> None:
    """Add up gradients over the ranks of `axis`, in place: for context and expert parallelism without FSDP, which would do it.

    Those of weights divided over `axis` are left alone: an expert's gradient holds all ranks' tokens already."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group

    group, shards = _resolve_process_group(program.bound[axis]), bound_shards(program)
    for name, parameter in program.named_parameters():
        divided = name in shards and shards[name].axis == axis
        if parameter.grad is not None and not divided:
            dist.all_reduce(parameter.grad, group=group)
