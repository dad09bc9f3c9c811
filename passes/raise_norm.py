"""raise-norm: written-out RMSNorm and LayerNorm become `aten.rms_norm` and `aten.layer_norm`.

    x / sqrt(mean(x^2) + eps) * w              = rms_norm(x, [D], w, eps)           (Zhang and Sennrich 2019, equation 4)
    (x - mean(x)) / sqrt(var(x) + eps) * w + b = layer_norm(x, [D], w, b, eps)      (Ba et al. 2016, equation 4)

over the last dimension, whatever the spelling: the pass looks for an inverse root of a reduction of activations, takes every tensor above it
as a possible x and every one below as a possible result, and keeps what is proved equal. The weight is whatever parameter expression
multiplies (w, 1 + w, a cast). Casts pinned to float32 stay around the norm, and where the result is rounded before the weight multiplies it, the
weight stays outside: w * rms_norm(x.float(), [D], None, eps).to(bfloat16). A norm with the constant 1/sqrt(D) (an L2 norm) keeps that factor outside.
"""

import itertools
import math
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ftc.rewrite.movement import CASTS, MOVES, widens
from ftc.rewrite.outcome import Declined, Match, location, operation
from ftc.rewrite.probe import aten, relative_error
from ftc.rewrite.raising import RaisePass
from ftc.rewrite.recognise import VALUE_TOLERANCE, Analysis, Builder, replace, sizes_of

CANONICAL = frozenset({aten.rms_norm.default, aten.layer_norm.default})
ROOTS = {
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype,
    aten.std.correction,
    aten.std.dim,
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    aten.linalg_norm.default,
}
POWERS = {aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor}
REDUCTIONS = {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.var.dim,
    aten.var.correction,
    aten.var_mean.correction,
    aten.var_mean.dim,
    aten.std_mean.correction,
    aten.mean.default,
}
STEPS = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.neg.default,
    aten.square.default,
    aten.reciprocal.default,
    aten.addcmul.default,
    aten.addcdiv.default,
    aten.true_divide.Tensor,
    aten.multiply.Tensor,
    aten.divide.Tensor,
    aten.expand.default,
    aten.expand_as.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.detach.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.dot.default,
    *CASTS,
    *MOVES,
    *POWERS,
    *ROOTS,
    *REDUCTIONS,
    operator.getitem,
}
REDUCING = REDUCTIONS | ROOTS | {aten.matmul.default, aten.einsum.default}
MAGNITUDES = (1.0, 1e-2, 1e-4)


@dataclass(frozen=True)
class RaiseNorm(RaisePass):
    """The pass."""

    name: ClassVar[str] = "raise-norm"
    summary: ClassVar[str] = "written-out RMSNorm and LayerNorm become aten.rms_norm and aten.layer_norm"
    canonical: ClassVar[frozenset] = CANONICAL

    def is_anchor(self, analysis: Analysis, node: fx.Node) -> bool:
        """An inverse root, or a norm."""
        if node.target in POWERS:
            return analysis.constant(node.args[1]) in (0.5, -0.5)
        return node.target in ROOTS

    def raise_at(self, analysis: Analysis, anchor: fx.Node) -> Match | None:
        """The match whose result is farthest below the anchor and whose source is nearest above it."""
        above = _above(analysis, anchor)
        if not any(node.target in REDUCING for node in [anchor, *above]):
            return None
        candidates = [node for node in above if _wide(node) and node not in analysis.changing]
        below = _below(analysis, anchor, set(above))
        results = [node for node in reversed(below) if _wide(node) and node.users and node not in analysis.changing]
        results = [node for node in results if not _is_copy_of(node, results)]
        for result in results:
            for kind in ("layer_norm", "rms_norm"):
                for source in candidates:
                    fits = sizes_of(source) == sizes_of(result) and source < result
                    if fits and not _rounds(analysis, source, result):
                        match = _try(analysis, kind, source, result, anchor)
                        if match is not None:
                            return match
        raise _parting(analysis, anchor, candidates, results)


def _is_copy_of(node: fx.Node, results: list[fx.Node]) -> bool:
    """Whether the node only repeats another result: raising it would leave that one's other readers behind."""
    copies = (aten.contiguous.default, aten.clone.default, aten.view.default, aten.reshape.default)
    return node.target in copies and node.args[0] in results and sizes_of(node) == sizes_of(node.args[0])


def _rounds(analysis: Analysis, source: fx.Node, result: fx.Node) -> bool:
    """Whether a cast to a narrower dtype stands between the two. It is pinned: `w * (x * r).to(bfloat16)` rounds before the weight, and stays
    `w * rms_norm(x).to(bfloat16)`; with the weight inside, the bits of a bfloat16 model would be others."""
    seen, stack = {source, result}, [*result.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in seen or node < source or not analysis.active(node):
            continue
        if node.target in CASTS and not widens(node):
            return True
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return False


def _wide(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return (
        isinstance(val, Tensor)
        and val.is_floating_point()
        and val.dim() >= 1
        and isinstance(val.shape[-1], int)
        and val.shape[-1] > 1
    )


def _above(analysis: Analysis, anchor: fx.Node, steps: set = STEPS) -> list[fx.Node]:
    """The activations that the anchor is computed from by the steps of a norm, nearest first, with the borders where other steps begin."""
    found, queue = [], [anchor]
    while queue:
        node = queue.pop(0)
        if node is not anchor:
            found.append(node)
        if node is not anchor and node.target not in steps:
            continue
        for used in node.all_input_nodes:
            if analysis.active(used) and used not in found and used not in queue and len(found) < 24:
                queue.append(used)
    return found


def _below(analysis: Analysis, anchor: fx.Node, above: set[fx.Node]) -> list[fx.Node]:
    """The nodes computed from the anchor by the steps of a norm, from it, what is above it, parameters and constants; in graph order."""
    beside, found = above | {anchor}, {anchor}
    for node in analysis.graph.nodes:
        if node in beside or node.target not in STEPS or not analysis.active(node) or len(found) > 24:
            continue
        active = [used for used in node.all_input_nodes if analysis.active(used)]
        if all(used in beside for used in active):
            beside.add(node)
            if any(used in found for used in active):
                found.add(node)
    return sorted(found)


def _parameters_between(analysis: Analysis, source: fx.Node, result: fx.Node) -> tuple[list[fx.Node], list[float]]:
    """The parameter expressions and the numbers that enter between `source` and `result`."""
    seen, queue, learned, numbers = {result}, [result], [], []
    while queue:
        node = queue.pop(0)
        if node is source:
            continue
        values = [node.args[2]] if node.target is aten.addcmul.default else []
        for used in [*node.args, *node.kwargs.values(), *values]:
            constant = (
                None
                if isinstance(used, bool)
                else analysis.constant(used)
                if isinstance(used, int | float | fx.Node)
                else None
            )
            if constant is not None and 0 <= constant < 0.1:
                numbers.append(constant)
        for used in node.all_input_nodes:
            if (
                analysis.active(used)
                and used not in seen
                and used.target in STEPS | {None} | CANONICAL
                or used is source
            ):
                if used not in seen:
                    seen.add(used)
                    queue.append(used)
            elif "P" in analysis.kind(used) and "A" not in analysis.kind(used) and used not in learned:
                learned.append(used)
    return learned, list(dict.fromkeys([*numbers, 0.0]))


def _try(analysis: Analysis, kind: str, source: fx.Node, result: fx.Node, anchor: fx.Node) -> Match | None:
    """The match, where `result` is the norm `kind` of `source`; measured first on plain tensors, then proved on the graph."""
    learned, numbers = _parameters_between(analysis, source, result)
    width = source.meta["val"].shape[-1]
    learned = [node for node in learned if node.meta["val"].numel() == width]
    if not _depends(source, result):
        return None
    samples = _samples(analysis, source, result, learned)
    if samples is None:
        return None
    factors = (1.0, width**-0.5)
    weights = [(None, 0.0), *((node, offset) for offset in (0.0, 1.0) for node in learned)]
    for (weight, offset), factor in itertools.product(weights, factors):
        biases = [None] if kind == "rms_norm" else [None, *(node for node in learned if node is not weight)]
        epsilons = dict.fromkeys([*numbers, *(number / width for number in numbers)])
        for bias, eps in itertools.product(biases, epsilons):
            norm = Norm(kind, source, weight, offset, bias, eps, factor)
            if all(_equal(norm, sample, result) for sample in samples):
                match = _build(analysis, norm, result, anchor)
                if match is not None:
                    return match
    return None


@dataclass(frozen=True)
class Norm:
    """A hypothesis: factor * kind(source, offset + weight, bias, eps)."""

    kind: str
    source: fx.Node
    weight: fx.Node | None
    offset: float
    bias: fx.Node | None
    eps: float
    factor: float


def _depends(source: fx.Node, result: fx.Node) -> bool:
    seen, stack = set(), [result]
    while stack:
        node = stack.pop()
        if node is source:
            return True
        if node in seen or node < source:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return False


def _samples(
    analysis: Analysis, source: fx.Node, result: fx.Node, learned: list[fx.Node]
) -> list[dict[fx.Node, Tensor]] | None:
    """Values of result, source and parameters for a source of each magnitude, in one trial."""
    trial, samples = analysis.trials[0], []
    for salt, magnitude in enumerate(MAGNITUDES):
        given = {node: analysis._random(node, trial, 1.0, 40 + salt) for node in learned}
        given[source] = analysis._random(source, trial, magnitude, 50 + salt)
        with torch.no_grad():
            try:
                (value,) = analysis.evaluate([result], trial, given)
            except (RuntimeError, TypeError):
                return None
        if not isinstance(value, Tensor):
            return None
        samples.append(given | {result: value})
    return samples


def _equal(norm: Norm, sample: dict[fx.Node, Tensor], result: fx.Node) -> bool:
    """Whether the hypothesis gives the sampled value of `result`."""
    x = sample[norm.source]
    weight = None if norm.weight is None else sample[norm.weight].reshape(-1) + norm.offset
    bias = None if norm.bias is None else sample[norm.bias].reshape(-1)
    if norm.kind == "rms_norm":
        found = F.rms_norm(x, (x.shape[-1],), weight, norm.eps)
    else:
        found = F.layer_norm(x, (x.shape[-1],), weight, bias, norm.eps)
    return relative_error(found * norm.factor, sample[result]) <= 10 * VALUE_TOLERANCE


def _build(analysis: Analysis, norm: Norm, result: fx.Node, anchor: fx.Node) -> Match | None:
    build = Builder(analysis, result)
    source, eps = norm.source, norm.eps
    dtype, width = source.meta["val"].dtype, source.meta["val"].shape[-1]

    def vector(node: fx.Node | None, offset: float = 0.0) -> fx.Node | None:
        if node is None:
            return None
        node = build.cast(node, dtype)
        node = build(aten.add.Tensor, node, offset) if offset else node
        return node if node.meta["val"].dim() == 1 else build(aten.reshape.default, node, [width])

    if norm.kind == "rms_norm":
        new = build(
            aten.rms_norm.default, source, [width], vector(norm.weight, norm.offset), eps, val=source.meta["val"]
        )
    else:
        weight, bias = vector(norm.weight, norm.offset), vector(norm.bias)
        new = build(aten.layer_norm.default, source, [width], weight, bias, eps, val=source.meta["val"])
    canonical = new
    if norm.factor != 1.0:
        new = build(aten.mul.Tensor, new, norm.factor)
    new = build.cast(new, result.meta["val"].dtype)
    borders = [node for node in (source, norm.weight, norm.bias) if node is not None]
    magnitudes = (1.0, math.sqrt(eps) if eps > 0 else 1e-3, 1e3)
    if analysis.differs(result, new, borders, magnitudes) is not None:
        build.undo()
        return None
    replace(analysis, result, new)
    detail = {"eps": eps, "width": width, "weight": norm.weight is not None, "bias": norm.bias is not None}
    return Match(norm.kind, (canonical.name,), detail, location(anchor))


def _parting(analysis: Analysis, anchor: fx.Node, candidates: list[fx.Node], results: list[fx.Node]) -> Declined:
    """Why no hypothesis held: the first step below or above that no norm has, or the values."""
    if not candidates:
        return Declined(
            "no activation of more than one element stands above the inverse root through the steps of a norm", anchor
        )
    below = _below(analysis, anchor, set(_above(analysis, anchor)))
    shaped = [node for node in results if any(sizes_of(node) == sizes_of(c) for c in candidates)]
    if not shaped:
        user = next((user for node in below for user in node.users if user not in below), anchor)
        return Declined(
            f"the inverse root meets {operation(user)} before it meets the tensor it was computed from", user
        )
    return Declined("no rms_norm or layer_norm over the last dimension gives these values", shaped[-1])


def is_reduced_root(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a node is an inverse root (or a norm) of a reduction of activations that scales activations: what raise-norm looks for."""
    if not RaiseNorm().is_anchor(analysis, node):
        return False
    squares = REDUCING - {aten.rsqrt.default, aten.sqrt.default}
    above = _above(analysis, node, STEPS | {aten.clamp.default, aten.clamp_min.default, aten.maximum.default})
    return any(part.target in squares for part in [node, *above]) and any(_wide(part) for part in above)
