"""Small edits of graphs: new nodes with their values, new parameters by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ftc.rewrite.recognise import fake_value


class Editor:
    """Adds nodes before `anchor`, each with meta["val"] and the source place of `like`."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node, like: fx.Node | None = None):
        self.graph, self.anchor, self.like = graph, anchor, like or anchor

    def __call__(self, target: Callable, *args, **kwargs) -> fx.Node:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_value(self.graph, node)
        self._place(node)
        return node

    def parameter(self, name: str, parts: Sequence[fx.Node], dim: int = 0) -> fx.Node:
        """A new `get_attr` node for a parameter that is `parts` stacked along `dim`."""
        shape = list(parts[0].meta["val"].shape)
        shape[dim] = sum(int(part.meta["val"].shape[dim]) for part in parts)
        return self.attribute(name, shape, parts[0])

    def attribute(self, name: str, shape: Sequence[int], like: fx.Node) -> fx.Node:
        """A new `get_attr` node for a parameter of `shape` in the dtype and place of what `like` gives."""
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        value = like.meta["val"]
        with value.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
        self._place(node)
        return node

    def constant(self, word: str, value: torch.Tensor) -> fx.Node:
        """A `get_attr` node for a constant of the graph, named after `word`."""
        taken = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        number = 0
        while (name := f"_constant_{word}_{number}") in taken:
            number += 1
        node = self.attribute(name, list(value.shape), self.like)
        with node.meta["val"].fake_mode:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=self.like.meta["val"].device)
        node.meta["constant"] = value
        return node

    def copy(self, nodes: Sequence[fx.Node], replaced: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Copies of `nodes`, in their order, that read each other and what `replaced` names; everything else is shared."""
        copies = dict(replaced)
        for node in nodes:
            with self.graph.inserting_before(self.anchor):
                copies[node] = self.graph.node_copy(node, lambda n: copies.get(n, n))
        return copies

    def _place(self, node: fx.Node) -> None:
        if "stack_trace" in self.like.meta:
            node.meta["stack_trace"] = self.like.meta["stack_trace"]


def is_parameter(node: object) -> bool:
    """Whether a node reads a parameter (not a constant)."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and "constant" not in node.meta


def sibling_name(graph: fx.Graph, names: Sequence[str], word: str) -> str:
    """A dotted name `<common parent>.<word>.<leaf>` for what replaces the parameters `names`; never one that is taken."""
    parents = [name.split(".")[:-2] for name in names]
    common = parents[0]
    for other in parents[1:]:
        common = common[: next((i for i, (a, b) in enumerate(zip(common, other, strict=False)) if a != b), min(len(common), len(other)))]
    leaf = names[0].rpartition(".")[2]
    taken = {node.target for node in graph.nodes if node.op == "get_attr"}
    number = 0
    while (name := ".".join([*common, word + (str(number) if number else ""), leaf])) in taken:
        number += 1
    return name


def fuse_linears(graph: fx.Graph, linears: Sequence[fx.Node], word: str) -> tuple[list[fx.Node], list]:
    """Replace linear nodes over one input by one product and its split; returns the new parts and the lenses.

        [x W1^T, x W2^T, ...] = split(x [W1; W2; ...]^T)

    The weights (and biases, all or none) must be parameters that nothing else reads. Mutates the graph.
    """
    from ftc.rewrite.lens import Stack

    aten = torch.ops.aten
    order = {node: i for i, node in enumerate(graph.nodes)}
    edit = Editor(graph, min(linears, key=order.__getitem__))
    operands = [linear_operands(node) for node in linears]
    sizes = tuple(int(weight.meta["val"].shape[0]) for _, weight, _ in operands)
    lenses = []
    stacked = []
    for position in (1, 2):
        parts = [operand[position] for operand in operands]
        if parts[0] is None:
            stacked.append(None)
            continue
        names = [part.target for part in parts]
        target = sibling_name(graph, names, word)
        stacked.append(edit.parameter(target, parts))
        lenses.append(Stack(tuple(names), target, sizes))
    product = edit(aten.linear.default, operands[0][0], *[s for s in stacked if s is not None])
    split = edit(aten.split_with_sizes.default, product, list(sizes), -1)
    import operator

    parts = [edit(operator.getitem, split, i) for i in range(len(linears))]
    for node, part in zip(linears, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    for operand in operands:
        for attribute in operand[1:]:
            if attribute is not None and not attribute.users:
                graph.erase_node(attribute)
    return parts, lenses


def linear_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(input, weight, bias or None) of an `aten.linear` node."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return node.args[0], node.args[1], bias


def why_not_fusible(linears: Sequence[fx.Node]) -> tuple[str, fx.Node] | None:
    """The reason why linears cannot become one product, with the node where it shows; None when they can."""
    operands = [linear_operands(node) for node in linears]
    first = operands[0]
    for node, (x, weight, bias) in zip(linears, operands, strict=True):
        if x is not first[0]:
            return f"its input {x.name} is not {first[0].name}, the input of {linears[0].name}", node
        for attribute in (weight, bias):
            if attribute is not None and not is_parameter(attribute):
                return f"{attribute.name} is computed, not a parameter", node
            if attribute is not None and len(attribute.users) > 1:
                return f"{attribute.target} is used more than once", node
        if (bias is None) != (first[2] is None):
            return "only some of the products have a bias", node
    names = [operand[1].target for operand in operands]
    if len(set(names)) < len(names):
        return "two of the products read the same weight", linears[0]
    return None
