"""What else an order must keep besides data: random numbers in their order, writes behind earlier reads and before later ones; and who shares memory."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ftc.errors import FtcError
from ftc.pipeline.communication import is_wait

_PLAIN = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.eq, operator.truediv}
_PLAIN |= {max, min, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float}


def is_random(node: fx.Node) -> bool:
    """Whether a node moves the random generator on. Attention carries the mark for its dropout, and is not random where that is 0."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    names = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    return given.get("dropout_p", names["dropout_p"]) != 0 if "dropout_p" in names else True


def written(node: fx.Node) -> list[fx.Node]:
    """Operands that a node writes to."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    mutated = [given.get(a.name) for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    flat = [x for value in mutated for x in (value if isinstance(value, (list, tuple)) else [value])]
    return [x for x in flat if isinstance(x, fx.Node)]


def check_known(graph: fx.Graph) -> None:
    """FtcError where a node calls something whose effects nobody declares."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_method") or (
            node.op == "call_function" and not isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) and node.target not in _PLAIN
        ):
            raise FtcError(f"a graph that is to be reordered calls {node.target!r} ({node.name}), whose effects are not known; use operators")


def roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node the one whose memory it shows: itself, or what it is a view, an element or the awaited value of."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        found[node] = node
        if node.op != "call_function":
            continue
        aliases = is_wait(node) or (isinstance(node.target, torch._ops.OpOverload) and _returns_alias(node.target))
        element = node.target is operator.getitem and found[node.args[0]] is not node.args[0]  # of a split: a view as well
        if (aliases or element) and node.all_input_nodes:
            found[node] = found[node.all_input_nodes[0]]
    return found


def _returns_alias(target: torch._ops.OpOverload) -> bool:
    return any(r.alias_info is not None for r in target._schema.returns)


def order_edges(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node those that must come before it though it does not read them, from the order that the graph has now.

    Random operators follow one another over all lanes. A write comes behind every earlier use of the memory, and before every later one.
    """
    check_known(graph)
    needed: dict[fx.Node, list[fx.Node]] = {}
    shown = roots(graph)
    random: fx.Node | None = None
    changed = {shown[x] for node in graph.nodes for x in written(node)}
    users: dict[fx.Node, list[fx.Node]] = {root: [] for root in changed}
    writer: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        before: list[fx.Node] = []
        if is_random(node):
            before += [random] if random is not None else []
            random = node
        touched = dict.fromkeys(shown[x] for x in node.all_input_nodes if shown[x] in changed)
        for root in touched:
            before += [writer[root]] if root in writer else []
        for root in dict.fromkeys(shown[x] for x in written(node)):
            before += users[root]
            users[root], writer[root] = [], node
        for root in touched:
            users[root].append(node)
        needed[node] = [n for n in dict.fromkeys(before) if n is not node]
    return needed
