"""Which products of an attention or an MLP are divided over ranks, found by following their results through the graph.

    column   y_r = x W_r^T          the rows of W are divided: each rank computes its heads or features
    row      y = sum_r x_r W_r^T    the columns of W are divided: each rank's heads or features give a term of the sum

A site begins at the last products before an attention or an activation (its columns) and has to end in products that sum over the divided
dimension (its rows). Everything between is followed operator by operator; what cannot be followed declines the site.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ftc.rewrite.edit import is_parameter
from ftc.rewrite.outcome import Declined, operation
from ftc.rewrite.regroup import Indivisible, numbers
from ftc.rewrite.sharding import RULES, Split, Splits, Step, follow, pointwise, rank_of

aten = torch.ops.aten
_LAYOUT = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default}
_PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default}
_TRIES = 24


@dataclass(frozen=True)
class Product:
    """A product with a parameter: `node` = x W^T + b, where W has its outputs along `out_dim`."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    out_dim: int = 0

    @property
    def width(self) -> int:
        """Number of outputs."""
        return int(self.weight.meta["val"].shape[self.out_dim])


def product_of(node: fx.Node) -> Product | None:
    """The product that a node is: `linear`, or `mm` and `addmm` with the weight on the right."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        found = Product(node, node.args[0], node.args[1], bias)
    elif node.target is aten.mm.default:
        found = Product(node, node.args[0], node.args[1], None, 1)
    elif node.target is aten.addmm.default and not node.kwargs:
        found = Product(node, node.args[1], node.args[2], node.args[0], 1)
    else:
        return None
    plain = is_parameter(found.weight) and (found.bias is None or (is_parameter(found.bias) and rank_of(found.bias) == 1))
    return found if plain else None


@dataclass
class Column:
    """A product whose outputs are divided: by `blocks`, into `parts` (fewer than ranks: neighbours compute the same)."""

    product: Product
    blocks: tuple[int, ...]
    parts: int


@dataclass
class Site:
    """What has to be done to one attention or MLP."""

    kind: str
    columns: list[Column]
    rows: list[tuple[Product, Split]] = field(default_factory=list)
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    norms: dict[fx.Node, Split] = field(default_factory=dict)  # norms that sum over the divided dimension


def seeds_of(starts: list[fx.Node], pointwise_only: bool) -> list[Product]:
    """The last products before `starts`: those whose results reach them through no other. Declines where there is none."""
    found, queue, seen = {}, list(starts), set(starts)
    while queue:
        node = queue.pop()
        product = product_of(node)
        if product is not None:
            found[node] = product
            continue
        if node.op != "call_function":
            continue
        if pointwise_only and RULES.get(node.target, pointwise) is not pointwise and node.target not in _PARTS | _LAYOUT and "getitem" not in str(node.target):
            raise Declined(f"{operation(node)} stands between the product and the activation", node)
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                queue.append(used)
    last = [product for product in found.values() if not any(_reaches(product.node, other) for other in found if other is not product.node)]
    if not last:
        raise Declined(f"no product with a parameter comes before {starts[0].name}", starts[0])
    return sorted(last, key=lambda product: product.node)


def _reaches(node: fx.Node, target: fx.Node) -> bool:
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user is target:
                return True
            if user not in seen and user < target:
                seen.add(user)
                queue.append(user)
    return False


def candidates(product: Product) -> list[tuple[int, ...]]:
    """Of which blocks the outputs of a product may be made, the likeliest first: as the graph takes them apart."""
    width, node = product.width, product.node
    while len(node.users) == 1 and (user := next(iter(node.users))).target in _LAYOUT and numbers(user.meta["val"].shape[-1:]) == [width]:
        node = user
    found = []
    cuts = {0, width}
    for user in node.users:
        value = user.meta.get("val")
        if user.target in _PARTS and value[0].shape[-1] != width:
            found.append(tuple(int(part.shape[-1]) for part in value))
        elif user.target in (aten.slice.Tensor, aten.narrow.default) and value.shape[-1] != width:
            start = user.args[2] % width if len(user.args) > 2 and isinstance(user.args[2], int) else 0
            cuts |= {start, start + int(value.shape[-1])}
    if len(cuts) > 2:
        borders = sorted(cuts)
        found.append(tuple(b - a for a, b in itertools.pairwise(borders)))
    found.append((width,))
    for user in node.users:
        if user.target in _LAYOUT | {aten.unflatten.int}:
            inner = [int(s) for s in user.meta["val"].shape[rank_of(node) - 1 :] if isinstance(s, int)]
            if len(inner) > 1 and inner[0] > 1 and width % inner[0] == 0:
                found.append((width // inner[0],) * inner[0])
    return list(dict.fromkeys(found))


def plan(graph: fx.Graph, kind: str, seeds: list[Product], degree: int) -> Site:
    """The site of these columns. Raises Declined for a size where that is what is wrong with the plainest reading of the
    products, else at the node that got furthest of all tries."""
    misses: list[Declined] = []
    plainest: Declined | None = None
    parts = dict.fromkeys((p.node for p in seeds), degree)
    for blocks in itertools.islice(itertools.product(*(candidates(p) for p in seeds)), _TRIES):
        for _ in range(len(seeds) + 1):
            columns = [Column(p, b, parts[p.node]) for p, b in zip(seeds, blocks, strict=True)]
            try:
                return _attempt(graph, kind, columns, degree)
            except Declined as declined:
                misses.append(declined)
                if not _share_heads(declined, columns, parts, degree):
                    break
        plainest = plainest or misses[-1]
    if isinstance(plainest.__cause__, Indivisible):
        raise plainest
    raise max(misses, key=lambda declined: declined.node)


def _share_heads(declined: Declined, columns: list[Column], parts: dict[fx.Node, int], degree: int) -> bool:
    """Where a product has fewer heads than there are ranks, let neighbours compute the same head; whether anything changed."""
    if not isinstance(declined.__cause__, Indivisible) or degree % declined.__cause__.size:
        return False
    for column in columns:
        node, heads = column.product.node, declined.__cause__.size
        if parts[node] == degree and (node is declined.node or _reaches(node, declined.node)):
            if len(column.blocks) > 1:
                raise StackedHeads(column, declined.node)
            parts[node] = heads
            return True
    return False


class StackedHeads(Declined):
    """The heads that ranks would have to share stand in one weight with others, which has to be taken apart first."""

    def __init__(self, column: Column, node: fx.Node):
        super().__init__("key-value heads that ranks share are stacked with others in one weight", node)
        self.column = column


def _attempt(graph: fx.Graph, kind: str, columns: list[Column], degree: int) -> Site:
    site, splits = Site(kind, columns), {}
    for column in columns:
        _check_parameter(column.product.weight, column.product)
        if column.product.bias is not None:
            _check_parameter(column.product.bias, column.product)
        for block in column.blocks:
            if block % column.parts:
                size = Indivisible(block, column.parts, "features")
                raise Declined(str(size), column.product.node) from size
        splits[column.product.node] = Split(rank_of(column.product.node) - 1, column.blocks, column.parts)
    for node in graph.nodes:
        if node in splits or not any(used in splits for used in node.all_input_nodes):
            if node in splits and any(used in splits for used in node.all_input_nodes):
                raise Declined("one of its products reads the result of another", node)
            continue
        if node.op == "output":
            raise Declined("what is divided is returned", next(used for used in node.all_input_nodes if used in splits))
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            continue  # a size
        _advance(node, splits, site, degree)
    if not site.rows:
        raise Declined("no product sums over what is divided", columns[-1].product.node)
    return site


def _advance(node: fx.Node, splits: Splits, site: Site, degree: int) -> None:
    """Take one node that reads something divided into the site."""
    product = product_of(node)
    if product is not None and product.x in splits and splits[product.x].dim == rank_of(product.x) - 1:
        split = splits[product.x]
        if split.parts != degree or split.blocks is None:
            raise Declined("a product sums over heads that several ranks share", node)
        _check_parameter(product.weight, product)
        site.rows.append((product, split))
        return
    if node.target is aten.rms_norm.default and splits.get(node.args[0]) is not None and splits[node.args[0]].dim == rank_of(node) - 1:
        split = splits[node.args[0]]
        weight = node.args[2] if len(node.args) > 2 else None
        if split.parts != degree or split.blocks is None or len(node.args[1]) > 1 or not is_parameter(weight) or len(weight.users) > 1:
            raise Declined("a norm sums over the divided dimension", node)
        site.norms[node] = splits[node] = split
        return
    step = follow(node, splits)
    site.steps[node] = step
    if step.out is not None:
        splits[node] = step.out


def _check_parameter(weight: fx.Node, product: Product) -> None:
    same = [node for node in weight.graph.nodes if node.op == "get_attr" and node.target == weight.target]
    if len(same) > 1 or len(weight.users) > 1:
        raise Declined(f"{weight.target} is used more than once", product.node)
