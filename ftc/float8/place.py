"""Putting float8 products in a graph's place, and taking them out again to see that nothing else has changed.

Products of one input that nothing else reads become one node: the input is cast once, and kept once. With `save` other than "input" the norm or gate
before them goes into the node as well, and is computed again in the backward pass (`ftc.float8.prologue`).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.float8 import prologue
from ftc.float8.sites import Site
from ftc.rewrite.edit import Editor

aten, ftc = torch.ops.aten, torch.ops.ftc
LINEAR, LINEARS = ftc.float8_linear.default, ftc.float8_linears.default
_CASTS = {aten.to.dtype, aten._to_copy.default}


@dataclass(frozen=True)
class How:
    """Options of the pass that a placed product carries."""

    recipe: str
    save: str
    products: str


def place(graph: fx.Graph, sites: Sequence[Site], how: How) -> None:
    """Replace the products of `sites` in place."""
    by_input: dict[fx.Node, list[Site]] = {}
    for site in sites:
        if site.experts:
            _place_experts(site, how)
        else:
            by_input.setdefault(site.x, []).append(site)
    for x, group in by_input.items():
        nodes = {site.node for site in group}
        if set(x.users) == nodes and all(site.stored == "FD" for site in group):
            _place_group(graph, x, group, how)
        else:
            for site in group:
                _place_alone(graph, site, how)


def _place_experts(site: Site, how: How) -> None:
    site.node.target = ftc.float8_moe.default
    site.node.kwargs = {**site.node.kwargs, "recipe": how.recipe}


def _weight(edit: Editor, site: Site) -> fx.Node:
    return site.weight if site.stored == "FD" else edit(aten.t.default, site.weight)


def _place_alone(graph: fx.Graph, site: Site, how: How) -> None:
    edit = Editor(graph, site.node)
    new = edit(LINEAR, site.x, _weight(edit, site), site.bias, how.recipe, how.save, how.products)
    _replace(graph, site.node, new)


def _place_group(graph: fx.Graph, x: fx.Node, group: Sequence[Site], how: How) -> None:
    edit = Editor(graph, group[0].node)
    before = _prologue(x) if how.save != "input" else None
    if before is None and len(group) == 1:
        _place_alone(graph, group[0], how)
        return
    name, inputs, constants = before or ("", [x], [])
    biases = [site.bias for site in group]
    made = edit(
        LINEARS, inputs, [site.weight for site in group], biases if any(b is not None for b in biases) else [],
        how.recipe, how.save, how.products, name, constants,
    )  # fmt: skip
    parts = [edit(operator.getitem, made, number) for number in range(len(group))]  # all of them before the first is replaced
    for site, part in zip(group, parts, strict=True):
        _replace(graph, site.node, part)


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _prologue(h: fx.Node) -> tuple[str, list[fx.Node], list[float]] | None:
    """What makes `h` as a prologue that can be computed again: its name, inputs and constants; None for anything else."""
    if h.target is ftc.gated.default:
        return f"{prologue.GATED}:{h.args[2]}", list(h.args[:2]), []
    return _norm(h)


def _norm(h: fx.Node) -> tuple[str, list[fx.Node], list[float]] | None:
    """`rms_norm(x, [D], w, eps)` in x's dtype, or `w * rms_norm(x.float(), [D], w?, eps).to(x.dtype)`, the casts as they may be missing."""
    dtype = h.meta["val"].dtype
    gain = None
    if h.target is aten.mul.Tensor:
        sides = [a for a in h.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        others = [a for a in h.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(sides) != 1 or len(others) != 1 or len(others[0].users) > 1 or h.args[0] is not sides[0]:
            return None
        gain, h = sides[0], others[0]
    outside = gain is not None
    if h.target in _CASTS and len(h.users) == 1 and h.args[0].target is aten.rms_norm.default and len(h.args[0].users) == 1:
        h = h.args[0]
    if h.target is not aten.rms_norm.default or len(h.args) < 4 or h.args[3] is None or len(h.args[1]) != 1:
        return None
    x, _, inner, eps = h.args
    if outside and inner is not None:
        return None
    gain, wide = gain if outside else inner, False
    if x.target in _CASTS and x.meta["val"].dtype == torch.float32 and x.args[0].meta["val"].dtype == dtype and dtype != torch.float32:
        x, wide = x.args[0], True
    if x.meta["val"].dtype != dtype or (gain is not None and gain.meta["val"].dtype != dtype and not wide):
        return None
    if outside and gain.meta["val"].dtype != dtype:
        return None
    return prologue.NORM, [x, *([] if gain is None else [gain])], [float(eps), 0.0 if outside else 1.0, float(wide)]


def is_float8(node: fx.Node) -> bool:
    """Whether a node is a product in float8."""
    return node.op == "call_function" and str(node.target).startswith(("ftc.float8_linear", "ftc.float8_moe", "ftc.fine_linear"))


def in_high_precision(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph with every float8 product as a plain one of the same operands."""
    from ftc.rewrite.pipeline import copy_graph

    copy = copy_graph(graph)
    for node in copy.nodes:
        if not is_float8(node):
            continue
        if node.target is LINEAR:
            node.target, node.args = aten.linear.default, tuple(a for a in node.args[:3])
        elif node.target is LINEARS:
            node.target = plain_linears
        else:
            node.target, node.kwargs = ftc.moe.default, {k: v for k, v in node.kwargs.items() if k != "recipe"}
    return copy


def plain_linears(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], *options) -> list[Tensor]:
    """What ftc::float8_linears computes, in high precision."""
    name, constants = (*options[3:], "", [])[:2] if len(options) > 3 else ("", [])
    h = prologue.apply(name, inputs, constants)
    return [torch.nn.functional.linear(h, w, b) for w, b in zip(weights, list(biases) or [None] * len(weights), strict=True)]


