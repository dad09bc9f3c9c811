"""Reading an attention off a graph: the products on both sides of a softmax, and everything done to the scores between them.

Dimensions: B batch, H heads, G key-value heads, T queries, S keys, K and V head widths. Nothing here is trusted, and nothing is added to the
graph: what is read becomes a hypothesis, which `passes/raise_attention.py` builds and proves. Which dim is which is kept in layouts
(`ftc.rewrite.axes`), so that it does not matter in what order, and in how many dims, a product holds batch and heads.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ftc.rewrite.axes import Axes, Group, Layout
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
class Operand:
    """A factor of a product, and the axes of the product that its dims hold."""

    node: fx.Node
    layout: Layout


@dataclass
class Product:
    """alpha * left @ right + beta * bias, in any order of dims: the axis `summed` is in both operands and not in `out`."""

    node: fx.Node
    left: Operand
    right: Operand
    out: Layout
    summed: int
    alpha: float = 1.0
    bias: fx.Node | None = None
    beta: float = 1.0


def product_of(axes: Axes, node: fx.Node) -> Product | None:
    """The node as a product of two activations, its dims as new axes; None where it is none."""
    active = axes.analysis.active
    if node.target in MATMULS and active(node.args[0]) and active(node.args[1]):
        return _matmul(axes, node, node.args[0], node.args[1])
    if node.target is aten.baddbmm.default and active(node.args[1]) and active(node.args[2]):
        product = _matmul(axes, node, node.args[1], node.args[2])
        product.alpha, product.beta = float(node.kwargs.get("alpha", 1)), float(node.kwargs.get("beta", 1))
        product.bias = node.args[0] if product.beta != 0 else None
        return product
    if node.target is aten.einsum.default and len(node.args[1]) == 2 and all(active(used) for used in node.args[1]):
        return _einsum(axes, node)
    return None


def _matmul(axes: Axes, node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    if min(left.meta["val"].dim(), right.meta["val"].dim()) < 2:
        return None
    for used in (left, right):
        axes.see(used)
    out = axes.of(node)
    summed = axes.new(left, -1)
    *batch, rows, columns = out

    def operand(used: fx.Node, own: Layout) -> Operand:
        return Operand(used, [*batch[len(batch) + 2 - used.meta["val"].dim() :], *own])

    return Product(node, operand(left, [rows, (summed,)]), operand(right, [(summed,), columns]), out, summed)


def _einsum(axes: Axes, node: fx.Node) -> Product | None:
    """einsum of two operands that sums over one label; None for another."""
    equation = node.args[0].replace(" ", "")
    if "->" not in equation:
        return None
    inputs, out = equation.split("->")
    ranks = [used.meta["val"].dim() for used in node.args[1]]
    first, second = (_spelled(labels, rank) for labels, rank in zip(inputs.split(","), ranks, strict=True))
    out = _spelled(out, node.meta["val"].dim())
    summed = [label for label in first if label in second and label not in out]
    if len(summed) != 1 or any(len(set(labels)) != len(labels) for labels in (first, second, out)):
        return None
    if not set(out) | set(summed) == set(first) | set(second):
        return None
    for used in node.args[1]:
        axes.see(used)
    known = dict(zip(out, axes.of(node), strict=True))
    known[summed[0]] = (axes.new(node.args[1][0], first.index(summed[0])),)
    left, right = (
        Operand(used, [known[label] for label in labels])
        for used, labels in zip(node.args[1], (first, second), strict=True)
    )
    return Product(node, left, right, [known[label] for label in out], known[summed[0]][0])


def _spelled(labels: str, rank: int) -> str:
    """The labels of an operand with `rank` dims; an ellipsis as the digits that count its dims from the right."""
    before, dots, after = labels.partition("...")
    return before + "".join(str(n) for n in reversed(range(rank - len(before + after)))) + after if dots else labels


@dataclass
class Mask:
    """Something added to the scores (`fill` None), or a condition outside which they become `fill`; its dims hold `layout`, those of size 1
    broadcasting."""

    node: fx.Node
    layout: Layout
    factor: float = 1.0
    fill: float | None = None
    inverted: bool = False


@dataclass
class Grid:
    """The two axes of scores that a causal mask or a window is about."""

    axes: Axes
    queries: Group
    keys: Group

    def lengths(self) -> tuple[Any, Any]:
        """The sizes of queries and keys as they stand in meta["val"]."""
        return self.axes.symbolic(self.queries[0]), self.axes.symbolic(self.keys[0])


@dataclass
class Scores:
    """What a softmax runs over: softcap(scale * product) + masks. `layout` says which axes of the product its input holds where; it runs over
    `keys`, and `queries` is the other axis that only one operand has."""

    product: Product
    axes: Axes
    layout: Layout
    scale: float = 1.0
    inner: float = 1.0
    capped: bool = False
    masks: list[Mask] = field(default_factory=list)
    keys: Group = ()
    queries: Group = ()

    @property
    def query(self) -> Operand:
        """The operand that the keys are not in."""
        return self.product.right if self.keys[0] in _flat(self.product.left.layout) else self.product.left

    @property
    def key(self) -> Operand:
        """The other one."""
        return self.product.left if self.query is self.product.right else self.product.right

    @property
    def batch(self) -> Group:
        """All other axes, batch first: those whose size is a symbol before those whose size is a number."""
        found = [axis for axis in _flat(self.axes.refined(self.product.out)) if axis not in self.keys + self.queries]
        return tuple(sorted(found, key=self.axes.is_static))

    @property
    def grid(self) -> Grid:
        """Queries by keys."""
        return Grid(self.axes, self.queries, self.keys)


def _flat(layout: Layout) -> list[int]:
    return [axis for group in layout for axis in group]


def read_scores(analysis: Analysis, softmax: fx.Node) -> Scores:
    """Walk up from a softmax to the product of queries and keys. Raises Declined at the first node that no attention has."""
    axes = Axes(analysis)
    path: list[tuple[fx.Node, fx.Node]] = []
    node = softmax.args[0]
    while True:
        product = product_of(axes, node)
        if product is not None:
            break
        if len(path) > 40:
            raise Declined("no product of two activations stands above the softmax", node)
        step = _step_up(analysis, node)
        path.append((node, step))
        node = step
    scores = Scores(product, axes, list(product.out), scale=product.alpha)
    if product.bias is not None:
        if analysis.active(product.bias):
            raise Declined("an activation is added to the scores", product.node)
        _add_mask(scores, product.bias, product.beta)
    for node, previous in reversed(path):
        _apply_step(analysis, scores, node, previous)
    _name_axes(scores, softmax)
    return scores


def _name_axes(scores: Scores, softmax: fx.Node) -> None:
    axes, product = scores.axes, scores.product
    left, right = (set(_flat(axes.refined(operand.layout))) for operand in (product.left, product.right))
    scores.keys = axes.atoms(scores.layout[softmax.args[1]])
    if not scores.keys or not (left ^ right).issuperset(scores.keys):
        raise Declined("the softmax runs over a batch dimension", softmax)
    others = left - right if right.issuperset(scores.keys) else right - left
    rows = [group for group in axes.refined(product.out) if group and others.issuperset(group)]
    if not rows:
        raise Declined("no axis of the scores is one of queries", softmax)
    scores.queries = rows[-1]
    if len(scores.keys + scores.queries) > 2:
        raise Declined("the scores are reshaped across queries or keys", softmax)


def _add_mask(scores: Scores, node: fx.Node, factor: float = 1.0, **fields: Any) -> None:
    dims = node.meta["val"].dim()
    if dims > len(scores.layout):
        raise Declined("a mask has more dims than the scores", node)
    scores.masks.append(Mask(node, scores.layout[len(scores.layout) - dims :], factor, **fields))


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
        moved = scores.axes.moved(scores.layout, node, previous)
        if moved is None:
            raise Declined("the scores are moved by more than a permutation and a regrouping of their dims", node)
        scores.layout = moved
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
    _add_mask(scores, other, alpha)


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
    _add_mask(scores, condition, fill=fill, inverted=inverted)


@dataclass
class Weighted:
    """The product of probabilities and values, in axes of the scores and `width`, the axis that only the values have."""

    node: fx.Node
    values: Operand
    out: Layout
    width: int
    dropout: float


def read_weighted(scores: Scores, softmax: fx.Node) -> Weighted:
    """Walk down from a softmax to the product with the values. Raises Declined where there is none."""
    queue: list[tuple[fx.Node, Layout, float]] = [(softmax, scores.layout, 0.0)]
    parted, seen = softmax, {softmax}
    same = CASTS | {aten.contiguous.default, aten.clone.default, aten.nan_to_num.default}
    while queue:
        node, layout, dropout = queue.pop(0)
        for user in sorted(node.users):
            if user in seen:
                continue
            seen.add(user)
            product = product_of(scores.axes, user)
            if product is not None:
                weighted = _as_weighted(scores, product, Operand(node, layout), dropout)
                if weighted is not None:
                    return weighted
            elif user.target is aten.dropout.default:
                queue.append((user, layout, dropout if dropout_off(user) else float(user.args[1])))
            elif user.target in same and user.args[0] is node:
                queue.append((user, layout, dropout))
            elif sources(user) == [node]:
                moved = scores.axes.moved(layout, user, node)
                if moved is None:
                    parted = user
                else:
                    queue.append((user, moved, dropout))
            elif user.op != "output":
                parted = user
    raise Declined("the probabilities meet no product with values", parted)


def _as_weighted(scores: Scores, product: Product, probabilities: Operand, dropout: float) -> Weighted | None:
    """The product in the axes of the scores; None where it sums over anything but the keys."""
    if product.bias is not None or product.alpha != 1.0 or product.left.node is product.right.node:
        return None
    axes = scores.axes
    mine, values = product.left, product.right
    if mine.node is not probabilities.node:
        mine, values = values, mine
    if mine.node is not probabilities.node:
        return None
    known: dict[int, Group] = {}
    for own, group in zip(_flat(mine.layout), axes.refined(probabilities.layout), strict=True):
        if axes.extent((own,)) != axes.extent(group):
            return None
        known[own] = group
    new = [axis for axis in _flat(values.layout) if axis not in known]
    if known[product.summed] != scores.keys or len(new) != 1 or new[0] not in _flat(product.out):
        return None
    known[new[0]] = (new[0],)
    values = Operand(values.node, [known[axis] for axis in _flat(values.layout)])
    if scores.queries[0] in _flat(values.layout):
        return None
    return Weighted(product.node, values, [known[axis] for axis in _flat(product.out)], new[0], dropout)


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


def split_batch(axes: Axes, batch: Group, operand: Operand) -> Group:
    """The batch axes, [B*H] as B and H where data movement alone makes the operand [B*H, T, K] from a node [B, H, T, K]."""
    node = operand.node
    if len(batch) == 1 and operand.layout[0] == batch:
        for member in cone(axes.analysis, node).members:
            sizes = sizes_of(member)
            if len(sizes) == 4 and sizes[2:] == sizes_of(node)[1:]:
                axes.see(member)
                axes.reshaped([batch], list(sizes[:2]))
                break
    return axes.atoms(batch)
