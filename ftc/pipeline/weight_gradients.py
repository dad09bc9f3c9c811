"""A backward graph cut into the gradients of inputs and those of weights, so that a pipeline can put the second off (Qi et al. 2023, Zero Bubble
Pipeline Parallelism, arXiv:2401.10241, section 2).

    y = x W^T:    I   dx = dy W        the stage before waits for it
                  W   dW = dy^T x      nobody waits for it

The input half holds what input gradients need and nothing else. The weight half starts from values of both: what the forward kept, and what the
input half made on its way. Nothing is computed in both halves but casts, where keeping what they are made from takes less memory, and what one
operator makes for both together, see `MASKS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ftc.pipeline.merge_trace import is_getitem, is_view

aten = torch.ops.aten

# Operators that make gradients of inputs and weights in one go, those that a list of booleans names. Each is put into both halves with what the half
# needs. For ftc::moe_backward this makes 3 of its 8 products twice: the experts' first product, made again as in every backward, and grad W_down.
MASKS = ("want", "output_mask")
# Not those whose gradients of weights are sums over what they read anyway, nor the one that would have to send its rows to other ranks once more.
_TOGETHER = (
    "ftc::expert_parallel_moe_backward",
    "aten::native_layer_norm_backward",
    "aten::native_group_norm_backward",
    "aten::native_batch_norm_backward",
    "aten::_fused_rms_norm_backward",
)


@dataclass(frozen=True)
class Halves:
    """The two halves of a backward graph.

    input: takes all that the backward graph takes; returns (a gradient or None for each result of the backward graph, None for weights; values for
    the other half). weight: takes these values and those placeholders of the backward graph that `kept` numbers, in the order (placeholders, values);
    returns a gradient or None for each result of the backward graph.
    """

    input: fx.GraphModule
    weight: fx.GraphModule
    kept: tuple[int, ...]


def halve(backward: fx.Graph, is_weight: Sequence[bool]) -> Halves:
    """Cut a backward graph, whose output is a flat list of gradients, in two. `is_weight` tells of each gradient whether it is a weight's.

    The graph is left as it is. It must be functional: no operator may write into its arguments.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(backward, {}))
    results = list(_results(graph))
    assert len(results) == len(is_weight), f"{len(results)} gradients, {len(is_weight)} marks"
    _part_masked(graph, [r for r, w in zip(results, is_weight, strict=True) if not w])
    results = list(_results(graph))
    inputs = [None if w else r for r, w in zip(results, is_weight, strict=True)]
    weights = [r if w else None for r, w in zip(results, is_weight, strict=True)]
    early = _ancestors(inputs)
    late = _ancestors(weights) - early
    crossing = _crossing(graph, early, late, weights)
    placeholders = graph.find_nodes(op="placeholder")
    kept = tuple(i for i, node in enumerate(placeholders) if node in crossing)
    handed = [node for node in graph.nodes if node in crossing and node.op != "placeholder"]
    first = _part(graph, placeholders, early, (inputs, handed))
    second = _part(graph, [placeholders[i] for i in kept] + handed, late | _remade(crossing, late, graph), weights)
    _own_memory(second)
    return Halves(first, second, kept)


def shared_results(graph: fx.Graph) -> set[int]:
    """Which results may share memory with an argument of the graph, or with another result."""
    roots = {place: _root(node) for place, node in enumerate(_results(graph)) if isinstance(node, fx.Node)}
    return {place for place, root in roots.items() if root.op == "placeholder" or list(roots.values()).count(root) > 1}


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while is_view(node) or (is_getitem(node) and is_view(node.args[0])):  # a part of what split gives, not one of a kernel's results
        node = node.args[0]
    return node


def _own_memory(module: fx.GraphModule) -> None:
    """Give each result memory of its own, in place: it becomes a `.grad`, which the next microbatch's is added to."""
    graph, output = module.graph, next(iter(module.graph.find_nodes(op="output")))
    results = list(output.args[0])
    with graph.inserting_before(output):
        for place in sorted(shared_results(graph)):
            node, results[place] = results[place], graph.call_function(aten.clone.default, (results[place],))
            results[place].meta = dict(node.meta)
    output.args = (results,)
    module.recompile()


def _results(graph: fx.Graph) -> Sequence[fx.Node | None]:
    return next(iter(graph.find_nodes(op="output"))).args[0]


def _ancestors(nodes: Iterable[fx.Node | None]) -> set[fx.Node]:
    found, stack = set(), [node for node in nodes if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _crossing(graph: fx.Graph, early: set[fx.Node], late: set[fx.Node], weights: Sequence[fx.Node | None]) -> set[fx.Node]:
    """What the weight half takes: placeholders, and values of the input half."""
    read = {parent for node in late for parent in node.all_input_nodes if parent not in late}
    read |= {node for node in weights if node is not None and node not in late}
    read |= {node for node in late if node.op == "placeholder"}
    for node in reversed(list(graph.nodes)):  # a cast is made again where its argument is there anyway, or is smaller
        if node in read and node in early and _is_cast(node) and (node.args[0] in read or _bytes(node.args[0]) <= _bytes(node)):
            read.remove(node)
            read.update(node.all_input_nodes)
    return read


def _remade(crossing: set[fx.Node], late: set[fx.Node], graph: fx.Graph) -> set[fx.Node]:
    """Casts of the input half that the weight half makes again."""
    needed = {parent for node in late for parent in node.all_input_nodes}
    again: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in needed and node not in late and node not in crossing:
            again.add(node)
            needed.update(node.all_input_nodes)
    return again


def _is_cast(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and isinstance(node.args[0], fx.Node)


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.element_size() if isinstance(value, torch.Tensor) else 0  # of one element: a cast keeps their number


def _part(graph: fx.Graph, inputs: Sequence[fx.Node], nodes: set[fx.Node], outputs) -> fx.GraphModule:
    """The graph of `nodes` alone, from `inputs` to `outputs`."""
    part, mapping = fx.Graph(), {}
    for node in inputs:
        mapping[node] = part.placeholder(node.name)
        mapping[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node in nodes and node not in mapping and node.op not in ("placeholder", "output"):
            mapping[node] = part.node_copy(node, lambda n: mapping[n])
    part.output(fx.node.map_arg(outputs, lambda n: mapping[n]))
    part.lint()
    return fx.GraphModule(torch.nn.Module(), part)


# ------------------------------------------------------------------------------------------- operators that serve both halves


def _part_masked(graph: fx.Graph, inputs: Sequence[fx.Node | None]) -> None:
    """Give each half its own copy of an operator with a mask, in place."""
    early = _ancestors(inputs)
    for node in list(graph.nodes):
        mask = _mask_of(node)
        if mask is None or node not in early:
            continue
        readers: dict[int, list[fx.Node]] = {}
        for user in node.users:
            readers.setdefault(user.args[1], []).append(user)
        first = {i for i, users in readers.items() if any(user in early for user in users)}
        wanted = _mask(node, mask)
        if first == {i for i in readers if wanted[i]}:
            continue
        with graph.inserting_after(node):
            second = graph.node_copy(node)
        second.meta = dict(node.meta)
        _set_mask(node, mask, [want and i in first for i, want in enumerate(wanted)])
        _set_mask(second, mask, [want and i not in first for i, want in enumerate(wanted)])
        for i, users in readers.items():
            if i not in first:
                for user in users:
                    user.replace_input_with(node, second)


def _mask_of(node: fx.Node) -> int | None:
    """The place of the argument that says which gradients an operator is to make; None where it has none, or is not to be parted."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.name in _TOGETHER:
        return None
    schema = node.target._schema
    for place, argument in enumerate(schema.arguments):
        if argument.name in MASKS and len(schema.returns) > 1 and not argument.kwarg_only and place < len(node.args):
            return place if len(node.args[place]) == len(schema.returns) else None
    return None


def _mask(node: fx.Node, place: int) -> list[bool]:
    return list(node.args[place])


def _set_mask(node: fx.Node, place: int, mask: list[bool]) -> None:
    node.args = (*node.args[:place], mask, *node.args[place + 1 :])
