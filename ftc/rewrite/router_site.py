"""The router of a mixture of experts in a captured graph, found backwards from an `ftc::moe` node by data flow.

    logits = x W^T (+ b)      gate(logits) [N, E]      top-k of gate(logits) + selection bias      indices, weights -> moe
    logits = x W^T (+ b)      top-k of logits          gate of the chosen logits                   indices, weights -> moe

The product is the only one between `indices` and what the region computes before; the gate is the softmax or sigmoid over experts behind it, or, where
the top-k looks at logits, the one over the chosen that the weights pass through. A selection bias is a vector [E] that is added on the way to the
top-k and not on the way to the weights (DeepSeek-V3 2024, arXiv:2412.19437, equation 16). Groups of experts, scaling, casts, capacity: whatever else
stands between is let through, as long as it comes from these logits alone.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ftc.rewrite.edit import is_parameter
from ftc.rewrite.movement import CASTS, MOVES
from ftc.rewrite.outcome import Declined

aten = torch.ops.aten
MIXTURES = ("ftc.moe.default", "ftc.fused_moe.default")
_PRODUCTS = {aten.linear.default: 1, aten.mm.default: 1, aten.matmul.default: 1, aten.addmm.default: 2}  # place of the weight
_GATES = {aten.softmax.int: "softmax", aten._softmax.default: "softmax", aten.sigmoid.default: "sigmoid"}
_INDEXED = {aten.gather.default: 2, aten.take_along_dim.default: 1, aten.where.self: 0, aten.index.Tensor: 1, aten.masked_fill.Scalar: 1}
_RANDOM = ("rand", "randn", "rand_like", "randn_like", "bernoulli", "multinomial", "normal", "exponential", "uniform")


@dataclass(frozen=True)
class Router:
    """Nodes of one router. `logits`: what the gate is taken of, [..., E]; `scores`: what is chosen by, before a selection bias; `bias`: the attribute
    that is added to choose, None where there is none."""

    experts: int
    product: fx.Node
    weight: fx.Node
    gate: str
    logits: fx.Node
    scores: fx.Node
    topk: fx.Node
    bias: fx.Node | None


def is_mixture(node: fx.Node) -> bool:
    """Whether a node is a mixture of experts in canonical spelling, fused or not."""
    return node.op == "call_function" and str(node.target).removeprefix("torch.ops.") in MIXTURES


def find_router(moe: fx.Node) -> Router:
    """The router of a mixture. Raises Declined with the node where the graph parts from one that is understood."""
    return router_of(moe.args[1], moe.args[2], int(moe.args[4].meta["val"].shape[0]))


def router_of(indices: fx.Node, weights: fx.Node, experts: int) -> Router:
    """The router that chooses among `experts` and gives these indices and weights [N, K]; as `find_router`."""
    topk = _choice(indices)
    product, between = _product(topk.args[0], experts)
    valued = _above([weights], product, by_value=True)
    gate, bias = _gate(between, experts), _selection_bias(between, valued, experts)
    if gate is not None:
        scores, logits = gate, gate.args[0]
    else:  # the last that both ways have in common
        gate = _gate_of_chosen(valued, weights)
        scores = logits = max(node for node in (between | {product}) & valued if _is_over(node, experts))
    if bias is not None and scores not in bias.all_input_nodes and not any(_stripped(n) is scores for n in bias.all_input_nodes):
        raise Declined(f"a vector is added to choose by, but not to what {scores.name} gives", bias)
    weight = _parameter(product.args[_PRODUCTS[product.target]], product)
    return Router(experts, product, weight, _GATES[gate.target], logits, scores, topk, _vector(bias))


def is_balanced(moe: fx.Node) -> bool:
    """Whether the weights of a mixture come through `ftc::balance`."""
    return moe.args[2].target is torch.ops.ftc.balance.default


def chain_to(router: Router) -> list[fx.Node]:
    """The views and casts from the scores to what the top-k looks at, in order. Declined where something else stands there."""
    chain, node = [], router.topk.args[0]
    while node is not router.scores:
        if node.op != "call_function" or node.target not in MOVES | CASTS:
            raise Declined(f"{node.name} stands between the scores and the top-k, and a bias before it would change what it does", node)
        chain.append(node)
        node = node.args[0]
    return chain[::-1]


def tokens_node(router: Router) -> fx.Node:
    """The nearest node [B, T, ...] that the router's tokens come from by views and casts. Declined where there is none."""
    node = router.product.args[1 if router.product.target is aten.addmm.default else 0]
    while True:
        if node.meta["val"].dim() == 3:
            return node
        if node.target not in MOVES | CASTS:
            raise Declined("the router's tokens are no view of [batch, tokens, width], so they cannot be told apart by sequence", node)
        node = node.args[0]


def _above(roots: Iterable[fx.Node], stop: fx.Node, by_value: bool = False) -> set[fx.Node]:
    """What `roots` are computed from, these included, not past `stop`; `by_value`: without what only says where to look."""
    found, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node is stop or _is_size(node) or (by_value and node.target is operator.getitem and node.args[1] == 1 and node.args[0].target is aten.topk.default):
            continue
        place = _INDEXED.get(node.target) if by_value else None
        stack += [n for n in node.all_input_nodes if place is None or n in _inputs(node, place)]
    return found


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def _is_over(node: fx.Node, experts: int) -> bool:
    """Whether a node gives numbers [..., E]."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.is_floating_point() and value.shape[-1] == experts


def _inputs(node: fx.Node, left_out: int) -> list[fx.Node]:
    arguments = [a for i, a in enumerate(node.args) if i != left_out]
    return [a for a in arguments if isinstance(a, fx.Node)]


def _choice(indices: fx.Node) -> fx.Node:
    """The top-k over experts whose indices these are: the last one above them."""
    seen, stack, found = set(), [indices], []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.topk.default:
            found.append(node)
        elif not _is_size(node):
            stack += node.all_input_nodes
    last = [node for node in found if not any(node in _above([other], node) for other in found if other is not node)]
    if len(last) != 1:
        raise Declined(f"{len(last)} top-k say which experts are chosen, not one" if last else "no top-k chooses the experts", indices)
    (topk,) = last
    dims = topk.args[0].meta["val"].dim()
    dim = topk.args[2] if len(topk.args) > 2 else topk.kwargs.get("dim", -1)
    if dim % dims != dims - 1:
        raise Declined("experts choose their tokens here, so every expert has the same load", topk)
    if (topk.args[3] if len(topk.args) > 3 else topk.kwargs.get("largest", True)) is not True:
        raise Declined("the smallest scores are chosen, not the largest", topk)
    return topk


def _product(start: fx.Node, experts: int) -> tuple[fx.Node, set[fx.Node]]:
    """The one product with a parameter that `start` is computed from, and the nodes from there to `start`, without it."""
    products, between, stack = [], set(), [start]
    while stack:
        node = stack.pop()
        if node in between or node in products:
            continue
        if node.target in _PRODUCTS and node.args[_PRODUCTS[node.target]].meta["val"].dim() == 2:
            products.append(node)
            continue
        if node.op == "placeholder":
            raise Declined(f"the choice also depends on the input {node.name}, not on a product with a parameter alone", node)
        if str(node.target).split(".")[1:2] and str(node.target).split(".")[1].rstrip("_") in _RANDOM:
            raise Declined("the choice is random: its noise would be taken for the router's own scores", node)
        between.add(node)
        stack += [] if _is_size(node) else node.all_input_nodes
    if len(products) != 1:
        raise Declined(f"the choice depends on {len(products)} products with parameters, not on one", products[0] if products else start)
    (product,) = products
    if int(product.meta["val"].shape[-1]) != experts:
        raise Declined(f"the router's product gives {product.meta['val'].shape[-1]} scores for {experts} experts", product)
    return product, between


def _parameter(node: fx.Node, product: fx.Node) -> fx.Node:
    found = _stripped(node)
    if not is_parameter(found):
        raise Declined(f"the router's weight {found.name} is computed, not a parameter", product)
    return found


def _stripped(node: fx.Node) -> fx.Node:
    """What a chain of views and casts begins with."""
    while node.op == "call_function" and node.target in MOVES | CASTS:
        node = node.args[0]
    return node


def _gate(between: set[fx.Node], experts: int) -> fx.Node | None:
    gates = sorted(node for node in between if node.target in _GATES and _is_over(node, experts))
    if len(gates) > 1:
        raise Declined(f"{gates[0].name} and {gates[1].name} both look like the router's gate", gates[1])
    return gates[0] if gates else None


def _gate_of_chosen(valued: set[fx.Node], weights: fx.Node) -> fx.Node:
    gates = [node for node in valued if node.target in _GATES]
    if len(gates) != 1:
        raise Declined(f"the weights pass through {len(gates)} softmaxes or sigmoids, not one", weights)
    return gates[0]


def _selection_bias(between: set[fx.Node], valued: set[fx.Node], experts: int) -> fx.Node | None:
    """The node that adds a vector [E] on the way to the top-k alone."""
    found = sorted(node for node in between - valued if node.target is aten.add.Tensor and _vector(node) is not None)
    if len(found) > 1:
        raise Declined("two vectors are added to choose by", found[1])
    if found and int(_vector(found[0]).meta["val"].numel()) != experts:
        raise Declined(f"the vector that is added to choose by has {_vector(found[0]).meta['val'].numel()} numbers for {experts} experts", found[0])
    return found[0] if found else None


def _vector(add: fx.Node | None) -> fx.Node | None:
    """The attribute that an addition adds."""
    for node in () if add is None else add.all_input_nodes:
        if is_parameter(_stripped(node)):
            return _stripped(node)
    return None

