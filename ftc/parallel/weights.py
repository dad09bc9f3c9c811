"""Which parameters of a program are divided over ranks, and their values made whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ftc.rewrite.shard import Shard, placements


def hosts(program) -> list[tuple[str, nn.Module]]:
    """The regions, then the program for what is outside of them, each with the prefix of its names."""
    return [(f"{region.ftc_name}.", region) for region in program.regions] + [("", program)]


def divided_parameters(program) -> dict[str, Shard]:
    """How each divided parameter is divided, by its name in the program: dim, blocks, degree, axis."""
    return {prefix + name: shard.with_prefix(prefix) for prefix, host in hosts(program) for name, shard in placements(host.code.lenses).items()}


def bound_shards(program) -> dict[str, Shard]:
    """Those of `divided_parameters` of which this rank holds its part alone, as the program is bound to their axis."""
    return {name: shard for name, shard in divided_parameters(program).items() if shard.axis in program.bound}


def num_whole_parameters(program) -> int:
    """Numbers in all parameters, whole, of a program that may be bound."""
    shards = bound_shards(program)
    return sum(p.numel() * (shards[name].degree if name in shards else 1) for name, p in program.named_parameters())


def full(tensor: Tensor) -> Tensor:
    """A DTensor as the tensor that its mesh holds together (a collective); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """A DTensor's part on this rank; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gathered(shard: Shard, part: Tensor, group) -> Tensor:
    """The whole weight on every rank, from every rank's part: a collective over the axis's group."""
    import torch.distributed as dist

    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(shard.degree)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return shard.whole(parts)


def whole_tensors(program, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, by the name of a parameter that has its shape (weights, gradients, moments). Every rank has to ask for the same."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    shards = bound_shards(program)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor = full(tensor)
            shard = shards.get(name)
            if shard is not None and tensor.dim():
                tensor = gathered(shard, tensor.detach(), _resolve_process_group(program.bound[shard.axis]))
            yield name, tensor


def whole_state_dict(program) -> dict[str, Tensor]:
    """The program's state_dict with whole weights, on every rank (a collective while the program is bound)."""
    return dict(whole_tensors(program, program.state_dict()))
