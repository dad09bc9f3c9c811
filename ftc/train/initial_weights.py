"""Weights from the one process that holds them to the shards of all, through the lenses of the passes applied."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def hand_out(program: nn.Module, source: nn.Module | None) -> None:
    """Fill the parameters and buffers of a captured `program`, in place, with those of the unrewritten model `source`.

    `source` is given on the first rank alone; it is emptied on the way, one region at a time, so that memory peaks at its
    size and that of one region. Every rank must call this. Raises ValueError where the source lacks a tensor.
    """
    weights = None if source is None else _taken(source)
    done: set[int] = set()
    for prefix, host, lenses in hosts(program):
        tensors = None if weights is None else lensed(weights, prefix, lenses)
        for name, target in host.named_attributes():
            if id(target) not in done:
                done.add(id(target))
                _put(target, None if tensors is None else tensors[name])


def hosts(program: nn.Module) -> Iterator[tuple[str, nn.Module, list]]:
    """(prefix of names, region or program, its lenses): the regions first, then the shell."""
    for region in program.regions:
        yield f"{region.ftc_name}.", region, region.code.lenses
    yield "", program, program.code.lenses


def lensed(weights: dict[str, Tensor], prefix: str, lenses: list) -> dict[str, Tensor]:
    """The tensors under `prefix`, by names relative to it and in their present form; they are taken out of `weights`."""
    tensors = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    with torch.no_grad():
        for lens in lenses:
            tensors = lens.forward(tensors)
    return tensors


def _taken(source: nn.Module) -> dict[str, Tensor]:
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
def _put(target: Tensor, value: Tensor | None) -> None:
    """Copy the first rank's `value` into `target` on every rank; of a DTensor each gets its shard."""
    first = value is not None
    if first and value.shape != target.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} cannot fill one of {list(target.shape)}")
    if isinstance(target, DTensor):
        device = target.to_local().device
        full = value.to(device, target.dtype) if first else torch.empty(target.shape, dtype=target.dtype, device=device)
        sharded = distribute_tensor(full.contiguous(), target.device_mesh, target.placements, src_data_rank=0)
        target.to_local().copy_(sharded.to_local())
        return
    if first:
        target.copy_(value)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(target, src=0)
