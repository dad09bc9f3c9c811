"""An attention whose queries, keys and values are three products of the same input, with RoPE on queries and keys: what it is made of.

    x -> linear -> [B, T, heads, K] -> [B, heads, T, K] -> rope -> scaled_dot_product_attention -> [B, T, heads M] -> linear

Found by the flow of data from a canonical attention node backward, through layout alone; what does not look like this is declined.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::rope
from ftc.rewrite.edit import is_parameter, linear_operands
from ftc.rewrite.outcome import Declined, operation

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
ROPE = torch.ops.ftc.rope.default
LATENT = torch.ops.ftc.latent_attention.default
LINEAR = aten.linear.default
LAYOUT = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
}
_NORMS = {aten.rms_norm.default, aten.layer_norm.default}


@dataclass(frozen=True)
class Projection:
    """One of query, key and value: its product, the node [B, heads, T, K] before RoPE, RoPE, and the node that attention reads."""

    linear: fx.Node
    heads: fx.Node
    rope: fx.Node | None
    read: fx.Node

    @property
    def weight(self) -> fx.Node:
        return linear_operands(self.linear)[1]

    @property
    def bias(self) -> fx.Node | None:
        return linear_operands(self.linear)[2]

    @property
    def num_heads(self) -> int:
        return int(self.heads.meta["val"].shape[1])

    @property
    def width(self) -> int:
        return int(self.heads.meta["val"].shape[-1])


@dataclass(frozen=True)
class AttentionSite:
    """See the module's docstring. `mask` is None with `is_causal`; `out` is the product after the attention, None where none is found."""

    attention: fx.Node
    query: Projection
    key: Projection
    value: Projection
    mask: fx.Node | None
    dropout: float
    is_causal: bool
    scale: float
    out: fx.Node | None

    @property
    def num_heads(self) -> int:
        return self.query.num_heads

    @property
    def groups(self) -> int:
        return self.key.num_heads

    @property
    def rotary(self) -> int:
        """Elements of a head that RoPE turns."""
        return 0 if self.key.rope is None else int(self.key.rope.args[1].meta["val"].shape[-1])

    @property
    def interleaved(self) -> bool:
        return self.key.rope is not None and len(self.key.rope.args) > 3 and bool(self.key.rope.args[3])

    @property
    def cache_elements(self) -> int:
        """Numbers that a cache of keys and values keeps for a token."""
        return self.groups * (self.key.width + self.value.width)


def attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The canonical attention nodes, latent ones among them."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in (SDPA, LATENT, torch.ops.ftc.softcap_attention.default)]


def latent_nodes(code) -> list[fx.Node]:
    """The latent attentions in all graphs of a code."""
    return [node for variant in code.all_variants() for node in variant.captured.graph.nodes if node.target is LATENT]


def read_site(node: fx.Node) -> AttentionSite:
    """The site around an attention node. Raises Declined with the node where it parts."""
    if node.target is LATENT:
        raise Declined("the attention is latent already", node)
    if node.target is not SDPA:
        raise Declined(f"{operation(node)} bounds its scores, which no latent form does", node)
    query, key, value, mask, dropout, is_causal = _arguments(node)
    projections = [_projection(operand, word) for operand, word in ((query, "queries"), (key, "keys"), (value, "values"))]
    _check(node, projections, mask, is_causal)
    scale = node.kwargs.get("scale")
    scale = projections[0].width ** -0.5 if scale is None else float(scale)
    return AttentionSite(node, *projections, mask, dropout, is_causal, scale, output_product(node))


def _arguments(node: fx.Node) -> tuple:
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)) | dict(node.kwargs)
    return (*[given[n] for n in ("query", "key", "value")], given.get("attn_mask"), given.get("dropout_p", 0.0), given.get("is_causal", False))


def _projection(read: fx.Node, word: str) -> Projection:
    node, rope = read, None
    if node.target is ROPE:
        rope, node = node, node.args[0]
    heads = node
    if heads.meta["val"].dim() != 4:
        raise Declined(f"the {word} are not [batch, heads, tokens, width]", node)
    while node.op == "call_function" and node.target in LAYOUT:
        node = node.args[0]
    if node.target is LINEAR:
        return Projection(node, heads, rope, read)
    if node.target in _NORMS:
        raise Declined(f"the {word} are normed head by head, which is no linear map and does not go into a latent", node)
    if node.target in (aten.split_with_sizes.default, aten.chunk.default, operator.getitem):
        raise Declined(f"the {word} are part of a fused product; put this pass before the one that fuses", node)
    if node.target is aten.cat.default:
        raise Declined(f"the {word} are put together of parts, as those of latent attention are", node)
    raise Declined(f"{operation(node)} stands between the {word} and their product", node)


def _check(node: fx.Node, projections: list[Projection], mask: fx.Node | None, is_causal: bool) -> None:
    query, key, value = projections
    if not is_causal and mask is None:
        raise Declined("the attention is not causal", node)
    inputs = [linear_operands(p.linear)[0] for p in projections]
    for projection, given in zip(projections, inputs, strict=True):
        if given is not inputs[0]:
            raise Declined(f"the product reads {given.name}, that of the queries {inputs[0].name}", projection.linear)
        for attribute in (projection.weight, projection.bias):
            if attribute is not None and (not is_parameter(attribute) or len(attribute.users) > 1):
                raise Declined(f"{attribute.name} is no parameter of this product alone", projection.linear)
        if len(projection.linear.users) > 1 or len(projection.heads.users) > 1:
            raise Declined("something else reads the product too", projection.linear)
    if len({p.linear for p in projections}) < 3:
        raise Declined("two of queries, keys and values come from one product; put this pass before the one that fuses", query.linear)
    if (key.bias is None) != (value.bias is None):
        raise Declined("only one of keys and values has a bias", key.linear)
    if (query.rope is None) != (key.rope is None):
        raise Declined("only one of queries and keys is rotated", node)
    if query.rope is not None and query.rope.args[1:] != key.rope.args[1:]:
        raise Declined("queries and keys are rotated by different tables", key.rope)
    if value.rope is not None:
        raise Declined("the values are rotated", value.rope)
    if key.num_heads != value.num_heads or query.num_heads % key.num_heads or query.width != key.width:
        raise Declined("the heads of queries, keys and values do not fit each other", node)


def output_product(node: fx.Node) -> fx.Node | None:
    """The product over [B, T, heads M] that reads the attention's result, where nothing else does and no one else has its weight."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is LINEAR:
            _, weight, bias = linear_operands(node)
            own = [a for a in (weight, bias) if a is not None]
            return node if all(is_parameter(a) and len(a.users) == 1 for a in own) else None
        if node.target not in LAYOUT:
            return None
    return None


def pair_places(rotary: int, width: int, interleaved: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """Of a head of `width` elements: the places (real, imaginary) of each RoPE pair, and those that RoPE leaves alone."""
    half = rotary // 2
    pairs = [(2 * f, 2 * f + 1) if interleaved else (f, f + half) for f in range(half)]
    return pairs, list(range(rotary, width))
