"""Reading an attention off a graph: the products on both sides of a softmax, and everything done to the scores between them.

Dimensions: B batch, H heads, G key-value heads, T queries, S keys, K and V head widths. Nothing here is trusted: what is read becomes a
hypothesis, which `passes/raise_attention.py` builds and proves.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ftc.rewrite.movement import CASTS, cone, dropout_off, sources
from ftc.rewrite.outcome import Declined, operation
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import Analysis, Builder, sizes_of

SOFTMAXES = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default}
MATMULS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor}
DIVIDE = {aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.true_divide.Tensor}
NEVER = -1e4  # an additive score at or below this gives probability 0 beside any ordinary one
ABSORBS = -1e30  # an additive score at or below this swallows the score it is added to, in every dtype


@dataclass
class Product:
    """left @ right in matmul form; `labels` name the operand dims after the permutation that einsum needs, `out_order` brings the product back."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    alpha: float = 1.0
    bias: fx.Node | None = None
    beta: float = 1.0
    left_order: list[int] | None = None
    right_order: list[int] | None = None
    out_order: list[int] | None = None


def product_of(build: Builder, node: fx.Node) -> Product | None:
    """The node as a product of two activations in matmul form; None where it is none."""
    active = build.analysis.active
    if node.target in MATMULS and active(node.args[0]) and active(node.args[1]):
        return Product(node, node.args[0], node.args[1])
    if node.target is aten.baddbmm.default and active(node.args[1]) and active(node.args[2]):
        alpha, beta = float(node.kwargs.get("alpha", 1)), float(node.kwargs.get("beta", 1))
        bias = node.args[0] if beta != 0 else None
        return Product(node, node.args[1], node.args[2], alpha, bias, beta)
    if (
        node.target is aten.einsum.default
        and len(node.args[1]) == 2
        and all(active(operand) for operand in node.args[1])
    ):
        return _einsum(build, node)
    return None


def _einsum(build: Builder, node: fx.Node) -> Product | None:
    """einsum of two operands as permute, matmul, permute; labels that one operand lacks become dims of size 1."""
    equation = node.args[0].replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    inputs, out = equation.split("->")
    first, second = inputs.split(",")
    rows = [label for label in out if label in first and label not in second]
    columns = [label for label in out if label in second and label not in first]
    summed = [label for label in first if label in second and label not in out]
    if (
        not rows
        or not columns
        or len(summed) != 1
        or any(len(set(labels)) != len(labels) for labels in (first, second, out))
    ):
        return None
    batch = [label for label in out if label not in (rows[-1], columns[-1])]
    left, left_order = _arrange(build, node.args[1][0], first, [*batch, rows[-1], summed[0]])
    right, right_order = _arrange(build, node.args[1][1], second, [*batch, summed[0], columns[-1]])
    made = [*batch, rows[-1], columns[-1]]
    return Product(
        node,
        left,
        right,
        left_order=left_order,
        right_order=right_order,
        out_order=[made.index(label) for label in out],
    )


def _arrange(build: Builder, operand: fx.Node, labels: str, wanted: list[str]) -> tuple[fx.Node, list[int]]:
    present = [label for label in wanted if label in labels]
    order = [labels.index(label) for label in present]
    if order != list(range(len(order))):
        operand = build(aten.permute.default, operand, order)
    for position, label in enumerate(wanted):
        if label not in labels:
            operand = build(aten.unsqueeze.default, operand, position)
    return operand, [labels.index(label) if label in labels else -1 for label in wanted]


@dataclass
class Mask:
    """Something added to the scores (`fill` None), or a condition outside which they become `fill`; `axes` is the layout it applies to."""

    node: fx.Node
    axes: list[int]
    rank: int
    factor: float = 1.0
    fill: float | None = None
    inverted: bool = False


@dataclass
class Scores:
    """What a softmax runs over: softcap(scale * product) + masks. `axes[i]` is the dim of the product that dim i of the softmax's input is."""

    product: Product
    axes: list[int]
    heads_from: fx.Node | None
    scale: float = 1.0
    inner: float = 1.0
    capped: bool = False
    masks: list[Mask] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


def read_scores(build: Builder, softmax: fx.Node) -> Scores:
    """Walk up from a softmax to the product of queries and keys. Raises Declined at the first node that no attention has."""
    analysis = build.analysis
    path: list[tuple[fx.Node, fx.Node]] = []
    node = softmax.args[0]
    while True:
        product = product_of(build, node)
        if product is not None:
            break
        if len(path) > 40:
            raise Declined("no product of two activations stands above the softmax", node)
        step = _step_up(analysis, node)
        path.append((node, step))
        node = step
    rank = product.node.meta["val"].dim()
    axes = list(product.out_order) if product.out_order is not None else list(range(rank))
    scores = Scores(product, axes, None, scale=product.alpha)
    if product.bias is not None:
        if analysis.active(product.bias):
            raise Declined("an activation is added to the scores", product.node)
        scores.masks.append(Mask(product.bias, list(axes), rank, product.beta))
    for node, previous in reversed(path):
        _apply_step(analysis, scores, node, previous)
    scores.nodes = [node for node, _ in path]
    return scores


def _step_up(analysis: Analysis, node: fx.Node) -> fx.Node:
    """The scores that a node between product and softmax was computed from."""
    if node.op != "call_function":
        raise Declined(f"the softmax runs over {operation(node)}, not over a product of two activations", node)
    active = [used for used in node.all_input_nodes if analysis.active(used)]
    if len(active) != 1:
        what = "two activations" if active else "no activation"
        raise Declined(f"{operation(node)} joins {what} in the scores", node)
    elementwise = MULTIPLY | DIVIDE | {
        aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.tanh.default, aten.where.self, aten.where.ScalarOther,
        aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.maximum.default, aten.max.other, aten.clamp_min.default,
        aten.clamp.default,
    }  # fmt: skip
    single = sources(node)
    if node.target in elementwise or (single is not None and len(single) == 1 and node.target is not operator.getitem):
        return active[0]
    raise Declined(f"{operation(node)} is no step between the scores and their softmax", node)


def _apply_step(analysis: Analysis, scores: Scores, node: fx.Node, previous: fx.Node) -> None:
    target = node.target
    if target in CASTS or dropout_off(node) or target in (aten.contiguous.default, aten.clone.default):
        return
    if sources(node) is not None:
        _move(scores, node, previous)
    elif target in MULTIPLY or target in DIVIDE:
        _multiply(analysis, scores, node, previous)
    elif target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        _add(analysis, scores, node, previous)
    elif target is aten.tanh.default:
        if scores.capped or scores.masks:
            raise Declined("a tanh after a mask, or a second tanh", node)
        scores.capped, scores.inner, scores.scale = True, scores.scale, 1.0
    elif target in (aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp.default):
        bounds = [
            analysis.constant(value)
            for value in [*node.args[1:], *node.kwargs.values()]
            if value is not None and value is not previous
        ]
        if node.args[0] is not previous:
            bounds.append(analysis.constant(node.args[0]))
        if not all(bound is not None and bound <= ABSORBS for bound in bounds):
            raise Declined("the scores are clamped", node)
    else:
        _select(analysis, scores, node, previous)


def _move(scores: Scores, node: fx.Node, previous: fx.Node) -> None:
    """Permutations are tracked; a reshape may only regroup the batch dims."""
    rank = previous.meta["val"].dim()
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        a, b = (dim % rank for dim in node.args[1:3])
        scores.axes[a], scores.axes[b] = scores.axes[b], scores.axes[a]
    elif node.target in (aten.permute.default,):
        scores.axes = [scores.axes[dim] for dim in node.args[1]]
    elif node.target in (aten.mT.default,):
        scores.axes[-1], scores.axes[-2] = scores.axes[-2], scores.axes[-1]
    else:
        if scores.axes != list(range(rank)):
            raise Declined("the scores are reshaped after a permutation", node)
        old, new = sizes_of(previous), sizes_of(node)
        if old[-2:] != new[-2:]:
            raise Declined("the scores are reshaped across queries or keys", node)
        scores.axes = list(range(len(new)))
        if len(new) == 4:
            scores.heads_from = node


def _multiply(analysis: Analysis, scores: Scores, node: fx.Node, previous: fx.Node) -> None:
    other = node.args[1] if node.args[0] is previous else node.args[0]
    number = analysis.constant(other)
    if number is None:
        raise Declined("the scores are multiplied with a tensor", node)
    if node.target in DIVIDE:
        if node.args[0] is not previous:
            raise Declined("the scores are divided into a number", node)
        number = 1.0 / number
    if number <= 0 and scores.masks:
        raise Declined("masked scores change sign", node)
    scores.scale *= number
    for mask in scores.masks:
        mask.factor *= number
        mask.fill = None if mask.fill is None else mask.fill * number


def _add(analysis: Analysis, scores: Scores, node: fx.Node, previous: fx.Node) -> None:
    subtract = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    if subtract and node.args[0] is not previous:
        raise Declined("the scores are subtracted from a mask", node)
    first = node.args[0] is previous
    other = node.args[1] if first else node.args[0]
    alpha = float(node.kwargs.get("alpha", 1)) * (-1.0 if subtract else 1.0)
    if not first and alpha != 1.0:
        raise Declined("the scores are scaled by alpha", node)
    if not isinstance(other, fx.Node):
        return  # a number added to all scores of a row changes no softmax
    scores.masks.append(Mask(other, list(scores.axes), node.meta["val"].dim(), alpha))


def _select(analysis: Analysis, scores: Scores, node: fx.Node, previous: fx.Node) -> None:
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        condition, other, inverted = node.args[1], node.args[2], True
    else:
        condition, inverted = node.args[0], node.args[2] is previous
        other = node.args[1] if inverted else node.args[2]
    fill = analysis.constant(other)
    if fill is None or condition is previous:
        raise Declined("masked scores become a tensor, not a number", node)
    if fill > NEVER:
        raise Declined(f"masked scores become {fill:g}, which is no mask", node)
    scores.masks.append(Mask(condition, list(scores.axes), node.meta["val"].dim(), fill=fill, inverted=inverted))


@dataclass
class Weighted:
    """The product of probabilities and values: `axes` is the layout of the probabilities in it, `left` whether they are its left operand."""

    product: Product
    axes: list[int]
    left: bool
    dropout: float


def read_weighted(build: Builder, softmax: fx.Node, axes: list[int]) -> Weighted:
    """Walk down from a softmax to the product with the values. Raises Declined where there is none."""
    queue: list[tuple[fx.Node, list[int], float]] = [(softmax, list(axes), 0.0)]
    parted, seen = softmax, {softmax}
    while queue:
        node, axes, dropout = queue.pop(0)
        for user in sorted(node.users):
            if user in seen:
                continue
            seen.add(user)
            product = product_of(build, user)
            if product is not None:
                weighted = _as_weighted(product, node, axes, dropout)
                if weighted is not None:
                    return weighted
            elif user.target is aten.dropout.default:
                queue.append((user, axes, dropout if dropout_off(user) else float(user.args[1])))
            elif (
                user.target in CASTS | {aten.contiguous.default, aten.clone.default, aten.nan_to_num.default}
                and user.args[0] is node
            ):
                queue.append((user, axes, dropout))
            elif sources(user) == [node]:
                moved = Scores(Product(node, node, node), list(axes), None)
                try:
                    _move(moved, user, node)
                except Declined:
                    regrouped = (
                        axes == list(range(len(axes))) and sizes_of(node)[-2:] == sizes_of(user)[-2:]
                    )
                    if not regrouped:
                        parted = user
                        continue
                queue.append((user, moved.axes, dropout))
            elif user.op != "output":
                parted = user
    raise Declined("the probabilities meet no product with values", parted)


def _as_weighted(product: Product, probabilities: fx.Node, axes: list[int], dropout: float) -> Weighted | None:
    if product.bias is not None and product.node.target is aten.baddbmm.default:
        return None
    operands = product.node.args[1] if product.node.target is aten.einsum.default else (product.left, product.right)
    if operands[0] is operands[1]:
        return None
    left = operands[0] is probabilities
    order = product.left_order if left else product.right_order
    if order is not None:
        if -1 in order:
            return None
        axes = [axes[dim] for dim in order]
    return Weighted(product, axes, left, dropout)


def strip_scale(build: Builder, node: fx.Node) -> tuple[fx.Node, float]:
    """(node without the numbers that multiply it on its way through data movement, their product)."""
    analysis = build.analysis
    if node.target in MULTIPLY | DIVIDE and analysis.active(node):
        one, other = node.args[0], node.args[1]
        if node.target in MULTIPLY and not analysis.active(one):
            one, other = other, one
        number = analysis.constant(other) if analysis.active(one) else None
        if number is not None and number != 0 and sizes_of(one) == sizes_of(node):
            inner, factor = strip_scale(build, one)
            return inner, factor * (1.0 / number if node.target in DIVIDE else number)
        return node, 1.0
    above = sources(node)
    if above is None or len(above) != 1 or node.target is operator.getitem or node.target is aten.type_as.default:
        return node, 1.0
    inner, factor = strip_scale(build, above[0])
    if factor == 1.0:
        return node, 1.0
    return build(node.target, inner, *node.args[1:], **node.kwargs), factor


def four_dims_above(analysis: Analysis, node: fx.Node) -> fx.Node | None:
    """A node [B, H, T, K] that data movement alone flattens into `node` [B*H, T, K]."""
    for member in cone(analysis, node).members:
        val = member.meta["val"]
        if isinstance(val, torch.Tensor) and val.dim() == 4 and sizes_of(member)[-2:] == sizes_of(node)[-2:]:
            return member
    return None


def as_number(value: Any) -> bool:
    """Whether an argument is a plain number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
