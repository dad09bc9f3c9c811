"""Weights of a pipelined run: from the first rank to the stages of all, and back to the first rank at the end."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftc.capture.growth import drawn_like, is_drawn
from ftc.parallel.weights import bound_shards, hosts, local, whole_tensors
from ftc.rewrite.shard import Shard
from ftc.train.division import without_division
from ftc.train.initial_weights import keep_part, lensed, taken
from ftc.train.pipeline_part import Cut, names_of
from ftc.train.ranks import is_first_rank


@torch.no_grad()
def fill_stages(cut: Cut) -> None:
    """Fill the parameters and buffers of this rank's stages, in place, with the run's initial weights: the same as on one process.

    The first rank builds the model, and shows each tensor to all; a rank keeps its stages' shards. Memory peaks on the first rank
    at the model's size and that of one region, on the others at their stages' and one tensor. All ranks must call it.
    """
    model = cut.model
    with torch.device("cpu"):
        source = model.initial_model() if is_first_rank() else None
    for part in cut.parts:
        part.share_tied()
    held = _local_targets(cut)
    device = next((local(t).device for targets in held.values() for t in targets), torch.device("cpu"))
    shards = bound_shards(model.body)
    for names, like, value in _whole_values(cut, source):
        whole = torch.empty(whole_shape(like, shards.get(names[0])), dtype=like.dtype, device=device)
        if value is not None:
            if value.shape != whole.shape:
                raise ValueError(f"{names[0]}: a tensor of shape {list(value.shape)} cannot fill one of {list(whole.shape)}")
            whole.copy_(value)
        dist.broadcast(whole, src=0)
        for target in {id(t): t for name in names for t in held.get(name, ())}.values():
            keep_part(target, whole, shards.get(names[0]))


def whole_shape(like: Tensor, shard: Shard | None) -> list[int]:
    """Of the weight that `like` is this rank's part of."""
    shape = list(like.shape)
    if shard is not None:
        shape[shard.dim] = sum(shard.blocks)
    return shape


def _local_targets(cut: Cut) -> dict[str, list[Tensor]]:
    """This rank's own tensors by whole name; two stages may hold one each."""
    found: dict[str, list[Tensor]] = {}
    for part in cut.parts:
        for name, tensor in names_of(part.body).items():
            found.setdefault(name, []).append(tensor)
    return found


def _whole_values(cut: Cut, source: Any) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
    """Each tensor of the model once: its names, one of its shape and dtype, and on the first rank its value. Same order on all ranks."""
    program, given = cut.model.body, cut.model.lenses_given
    weights = None if source is None else taken(source)
    inside = tuple(f"{name}." for name in program._regions)
    others = {name: tied for tied in cut.model._tied for name in tied}
    kept: dict[str, dict[str, Tensor]] = {}  # of regions that added ones are made like
    wanted = {about["like"] for about in program._added.values()}
    done: set[str] = set()
    for prefix, host in hosts(program):
        name_of_host = prefix.removesuffix(".")
        if name_of_host in program._added:
            continue
        tensors = None
        if weights is not None:
            own = {n: t for n, t in weights.items() if (n.startswith(prefix) if prefix else not n.startswith(inside))}
            lenses = host.code.lenses[given.get(prefix, 0) :]
            tensors = lensed(weights, {n.removeprefix(prefix): t for n, t in own.items()}, lenses)
            if name_of_host in wanted:
                kept[name_of_host] = tensors
        for name, like in host.named_attributes():
            if prefix + name not in done:
                names = others.get(prefix + name, [prefix + name])
                done.update(names)
                yield names, like, None if tensors is None else tensors[name]
    for name, about in program._added.items():
        for path, like in program._regions[name].named_attributes():
            value = None if weights is None else _added_value(kept[about["like"]][path].to(like.dtype), f"{name}.{path}", about, like)
            yield others.get(f"{name}.{path}", [f"{name}.{path}"]), like, value


def _added_value(value: Tensor, name: str, about: dict[str, Any], like: Tensor) -> Tensor:
    """How a tensor of a region that a pass added begins: as that of the region it was made like, or drawn with its spread."""
    drawn = isinstance(like, torch.nn.Parameter) and is_drawn(about, like)
    return drawn_like(value, name, about["seed"]) if drawn else value


@torch.no_grad()
def gathered_weights(cut: Cut, group: Any) -> dict[str, Tensor] | None:
    """Every tensor of the model whole, by its name, on the CPU of the first rank; None on the others. All ranks must call it.

    group: the pipeline's. A tensor that several stages hold is taken from the first of them.
    """
    rank, program = dist.get_rank(group), cut.model.body
    in_the_first_pipeline = dist.get_process_group_ranks(group)[0] == 0
    targets, shards = {part.index: names_of(part.body) for part in cut.parts}, bound_shards(program)
    weights: dict[str, Tensor] = {}
    for prefix, host in hosts(program):
        for name, like in host.named_attributes():
            whole_name = prefix + name
            stage = cut.holder(whole_name)
            owner = cut.pipeline.ranks[stage]
            value = None
            if owner == rank:
                ((_, whole),) = whole_tensors(program, {whole_name: targets[stage][whole_name]})
                value = whole.detach()
            if in_the_first_pipeline:
                shape = whole_shape(like, shards.get(whole_name))
                found = _at_the_first(value, torch.empty(shape, dtype=like.dtype, device="meta"), owner, rank, group, cut)
                if found is not None:
                    weights[whole_name] = found.cpu()
    return without_division(program, weights, cut.model.lenses_kept) if is_first_rank() else None


def _at_the_first(value: Tensor | None, like: Tensor, owner: int, rank: int, group: Any, cut: Cut) -> Tensor | None:
    """A value that the pipeline's rank `owner` has, on its rank 0; None elsewhere."""
    if owner == 0 or rank not in (0, owner):
        return value if rank == 0 else None
    if rank == owner:
        dist.send(value.contiguous(), group=group, group_dst=0)
        return None
    device = local(next(iter(cut.parts[0].parameters()))).device
    received = torch.empty(like.shape, dtype=like.dtype, device=device)
    dist.recv(received, group=group, group_src=owner)
    return received
