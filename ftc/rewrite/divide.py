"""Turning one graph into each rank's own: weights in their local sizes, operands that enter, sums over the ranks. Mutates the graph."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from ftc.rewrite.edit import Editor
from ftc.rewrite.outcome import Declined
from ftc.rewrite.recognise import fake_value
from ftc.rewrite.shard import Shard, Unstack
from ftc.rewrite.sharding import Split, Step
from ftc.rewrite.tensor_site import Column, Product, Site

aten, dialect = torch.ops.aten, torch.ops.ftc
_HALF = (torch.float16, torch.bfloat16)


class Divider:
    """Edits one graph for `degree` ranks of `axis`; `lenses` say how its parameters follow."""

    def __init__(self, graph: fx.Graph, axis: str, degree: int):
        self.graph, self.axis, self.degree = graph, axis, degree
        self.lenses: list = []
        self._copies: dict[fx.Node, fx.Node] = {}

    def ranked(self, edit: Editor, op, x: fx.Node, *others) -> fx.Node:
        """A node of an operator that works on the ranks."""
        return edit(op.default, x, *others, self.axis, self.degree)

    def copy(self, node: fx.Node) -> fx.Node:
        """What all ranks hold alike, for use by each on its part: one node for all readers, so that gradients are summed once."""
        if not node.meta["val"].is_floating_point():
            return node
        if node not in self._copies:
            self._copies[node] = self.ranked(Editor(self.graph, _after(node), like=node), dialect.copy_to_ranks, node)
        return self._copies[node]

    def slice(self, node: fx.Node, dim: int, parts: int) -> fx.Node:
        """Each rank's part of what all hold alike."""
        whole = self.copy(node)
        return self.ranked(Editor(self.graph, _after(whole), like=node), dialect.rank_slice, whole, dim, parts)

    def divide(self, weight: fx.Node, dim: int, blocks: tuple[int, ...]) -> None:
        """Let a parameter be a rank's own part."""
        self.lenses.append(Shard(str(weight.target), dim, blocks, self.degree, self.axis))
        value = weight.meta["val"]
        shape = list(value.shape)
        shape[dim] = sum(blocks) // self.degree
        with value.fake_mode:
            weight.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)

    def apply(self, site: Site) -> None:
        """Make a planned site each rank's own."""
        for column in site.columns:
            self._column(column)
        for node in list(self.graph.nodes):
            if node in site.steps:
                self.step(node, site.steps[node])
            if node in site.norms:
                self._norm(node, site.norms[node])
            elif node in site.steps or any(node is column.product.node for column in site.columns):
                node.meta["val"] = fake_value(self.graph, node)
        for product, split in site.rows:
            self.divide(product.weight, 1 - product.out_dim, split.blocks)
            self._row(product)

    def _column(self, column: Column) -> None:
        product = column.product
        product.node.replace_input_with(product.x, self.copy(product.x))
        for parameter, dim in ((product.weight, product.out_dim), (product.bias, 0)):
            if parameter is None:
                continue
            if column.parts == self.degree:
                self.divide(parameter, dim, column.blocks)
            else:
                product.node.replace_input_with(parameter, self.slice(parameter, dim, column.parts))

    def step(self, node: fx.Node, step: Step) -> None:
        """Make one followed node a rank's own."""
        if step.rest is not None:
            node.args = (node.args[0], *step.rest)
        for used in step.copies:
            if not (used.op == "get_attr" and "constant" in used.meta):
                node.replace_input_with(used, self.copy(used))
        for used, dim in step.slices:
            node.replace_input_with(used, self.slice(used, dim, step.out.parts))

    def _row(self, product: Product) -> None:
        """y = sum over ranks of x_r W_r^T, and the bias once."""
        edit = Editor(self.graph, product.node)
        op = aten.linear.default if product.out_dim == 0 else aten.mm.default
        total = self.ranked(edit, dialect.reduce_from_ranks, edit(op, product.x, product.weight))
        if product.bias is not None:
            total = edit(aten.add.Tensor, total, product.bias)
        product.node.replace_all_uses_with(total)
        self.graph.erase_node(product.node)

    def _norm(self, node: fx.Node, split: Split) -> None:
        """rms_norm over a divided dimension: the sum of squares is one sum over the ranks.

        Each rank's own results hang on that sum, so its gradient is a sum over the ranks too: copy_to_ranks of reduce_from_ranks.
        """
        x, _, weight, *rest = node.args
        dtype = x.meta["val"].dtype
        eps = rest[0] if rest and rest[0] is not None else torch.finfo(dtype).eps
        self.divide(weight, 0, split.blocks)
        edit = Editor(self.graph, node)
        wide = edit(aten.to.dtype, x, torch.float32) if dtype in _HALF else x
        total = edit(aten.sum.dim_IntList, edit(aten.mul.Tensor, wide, wide), [-1], True)
        total = self.ranked(edit, dialect.copy_to_ranks, self.ranked(edit, dialect.reduce_from_ranks, total))
        mean = edit(aten.div.Scalar, total, sum(split.blocks))
        out = edit(aten.mul.Tensor, wide, edit(aten.rsqrt.default, edit(aten.add.Scalar, mean, eps)))
        out = edit(aten.to.dtype, out, dtype) if dtype in _HALF else out
        out = edit(aten.mul.Tensor, out, weight)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def unstack(self, column: Column) -> None:
        """Take a stacked weight apart, so that its blocks can be divided differently.

            split(x [W1; W2]^T) = x W1^T, x W2^T

        Raises Declined, with the graph untouched, where its results are not taken apart in these blocks.
        """
        product, borders = column.product, [0, *itertools.accumulate(column.blocks)]
        parts = _parts(product, column.blocks)
        edit = Editor(self.graph, product.node)
        names = []
        for parameter, dim in ((product.weight, product.out_dim), (product.bias, 0)):
            if parameter is None:
                names.append([None] * len(column.blocks))
                continue
            stem, _, leaf = str(parameter.target).rpartition(".")
            targets = tuple(f"{stem}.{number}.{leaf}" for number in range(len(column.blocks)))
            names.append([edit.parameter(name, [_like(parameter, dim, size)]) for name, size in zip(targets, column.blocks, strict=True)])
            self.lenses.append(Unstack(str(parameter.target), targets, column.blocks, dim))
        for number, (weight, bias) in enumerate(zip(*names, strict=True)):
            operands = [x for x in (product.x, weight, bias) if x is not None]
            if product.out_dim:
                operands = [bias, product.x, weight] if bias is not None else operands
            made = edit(aten.addmm.default if product.out_dim and bias is not None else product.node.target, *operands)
            for old in parts.get((borders[number], borders[number + 1]), ()):
                old.replace_all_uses_with(made)
        self.graph.eliminate_dead_code()


def _like(parameter: fx.Node, dim: int, size: int) -> fx.Node:
    """A stand-in node whose value has `size` entries along `dim`."""
    value = parameter.meta["val"]
    shape = list(value.shape)
    shape[dim] = size
    node = fx.Graph().placeholder("part")
    with value.fake_mode:
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    return node


def _parts(product: Product, blocks: tuple[int, ...]) -> dict[tuple[int, int], list[fx.Node]]:
    """The nodes that are single blocks of a product's results, by their borders."""
    borders = [0, *itertools.accumulate(blocks)]
    single = set(itertools.pairwise(borders))
    found: dict[tuple[int, int], list[fx.Node]] = {}
    for user in product.node.users:
        value = user.meta.get("val")
        if isinstance(value, (list, tuple)):
            starts = [0, *itertools.accumulate(int(part.shape[-1]) for part in value)]
            pieces = [((starts[item.args[1]], starts[item.args[1] + 1]), item) for item in user.users]
        elif user.target is aten.slice.Tensor:
            start = user.args[2] % borders[-1] if isinstance(user.args[2], int) else 0
            pieces = [((start, start + int(value.shape[-1])), user)]
        else:
            pieces = [((0, 0), user)]
        for place, node in pieces:
            if place not in single:
                raise Declined("key-value heads that ranks share are stacked with others in one weight", node)
            found.setdefault(place, []).append(node)
    return found


def _after(node: fx.Node) -> fx.Node:
    """Where nodes that read `node` can stand: behind it, and behind all inputs and parameters."""
    if node.op == "call_function":
        return node.next
    following = node
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following
