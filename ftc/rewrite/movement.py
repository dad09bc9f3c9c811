"""Data movement seen through: which source element each element of a tensor is.

A chain of views, transposes, slices, copies, repeats and concatenations moves elements and computes nothing. Run on integers 1..n in the
place of its sources, it says where every element came from; two chains are equal iff these maps are equal, whatever they are spelled with.
A negated element carries its number negated. Maps are compared at every probed size.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from ftc.rewrite import probe
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import Analysis, Builder, Trial, drop_dead, sizes_of

MOVES = {
    getattr(getattr(aten, packet), overload)
    for packet, overload in [
        ("view", "default"), ("_unsafe_view", "default"), ("reshape", "default"), ("transpose", "int"), ("permute", "default"),
        ("t", "default"), ("mT", "default"), ("numpy_T", "default"), ("unsqueeze", "default"), ("squeeze", "default"), ("squeeze", "dim"),
        ("squeeze", "dims"), ("expand", "default"), ("expand_as", "default"), ("broadcast_to", "default"), ("slice", "Tensor"),
        ("select", "int"), ("narrow", "default"), ("split", "Tensor"), ("split", "sizes"), ("split_with_sizes", "default"), ("chunk", "default"),
        ("tensor_split", "sections"), ("unbind", "int"), ("cat", "default"), ("concat", "default"), ("stack", "default"),
        ("contiguous", "default"), ("clone", "default"), ("alias", "default"), ("repeat", "default"), ("tile", "default"),
        ("repeat_interleave", "self_int"), ("flatten", "using_ints"), ("unflatten", "int"), ("movedim", "int"), ("movedim", "intlist"),
        ("moveaxis", "int"), ("swapaxes", "default"), ("swapdims", "default"), ("index_select", "default"), ("index", "Tensor"),
        ("gather", "default"), ("take_along_dim", "default"), ("roll", "default"), ("flip", "default"), ("view_as", "default"),
        ("reshape_as", "default"), ("slice_scatter", "default"), ("select_scatter", "default"), ("unfold", "default"), ("diagonal", "default"),
        ("hstack", "default"), ("vstack", "default"), ("copy", "default"),
    ]
    if hasattr(getattr(aten, packet, None), overload)
}  # fmt: skip
_TWO_SOURCES = {aten.slice_scatter.default, aten.select_scatter.default}
_LISTS = {aten.cat.default, aten.stack.default, aten.concat.default, aten.hstack.default, aten.vstack.default}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
}


def widens(node: fx.Node) -> bool:
    """A cast that loses nothing: to a dtype that holds every value of the one before."""
    if node.target not in CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    return torch.promote_types(before, after) == after


def dropout_off(node: fx.Node) -> bool:
    """A dropout node that is the identity: probability 0, or not in training."""
    return node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2])


def sources(node: fx.Node, casts: bool = True, signs: bool = False) -> list[fx.Node] | None:
    """The data arguments of a movement node; None where the node is none. With `casts`, a cast that loses nothing moves data too."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        parent = node.args[0]
        return [parent] if isinstance(parent, fx.Node) and parent.target in MOVES else None
    if node.target in _LISTS:
        return list(node.args[0])
    if node.target in _TWO_SOURCES:
        return [node.args[0], node.args[1]]
    if (
        node.target in MOVES
        or dropout_off(node)
        or (casts and widens(node))
        or (signs and node.target is aten.neg.default)
    ):
        return [node.args[0]]
    return None


def apply(node: fx.Node, trial: Trial, analysis: Analysis, of: Callable[[fx.Node], Any]) -> Any:
    """Run a movement node on other data: `of` gives the stand-in of each data argument, sizes and indices are the trial's."""
    if node.target in CASTS or dropout_off(node):
        return of(node.args[0])
    if node.target is operator.getitem:
        return of(node.args[0])[node.args[1]]
    data = set(sources(node, signs=True) or [])
    like = node.target in (aten.view_as.default, aten.reshape_as.default, aten.expand_as.default)

    def stand_in(used: fx.Node) -> Any:
        return of(used) if used in data and not (like and used is not node.args[0]) else analysis.value(used, trial)

    args = fx.node.map_arg(node.args, stand_in)
    kwargs = {key: value for key, value in fx.node.map_arg(node.kwargs, stand_in).items() if key != "memory_format"}
    return node.target(*args, **kwargs)


@dataclass
class Cone:
    """The movement nodes above `node` down to the `roots` that compute; `members` nearest first, `node` included, roots included."""

    node: fx.Node
    roots: list[fx.Node]
    members: list[fx.Node]


def cone(
    analysis: Analysis,
    node: fx.Node,
    casts: bool = True,
    signs: bool = False,
    stop: Callable[[fx.Node], bool] | None = None,
) -> Cone:
    """The movement cone that ends in `node`. A node with data-dependent indices, or for which `stop` holds, is a root."""
    roots, members, seen, queue = [], [], {node}, [node]
    while queue:
        current = queue.pop(0)
        above = None if stop is not None and stop(current) else sources(current, casts, signs)
        if above is not None:
            data = set(above)
            others = [used for used in current.all_input_nodes if used not in data]
            like = current.target in (aten.view_as.default, aten.reshape_as.default, aten.expand_as.default, *CASTS)
            if not like and any(not analysis.fixed(used) for used in others):
                above = None
        members.append(current)
        if above is None:
            roots.append(current)
            continue
        for used in above:
            if used not in seen:
                seen.add(used)
                queue.append(used)
    return Cone(node, roots, members)


def index_maps(analysis: Analysis, cone: Cone, trial: Trial) -> dict[fx.Node, Any]:
    """For every member of a cone the number of the source element in each of its places: 1..n through the roots in order."""
    maps: dict[fx.Node, Any] = {}
    offset = 1
    for root in cone.roots:
        shape = [probe.concrete(size, trial.sizes) for size in root.meta["val"].shape]
        count = torch.Size(shape).numel()
        maps[root] = torch.arange(offset, offset + count).view(shape)
        offset += count
    for member in sorted(cone.members):
        if member not in maps:
            maps[member] = apply(member, trial, analysis, maps.__getitem__)
    return maps


def drop_round_trips(analysis: Analysis) -> None:
    """Let readers of a chain of moves that ends where it began (a transpose and its inverse, a slice of everything) read its beginning, in place.

    Only where sizes, strides and dtype are the same too, so that a later view still finds the layout it needs."""
    for node in list(analysis.graph.nodes):
        begin = _round_trip(analysis, node)
        if begin is not None:
            node.replace_all_uses_with(begin)
    drop_dead(analysis.graph)


def _round_trip(analysis: Analysis, node: fx.Node) -> fx.Node | None:
    """The farthest node above, through single moves, that has the same elements in the same places and the same layout; or None."""
    chain, above, found = [], node, None
    while len(chain) < 6 and not {aten.contiguous.default, aten.clone.default} & {above.target}:
        data = sources(above, casts=False)
        if (
            data is None
            or len(data) != 1
            or any(not analysis.fixed(used) for used in above.all_input_nodes if used not in data)
        ):
            break
        chain.append(above)
        above = data[0]
        if _same_layout(node, above) and _is_identity(analysis, above, chain):
            found = above
    return found


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    if not isinstance(b.meta["val"], Tensor) or not isinstance(a.meta["val"], Tensor) or sizes_of(a) != sizes_of(b):
        return False
    return a.meta["val"].dtype == b.meta["val"].dtype and sizes_of(a, strides=True) == sizes_of(b, strides=True)


def _is_identity(analysis: Analysis, begin: fx.Node, chain: list[fx.Node]) -> bool:
    for trial in _sizes_once(analysis):
        shape = [probe.concrete(size, trial.sizes) for size in begin.meta["val"].shape]
        maps: dict[fx.Node, Any] = {begin: torch.arange(torch.Size(shape).numel()).view(shape)}
        for node in reversed(chain):
            maps[node] = apply(node, trial, analysis, maps.__getitem__)
        if not isinstance(maps[chain[0]], Tensor) or not torch.equal(maps[chain[0]], maps[begin]):
            return False
    return True


def _sizes_once(analysis: Analysis) -> list[Trial]:
    seen: dict[tuple, Trial] = {}
    for trial in analysis.trials:
        seen.setdefault(tuple(trial.sizes.values()), trial)
    return list(seen.values())


def realise(
    build: Builder, wanted: Callable[[dict[fx.Node, Any]], Tensor], above: Cone, shape: list[Any] | None = None
) -> fx.Node | None:
    """The cheapest node that holds the elements `wanted(maps)` in their places: a member of the cone, one of its permutations, or a reshape
    of one to `shape` (symbolic sizes). None where there is none. Casts on the way are dropped: the result may have another dtype."""
    analysis = build.analysis
    trials = _sizes_once(analysis)
    maps = [index_maps(analysis, above, trial) for trial in trials]
    targets = [wanted(each) for each in maps]
    members = [member for member in above.members if isinstance(maps[0][member], Tensor)]
    members.reverse()
    for member in members:
        if all(torch.equal(each[member], target) for each, target in zip(maps, targets, strict=True)):
            return member
    for member in members:
        dims = member.meta["val"].dim()
        if dims != targets[0].dim() or maps[0][member].numel() != targets[0].numel():
            continue
        for order in permutations(range(dims)):
            if all(
                torch.equal(each[member].permute(order), target) for each, target in zip(maps, targets, strict=True)
            ):
                moved = [dim for dim in range(dims) if order[dim] != dim]
                if len(moved) == 2:
                    return build(aten.transpose.int, member, *moved)
                return build(aten.permute.default, member, list(order))
    if shape is None:
        return None
    for member in members:
        fits = all(each[member].numel() == target.numel() for each, target in zip(maps, targets, strict=True))
        if fits and all(
            torch.equal(each[member].reshape(-1), target.reshape(-1))
            for each, target in zip(maps, targets, strict=True)
        ):
            return build(aten.reshape.default, member, shape)
    return None
