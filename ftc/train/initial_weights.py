"""Weights from the one process that holds them to the shards of all, through the lenses of the passes applied."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ftc.capture.growth import drawn_like, is_drawn
from ftc.dialect.ranks import place_on
from ftc.parallel.weights import bound_shards, hosts, local, whole_tensors
from ftc.rewrite.shard import Shard


def hand_out(program: nn.Module, source: nn.Module | None, given: Mapping[str, int] | None = None) -> None:
    """Fill the parameters and buffers of a captured `program`, in place, with those of the model `source`: unrewritten, or a saved
    program, whose weights have been through the first `given[host]` lenses of each host.

    `source` is given on the first rank alone and is emptied; memory peaks there at its size and that of one region. Every
    rank must call this. Raises ValueError for a tensor of another shape, KeyError where the source lacks one.
    """
    weights = None if source is None else taken(source)
    inside = tuple(f"{name}." for name in program._regions)
    done: set[int] = set()
    shards = bound_shards(program)
    for prefix, host in hosts(program):
        if prefix.removesuffix(".") in program._added:
            continue
        tensors = None
        if weights is not None:
            own = {n: t for n, t in weights.items() if (n.startswith(prefix) if prefix else not n.startswith(inside))}
            lenses = host.code.lenses[(given or {}).get(prefix, 0) :]
            tensors = lensed(weights, {n.removeprefix(prefix): t for n, t in own.items()}, lenses)
        for name, target in host.named_attributes():
            if id(target) not in done:
                done.add(id(target))
                _put(target, None if tensors is None else tensors[name], shards.get(prefix + name))
    for name in program._added:  # a region that a pass added begins as a function of the one it was made like
        _fill_added(program, name, shards)


@torch.no_grad()
def _fill_added(program: nn.Module, name: str, shards: dict[str, Shard]) -> None:
    """`fill_region` where the ranks hold parts: what is drawn is drawn whole, by each rank for itself, which keeps its part."""
    about, region = program._added[name], program._regions[name]
    for path, parameter in region.named_parameters():
        value = program._regions[about["like"]].fetch(path)
        if not is_drawn(about, parameter):
            parameter.copy_(value)
            continue
        like = dict(whole_tensors(program, {f"{about['like']}.{path}": value})).popitem()[1]
        drawn = drawn_like(like, f"{name}.{path}", about["seed"])
        keep_part(parameter, drawn, shards.get(f"{name}.{path}"))


def lensed(weights: dict[str, Tensor], tensors: dict[str, Tensor], lenses: list) -> dict[str, Tensor]:
    """`tensors` through the lenses; what a lens only reads may also stand in `weights`, the whole model's."""
    with torch.no_grad():
        for lens in lenses:
            read = {name: weights[name] for name in lens.reads if name not in tensors}
            tensors = {n: t for n, t in lens.forward({**tensors, **read}).items() if n not in read}
    return tensors


def taken(source: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module by name, every name of a shared one; the module keeps none."""
    taken = {}
    for prefix, module in source.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for store in (module._parameters, module._buffers):
            taken |= {dot + name: tensor.detach() for name, tensor in store.items() if tensor is not None}
    for module in source.modules():
        module._parameters.clear()
        module._buffers.clear()
    return taken


@torch.no_grad()
def _put(target: Tensor, value: Tensor | None, shard: Shard | None = None) -> None:
    """Copy the first rank's `value` into `target` on every rank; each gets its part where it is divided or a DTensor."""
    first = value is not None
    if shard is not None or (isinstance(target, DTensor) and target.device_mesh.size() < dist.get_world_size()):
        _put_part(target, value, shard)
        return
    if first and value.shape != target.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} cannot fill one of {list(target.shape)}")
    if isinstance(target, DTensor):
        device = local(target).device
        full = value.to(device, target.dtype) if first else torch.empty(target.shape, dtype=target.dtype, device=device)
        sharded = distribute_tensor(full.contiguous(), target.device_mesh, target.placements, src_data_rank=0)
        local(target).copy_(local(sharded))
        return
    if first:
        target.copy_(value)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(target, src=0)


def _put_part(target: Tensor, value: Tensor | None, shard: Shard | None) -> None:
    """The same where no group of ranks has all parts: every rank gets the whole of this one tensor, and keeps its own."""
    shape, device = list(target.shape), local(target).device
    if shard is not None:
        shape[shard.dim] = sum(shard.blocks)
    if value is not None and list(value.shape) != shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} cannot fill one of {shape}")
    whole = torch.empty(shape, dtype=target.dtype, device=device) if value is None else value.to(device, target.dtype).contiguous()
    dist.broadcast(whole, src=0)
    keep_part(target, whole, shard)


def keep_part(target: Tensor, whole: Tensor, shard: Shard | None = None) -> None:
    """Copy this rank's part of a tensor that every rank has whole."""
    own = whole if shard is None else shard.piece(whole, place_on(shard.axis, shard.degree).rank)
    if isinstance(target, DTensor):
        own = distribute_tensor(own.contiguous(), target.device_mesh, target.placements, src_data_rank=None)
    local(target).copy_(local(own))
