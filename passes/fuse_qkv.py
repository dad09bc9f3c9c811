"""fuse-qkv: the query, key and value products of an attention as one.

    [x Wq^T, x Wk^T, x Wv^T] = split(x [Wq; Wk; Wv]^T)
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::rope
from ftc.rewrite.edit import fuse_linears, why_not_fusible
from ftc.rewrite.outcome import Declined, Match, Outcome, location, operation
from ftc.rewrite.passes import Pass

aten = torch.ops.aten
ATTENTION = {
    aten.scaled_dot_product_attention.default,
    torch.ops.ftc.softcap_attention.default,
    torch.ops.ftc.sequence_attention.default,
}
LINEAR = aten.linear.default
# What may stand between a product and the attention: layout, rotation, per-head norms, casts and constant factors.
_THROUGH = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
    aten.expand.default,
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.chunk.default,
    aten.unbind.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.rms_norm.default,
    aten.layer_norm.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.mul.Scalar,
    aten.detach.default,
    torch.ops.ftc.rope.default,
    torch.ops.ftc.gather_sequence.default,
    operator.getitem,
}


def pattern(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as three products."""
    linear = torch.nn.functional.linear
    return linear(x, w_q), linear(x, w_k), linear(x, w_v)


def replacement(x: Tensor, w_qkv: Tensor, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one product, split."""
    return torch.nn.functional.linear(x, w_qkv).split(list(sizes), -1)


@dataclass(frozen=True)
class FuseQkv(Pass):
    """One product for query, key and value. Lens: stack, in that order. Matches the products behind one attention."""

    name: ClassVar[str] = "fuse-qkv"
    summary: ClassVar[str] = "the query, key and value products of an attention become one product over stacked weights"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-norm", "raise-rope", "raise-attention")

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome()
        for attention in [node for node in graph.nodes if node.op == "call_function" and node.target in ATTENTION]:
            try:
                linears = [_product(operand) for operand in attention.args[:3]]
                if len(set(linears)) == 1:
                    outcome.already += 1
                    continue
                _check(linears)
            except Declined as declined:
                outcome.misses.append(declined.miss(attention))
                continue
            place = location(linears[0])
            parts, lenses = fuse_linears(graph, linears, "qkv")
            outcome.lenses += lenses
            detail = {"rows": str(list(lenses[0].sizes)), "weight": lenses[0].target}
            outcome.matches.append(Match("qkv", tuple(p.name for p in parts), detail, place))
        return outcome


def _product(operand: fx.Node) -> fx.Node:
    """The linear node that an operand of attention comes from."""
    node = operand
    while node.op == "call_function" and node.target is not LINEAR:
        if node.target in _THROUGH:
            node = node.args[0]
        elif node.target in (aten.mul.Tensor, aten.add.Tensor) and (inner := _activation_of(node)) is not None:
            node = inner
        else:
            raise Declined(f"{operation(node)} stands between the product and the attention", node)
    if node.op != "call_function":
        raise Declined(f"{node.name} is no product of this block", node)
    return node


def _activation_of(node: fx.Node) -> fx.Node | None:
    """The operand of a product or sum with a parameter or a number that is neither."""
    others = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return others[0] if len(others) == 1 else None


def _check(linears: list[fx.Node]) -> None:
    if len(set(linears)) < 3:
        raise Declined("two of query, key and value come from one product and the third from another", linears[0])
    reason = why_not_fusible(linears)
    if reason is not None:
        raise Declined(*reason)
