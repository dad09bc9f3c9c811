"""Products that are computed twice in different spellings: `x W'` as a linear, as a matmul, as a product of flattened rows.

Two nodes of the same operation and arguments are merged without further ado (`functional.merge_equal`). Two spellings of one product are found by
their parameter and input, and merged where they are proved equal; without this each counts as an activation of its own, and g * sigmoid(g) with
g spelled twice is no silu.
"""

import math
from collections import defaultdict

from torch import Tensor, fx

from ftc.rewrite.movement import cone, sources
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import PRODUCTS, Analysis, drop_dead, replace, sizes_of

ADDS = {aten.add.Tensor}


def merge_products(analysis: Analysis) -> None:
    """Let the readers of a product read an earlier one of the same input and parameter that is proved equal, in place."""
    groups: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in analysis.graph.nodes:
        if node.target in PRODUCTS and analysis.active(node):
            groups[_origins(analysis, node)].append(node)
    for (inputs, _), products in groups.items():
        for number, later in enumerate(products[1:], 1):
            for earlier in products[:number]:
                _merge(analysis, earlier, later, inputs)
    drop_dead(analysis.graph)


def _origins(analysis: Analysis, product: fx.Node) -> tuple[frozenset[fx.Node], frozenset[fx.Node]]:
    """(activations, parameters) that a product is of, seen through moves that keep all elements; biases left out."""
    operands = product.args[1] if product.target is aten.einsum.default else product.args[:3]
    nodes = [used for used in operands if isinstance(used, fx.Node)]
    roots = {root for used in nodes for root in cone(analysis, used, stop=_selects).roots}
    inputs = frozenset(root for root in roots if analysis.active(root))
    return inputs, frozenset(roots - inputs) - {root for root in roots if len(sizes_of(root)) < 2}


def _selects(node: fx.Node) -> bool:
    """Whether a move leaves elements out or repeats them: what it selects is an operand of its own, as each expert of a stack is."""
    above = sources(node)
    return above is None or len(above) != 1 or _numel(node) != _numel(above[0])


def _numel(node: fx.Node) -> int:
    return math.prod(sizes_of(node))


def _merge(analysis: Analysis, earlier: fx.Node, later: fx.Node, inputs: frozenset[fx.Node]) -> None:
    for old in _faces(analysis, later):
        for new in _faces(analysis, earlier):
            first, second = sorted((old, new))
            alike = sizes_of(old) == sizes_of(new) and old.meta["val"].dtype == new.meta["val"].dtype
            if alike and first is not second and second.users and analysis.differs(second, first, inputs) is None:
                replace(analysis, second, first)


def _faces(analysis: Analysis, product: fx.Node) -> list[fx.Node]:
    """A product and what moves, and a bias that is added, make of it."""
    found, queue = [], [product]
    while queue:
        node = queue.pop(0)
        if isinstance(node.meta["val"], Tensor):
            found.append(node)
        for user in node.users:
            active = [used for used in user.all_input_nodes if analysis.active(used)]
            if user not in queue and active == [node] and (sources(user) == [node] or user.target in ADDS):
                queue.append(user)
    return found
