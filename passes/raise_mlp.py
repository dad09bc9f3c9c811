"""raise-mlp: gated products become `ftc.gated`, written-out activations their ATen operator.

    act(g) * u                                               = gated(g, u, act)      (Shazeer 2020, GLU Variants Improve Transformer)
    g * sigmoid(g)                                           = silu(g)
    g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3)))        = gelu(g, tanh)
    g/2 * (1 + erf(g / sqrt(2)))                             = gelu(g)

g and u may come from anywhere: two products, slices of one fused product, a grouped product over experts. The pass looks at every elementwise
tree over activations of one shape, tries each pair (or single) of its inner nodes as (g, u), and keeps what is proved equal. Which of the two
is the gate is measured, not read off.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::gated
from ftc.dialect.gated import ACTIVATIONS
from ftc.rewrite.movement import CASTS, cone, dropout_off
from ftc.rewrite.outcome import Declined, Match, location, operation
from ftc.rewrite.probe import aten, relative_error
from ftc.rewrite.raising import RaisePass
from ftc.rewrite.recognise import PRODUCTS, VALUE_TOLERANCE, Analysis, Builder, replace, sizes_of

GATED = torch.ops.ftc.gated.default
PRODUCT_OPS = {
    aten.mul.Tensor,
    aten.multiply.Tensor,
    aten.div.Tensor,
    aten.divide.Tensor,
    aten.addcmul.default,
    aten.mul.Scalar,
}
CURVES = {
    aten.tanh.default,
    aten.erf.default,
    aten.exp.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.erfc.default,
    aten.special_erf.default,
    aten.special_expit.default,
    aten.threshold.default,
    aten.log_sigmoid.default,
    aten.logsigmoid.default if hasattr(aten, "logsigmoid") else aten.tanh.default,
    aten.hardtanh.default,
}
STEPS = {
    *PRODUCT_OPS,
    *CASTS,
    *CURVES,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.square.default,
    aten.reciprocal.default,
    aten.contiguous.default,
    aten.clone.default,
}
RECTIFIERS = {
    aten.clamp_min.default,
    aten.clamp.default,
    aten.maximum.default,
    aten.where.self,
    aten.where.ScalarOther,
    aten.gt.Scalar,
    aten.ge.Scalar,
}
LAST = {
    *PRODUCT_OPS,
    *(RECTIFIERS - {aten.gt.Scalar, aten.ge.Scalar}),
    aten.reciprocal.default,
    aten.add.Tensor,
    aten.square.default,
}
PLAIN = {
    "silu": (aten.silu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
    "sigmoid": (aten.sigmoid.default, {}),
}
MAGNITUDES = (1.0, 1e-2, 8.0, 100.0)


@dataclass(frozen=True)
class RaiseMlp(RaisePass):
    """The pass."""

    name: ClassVar[str] = "raise-mlp"
    summary: ClassVar[str] = "gated products become ftc.gated, written-out activations their ATen operator"
    canonical: ClassVar[frozenset] = frozenset({GATED})
    last_first: ClassVar[bool] = True  # the largest tree that is a gate, before the trees in it

    def is_anchor(self, analysis: Analysis, node: fx.Node) -> bool:
        """The last operation of a gate or of an activation."""
        val = node.meta.get("val")
        return node.target in LAST and isinstance(val, Tensor) and val.is_floating_point()

    def raise_at(self, analysis: Analysis, result: fx.Node) -> Match | None:
        """A gated product before an activation by itself."""
        tree = _tree(analysis, result)
        match = _raise_gated(analysis, result, tree) or _raise_plain(analysis, result, tree)
        if match is None and is_gate(analysis, result):
            raise _parting(result, tree)
        return match


@dataclass
class Tree:
    """The elementwise nodes above `result` of its shape, deepest first (`inner`, result left out), and where other operations begin (`borders`)."""

    inner: list[fx.Node]
    borders: list[fx.Node]
    numbers: list[float]


def _tree(analysis: Analysis, result: fx.Node) -> Tree:
    shape = sizes_of(result)
    seen, queue, borders, numbers = {result}, [result], [], []
    while queue:
        node = queue.pop(0)
        if node is not result and (
            node in analysis.changing or not _elementwise(analysis, node, shape) or len(seen) > 40
        ):
            borders.append(node)
            continue
        for value in node.args:
            number = (
                analysis.constant(value)
                if isinstance(value, int | float | fx.Node) and not isinstance(value, bool)
                else None
            )
            if number is not None:
                numbers.append(number)
        for used in node.all_input_nodes:
            if analysis.active(used) and used not in seen:
                seen.add(used)
                queue.append(used)
    inner = sorted(node for node in seen if node is not result)
    return Tree(inner, borders, list(dict.fromkeys(numbers)))


def _elementwise(analysis: Analysis, node: fx.Node, shape: torch.Size) -> bool:
    """Whether a node computes each element from the same element of activations of `shape` and from constants."""
    if node.op != "call_function" or not (node.target in STEPS | RECTIFIERS or dropout_off(node)):
        return False
    if not isinstance(node.meta["val"], Tensor) or sizes_of(node) != shape:
        return False
    others = [used for used in node.all_input_nodes if not analysis.active(used)]
    active = [used for used in node.all_input_nodes if analysis.active(used)]
    if node.target in CASTS:
        return active[:1] == [node.args[0]]
    if any(sizes_of(used) != shape for used in active) or any(analysis.constant(used) is None for used in others):
        return False
    if node.target in RECTIFIERS:
        bounds = [
            analysis.constant(value)
            for value in [*node.args, *node.kwargs.values()]
            if value is not None and not analysis.active(value)
        ]
        return bool(active) and all(bound in (0.0, None) for bound in bounds)
    return True


def _cuts(result: fx.Node, pair: set[fx.Node], tree: Tree) -> bool:
    """Whether every path from the borders to the result goes through `pair`, and both are met."""
    inner, met, seen, stack = set(tree.inner), set(), set(), [result]
    while stack:
        for used in stack.pop().all_input_nodes:
            if used in pair:
                met.add(used)
            elif used in inner and used not in seen:
                if used in tree.borders:
                    return False
                seen.add(used)
                stack.append(used)
    return met == pair


def _ordered(result: fx.Node, groups: Iterable[tuple[fx.Node, ...]]) -> list[tuple[fx.Node, ...]]:
    """Hypotheses in order of preference: those in the dtype of the result, deepest first."""
    dtype = result.meta["val"].dtype
    return sorted(groups, key=lambda group: sum(node.meta["val"].dtype != dtype for node in group))


def _sample(analysis: Analysis, result: fx.Node, group: tuple[fx.Node, ...]) -> list[list[Tensor]] | None:
    """[result, *group] values for each magnitude, in one trial."""
    samples = []
    for salt, magnitude in enumerate(MAGNITUDES):
        given = {node: analysis._random(node, analysis.trials[0], magnitude, 60 + salt) for node in group}
        with torch.no_grad():
            try:
                (value,) = analysis.evaluate([result], analysis.trials[0], given)
            except (RuntimeError, TypeError):
                return None
        samples.append([value, *(given[node] for node in group)])
    return samples


def _close(found: Tensor, expected: Tensor) -> bool:
    return relative_error(found, expected) <= VALUE_TOLERANCE


def _raise_gated(analysis: Analysis, result: fx.Node, tree: Tree) -> Match | None:
    if result.target not in PRODUCT_OPS or len(tree.borders) < 2 or len(tree.inner) > 24:
        return None
    shape = sizes_of(result)
    inner = [node for node in tree.inner if sizes_of(node) == shape and node.meta["val"].is_floating_point()]
    pairs = [pair for pair in itertools.combinations(inner, 2) if _cuts(result, set(pair), tree)]
    for pair in _ordered(result, pairs):
        samples = _sample(analysis, result, pair)
        if samples is None:
            continue
        for name, curve in ACTIVATIONS.items():
            if name == "identity" and not _is_bilinear_mlp(analysis, result, pair):
                continue
            for a, b in ((0, 1), (1, 0)):
                for factor in dict.fromkeys([1.0, *tree.numbers, *(1 / number for number in tree.numbers if number)]):
                    if all(_close(curve(sample[1 + a]) * sample[1 + b] * factor, sample[0]) for sample in samples):
                        match = _build_gated(analysis, result, pair[a], pair[b], name, factor)
                        if match is not None:
                            return match
    return None


def _build_gated(
    analysis: Analysis, result: fx.Node, gate: fx.Node, up: fx.Node, name: str, factor: float
) -> Match | None:
    build = Builder(analysis, result)
    dtype = result.meta["val"].dtype
    new = canonical = build(GATED, build.cast(gate, dtype), build.cast(up, dtype), name, val=result.meta["val"])
    if factor != 1.0:
        new = build(aten.mul.Tensor, new, factor)
    if analysis.differs(result, new, (gate, up), MAGNITUDES) is not None:
        build.undo()
        return None
    replace(analysis, result, new)
    return Match("gated", (canonical.name,), {"activation": name, "gate": gate.name, "up": up.name}, location(result))


def _raise_plain(analysis: Analysis, result: fx.Node, tree: Tree) -> Match | None:
    shape = sizes_of(result)
    inner = [node for node in tree.inner if sizes_of(node) == shape and node.meta["val"].is_floating_point()]
    singles = [(node,) for node in inner if _cuts(result, {node}, tree)]
    for (source,) in _ordered(result, singles):
        samples = _sample(analysis, result, (source,))
        if samples is None:
            continue
        for name, (target, kwargs) in PLAIN.items():
            if not all(_close(ACTIVATIONS[name](sample[1]), sample[0]) for sample in samples):
                continue
            build = Builder(analysis, result)
            new = build(target, build.cast(source, result.meta["val"].dtype), **kwargs)
            if analysis.differs(result, new, (source,), MAGNITUDES) is None:
                replace(analysis, result, new)
                return Match("activation", (new.name,), {"activation": name}, location(result))
            build.undo()
    return None


def _is_bilinear_mlp(analysis: Analysis, result: fx.Node, pair: tuple[fx.Node, ...]) -> bool:
    """A product without an activation counts as a gated MLP only between two products with parameters and before a third."""
    before = all(all(_is_product(analysis, root) for root in cone(analysis, node).roots) for node in pair)
    return before and any(_is_product(analysis, user) for user in result.users)


def _is_product(analysis: Analysis, node: fx.Node) -> bool:
    return node.target in PRODUCTS and any(
        "P" in analysis.kind(used) and not analysis.active(used) for used in node.all_input_nodes
    )


def is_gate(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a node is a product of activations of one shape, one of them (nearly) the value of an activation function."""
    if (
        node.op != "call_function"
        or node.target not in (aten.mul.Tensor, aten.multiply.Tensor)
        or not analysis.active(node)
    ):
        return False
    shape = sizes_of(node)
    factors = [used for used in node.args if analysis.active(used) and sizes_of(used) == shape]
    if len(factors) != 2 or factors[0] is factors[1]:
        return False
    for one, other in (factors, factors[::-1]):
        while one.target in CASTS or dropout_off(one):
            one = one.args[0]
        if one.target in CURVES and one.args[0] is not other:
            return True
    return False


def _parting(result: fx.Node, tree: Tree) -> Declined:
    if len(tree.borders) == 2:
        return Declined("no activation of one factor times the other gives these values", result)
    border = tree.borders[-1]
    return Declined(f"the product depends on {len(tree.borders)} tensors; the tree ends at {operation(border)}", border)
