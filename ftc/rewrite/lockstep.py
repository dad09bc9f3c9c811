"""Running a graph on all ranks in one process, node by node: collectives in their plain forms, everything else once for each rank.

A *seat* is one rank's place on every axis. Gradients are those of each rank's own copy of the outputs, as on real ranks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftc.dialect.collectives import DEFINITIONS, JOINT_DEFINITIONS
from ftc.dialect.ranks import Place, standing_at
from ftc.errors import FtcError
from ftc.rewrite import probe

Seat = tuple[int, ...]


def axes_of(graph: fx.Graph) -> dict[str, int]:
    """The axes that a graph's operators name, with their degrees."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        named = axis_of(node)
        if named is not None:
            found[named[0]] = named[1]
    return found


def axis_of(node: fx.Node) -> tuple[str, int] | None:
    """(axis, degree) of a node whose operator works on ranks."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "ftc":
        return None
    bound = arguments(node)
    return (bound["axis"], bound["degree"]) if "axis" in bound else None


def check_axis(degree: int, axis: str) -> None:
    """ValueError where a pass cannot divide anything over so many ranks, or an axis cannot have this name."""
    if degree < 2:
        raise ValueError(f"degree = {degree} divides nothing; use 2 or more ranks, or leave the pass out")
    if not axis.isidentifier():
        raise ValueError(f"axis = {axis!r} is no name; use letters, digits and underscores")


def already_on(graph: fx.Graph, axis: str, degree: int) -> int:
    """How many operators of the graph work on the ranks of `axis` already. FtcError where these are not `degree` ranks."""
    there = [found for found in map(axis_of, graph.nodes) if found is not None and found[0] == axis]
    if there and there[-1][1] != degree:
        raise FtcError(f"axis {axis!r} has {there[-1][1]} ranks in this program already; give another one with axis = '...'")
    return len(there)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments given to a node, by name."""
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)


def seats_of(axes: dict[str, int]) -> list[Seat]:
    """Every rank, as its number on each axis."""
    return list(itertools.product(*(range(degree) for degree in axes.values())))


@contextlib.contextmanager
def seated(axes: dict[str, int], seat: Seat):
    """Operators look up this seat's ranks while inside."""
    with standing_at({axis: Place(rank, degree) for (axis, degree), rank in zip(axes.items(), seat, strict=True)}):
        yield


def together(node: fx.Node, axes: dict[str, int], seats: list[Seat], operands: dict[Seat, tuple[tuple, dict]]) -> dict[Seat, Any] | None:
    """The value of a collective on every seat; None where the node is none."""
    if node.op != "call_function" or getattr(node.target, "namespace", None) != "ftc":
        return None
    name = node.target._schema.name.removeprefix("ftc::")
    definition, joint = DEFINITIONS.get(name), JOINT_DEFINITIONS.get(name)
    if definition is None and joint is None:
        return None
    axis, _ = axis_of(node)
    place = list(axes).index(axis)
    names = [a.name for a in node.target._schema.arguments]
    found: dict[Seat, Any] = {}
    groups: dict[Seat, list[Seat]] = {}
    for seat in seats:  # in the order of their rank on the axis
        groups.setdefault((*seat[:place], *seat[place + 1 :]), []).append(seat)
    for group in groups.values():
        bound = [dict(zip(names, operands[seat][0], strict=False)) | operands[seat][1] for seat in group]
        if joint is not None:
            results = joint(bound)
        else:
            others = {k: v for k, v in bound[0].items() if k not in (names[0], "axis", "degree")}
            results = definition([b[names[0]] for b in bound], **others)
        found |= dict(zip(group, results, strict=True))
    return found


def run(
    graph: fx.Graph,
    axes: dict[str, int],
    inputs: dict[Seat, Sequence[Tensor]],
    parameters: dict[Seat, dict[str, Tensor]],
    lifted: bool = True,
    call_module: Callable[[fx.Node, dict[Seat, tuple[tuple, dict]]], dict[Seat, Any]] | None = None,
) -> dict[Seat, tuple[Tensor, ...]]:
    """The outputs of a graph on every seat. Differentiable. `call_module` runs the nodes that call regions."""
    seats = seats_of(axes)
    values: dict[Seat, dict[fx.Node, Any]] = {seat: {} for seat in seats}
    remaining = {seat: iter(inputs[seat]) for seat in seats}
    last_user = {used: node for node in graph.nodes for used in node.all_input_nodes}
    with probe.lifted_defaults() if lifted else contextlib.nullcontext():
        for node in graph.nodes:
            if node.op == "placeholder":
                results = {seat: next(remaining[seat]) for seat in seats}
            elif node.op == "get_attr":
                results = {seat: parameters[seat][str(node.target)] for seat in seats}
            elif node.op == "output":
                return {seat: tuple(values[seat][n] for n in node.args[0]) for seat in seats}
            else:
                operands = {s: fx.node.map_arg((node.args, node.kwargs), values[s].__getitem__) for s in seats}
                if node.op == "call_module":
                    results = call_module(node, operands)
                else:
                    results = together(node, axes, seats, operands) or _each(node, axes, seats, operands, lifted)
            for seat in seats:
                values[seat][node] = results[seat]
                for used in node.all_input_nodes:
                    if last_user[used] is node:
                        values[seat].pop(used, None)
    raise ValueError("the graph has no output node")


def _each(node: fx.Node, axes: dict[str, int], seats: list[Seat], operands: dict, lifted: bool) -> dict[Seat, Any]:
    ranked = axis_of(node) is not None
    found = {}
    for seat in seats:
        with seated(axes, seat) if ranked else contextlib.nullcontext():
            found[seat] = probe.call(node, *operands[seat], lifted)
    return found
