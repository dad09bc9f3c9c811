"""Binding a program to process groups: each rank keeps its part of the divided weights, and collectives know whom to talk to."""

from __future__ import annotations

import torch
from torch import nn

from ftc.dialect import ranks
from ftc.dialect.ranks import Place
from ftc.errors import FtcError, nearest
from ftc.parallel.weights import full, gathered, hosts
from ftc.rewrite.shard import Shard, divisions, placements


def bind(program, group=None, axis: str | None = None):
    """Run `program` on the ranks of `group`, in place; returns it.

    `group` is a ProcessGroup or a DeviceMesh of one dimension (default: all ranks), `axis` the pass's axis where the program has several. Divided
    parameters are replaced by this rank's parts (new objects, on any device, the meta device too): bind before building an optimizer and before
    `fully_shard`. Raises FtcError when the group's size is not the degree of the pass.
    """
    import torch.distributed as dist

    axis = _axis(program, axis)
    if axis in program.bound:
        raise FtcError(f"axis {axis!r} of this program is bound already; unbind it first")
    if group is None:
        group = dist.group.WORLD
    group = group.get_group() if hasattr(group, "get_group") else group
    degree, size = program.axes[axis]["degree"], dist.get_world_size(group)
    if size != degree:
        raise FtcError(f"axis {axis!r} was divided over {degree} ranks, but the group has {size}; rewrite with degree = {size}, or bind another group")
    place = Place(dist.get_rank(group), degree, group.group_name)
    ranks.register(axis, place)
    _replace(program, axis, lambda shard, whole: shard.piece(whole, place.rank).clone(memory_format=torch.contiguous_format))
    program.bound[axis] = group.group_name
    return program


def unbind(program, axis: str | None = None):
    """The inverse of `bind`: whole weights on every rank again (a collective), so that the program can be saved or run in one process."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    axis = _axis(program, axis, program.bound)
    group = _resolve_process_group(program.bound[axis])
    _replace(program, axis, lambda shard, part: gathered(shard, full(part), group))
    del program.bound[axis]
    ranks.release(axis)
    return program


def _axis(program, axis: str | None, known: dict | None = None) -> str:
    known = program.axes if known is None else known
    if axis is None and len(known) == 1:
        return next(iter(known))
    if axis not in known:
        what = f"has no axis {axis!r}; {nearest(str(axis), list(known))}" if known and axis else f"has the axes {', '.join(known) or 'none'}; name one"
        raise FtcError(f"this program {what}")
    return axis


def _replace(program, axis: str, change) -> None:
    """Put `change(shard, value)` in the place of every parameter divided over `axis`; what was one weight stays one."""
    made: dict[int, nn.Parameter] = {}
    kept = []
    for _, host in hosts(program):
        placed = {name: shard for name, shard in placements(host.code.lenses).items() if shard.axis == axis}
        for name, shard in placed.items():
            old = host.fetch(name)
            if id(old) not in made:
                made[id(old)] = _like(old, shard, change)
                kept.append(old)  # so that no other object gets its id
            owner, _, leaf = name.rpartition(".")
            store = host.get_submodule(owner)
            (store._parameters if leaf in store._parameters else store._buffers)[leaf] = made[id(old)]
        divided = {name: d for name, d in divisions(host.code.lenses).items() if name in placed}
        host.divided = {n: d for n, d in host.divided.items() if n not in placed} if axis in program.bound else host.divided | divided
    program.forget()
    for region in program.regions:
        region.forget()


def _like(old: torch.Tensor, shard: Shard, change) -> torch.Tensor:
    with torch.no_grad():
        new = change(shard, old.detach())
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
