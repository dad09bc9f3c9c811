"""Mutators that change the function of a region graph, each by one mistake that a careless rewrite could make or hide."""

import math

import torch
from builder import (
    Builder,
    Mutator,
    argument,
    aten,
    attention,
    attention_arguments,
    causal_bool,
    expand_heads,
    is_op,
    masked_scores,
    register,
    static,
    val,
)
from preserving import rotate_half_parts
from torch import fx

SABOTAGE: dict[str, Mutator] = {}
_SDPA = aten.scaled_dot_product_attention.default
_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default)


def sabotage(*targets):
    return register(SABOTAGE, *targets)


def _tensor(node) -> bool:
    return isinstance(node, fx.Node) and isinstance(val(node), torch.Tensor)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    shapes = [[size if static(size) else None for size in val(node).shape] for node in (a, b)]
    return shapes[0] == shapes[1] and val(a).dtype == val(b).dtype


def _replace_argument(node: fx.Node, name: str, value) -> None:
    position = [described.name for described in node.target._schema.arguments].index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


# ---------------------------------------------------------------------------------------------------------- attention


@sabotage(_SDPA, aten.mul.Tensor, aten.div.Tensor)
def wrong_scale(b: Builder, node: fx.Node):
    """The scores scaled by 1.25 too much."""
    if is_op(node, _SDPA):
        given = attention_arguments(node)
        return attention(b, given | {"scale": given["scale"] * 1.25})
    if not isinstance(node.args[1], float) or val(node).dim() != 4:
        return None
    return b.call(node.target, node.args[0], node.args[1] * 1.25)


@sabotage(_SDPA, aten.add.Tensor, aten.masked_fill.Scalar)
def missing_mask(b: Builder, node: fx.Node):
    if is_op(node, _SDPA):
        given = attention_arguments(node)
        if not given["is_causal"] and given["attn_mask"] is None:
            return None
        return attention(b, given | {"is_causal": False, "attn_mask": None})
    if not any(is_op(user, aten.softmax.int) for user in node.users):
        return None
    return next((part for part in node.args[:2] if _tensor(part) and _same_shape(part, node)), None)  # not the mask


def _with_mask(b: Builder, node: fx.Node, make):
    given = attention_arguments(node)
    if not given["is_causal"]:
        return None
    return attention(b, given | {"is_causal": False, "attn_mask": make(given["query"], given["key"])})


@sabotage(_SDPA, aten.triu.default, aten.tril.default)
def diagonal_off_by_one(b: Builder, node: fx.Node):
    if is_op(node, _SDPA):
        return _with_mask(b, node, lambda query, key: causal_bool(b, query, key, diagonal=1))
    return b.call(node.target, node.args[0], argument(node, "diagonal", 0) + 1)


@sabotage(_SDPA, aten.triu.default, aten.tril.default)
def mask_transposed(b: Builder, node: fx.Node):
    if is_op(node, _SDPA):
        return _with_mask(b, node, lambda query, key: b.swap_last(causal_bool(b, query, key)))
    return b.swap_last(node) if static(val(node).shape[0]) or val(node).dim() == 2 else None


@sabotage(_SDPA)
def mask_with_a_window(b: Builder, node: fx.Node):
    """No key further back than one: another variant, which may be recognised as what it is."""

    def window(query, key):
        far = b.call(aten.logical_not.default, b.call(aten.tril.default, causal_bool(b, query, key), -2))
        return b.call(aten.logical_and.default, causal_bool(b, query, key), far)

    return _with_mask(b, node, window)


@sabotage(_SDPA, aten.softmax.int)
def mask_after_softmax(b: Builder, node: fx.Node):
    if is_op(node, aten.softmax.int):
        scores = node.args[0]
        if not is_op(scores, aten.add.Tensor):
            return None
        return b.add(b.call(aten.softmax.int, scores.args[0], *node.args[1:]), b.mul(scores.args[1], 1e-3))
    given = attention_arguments(node)
    if not given["is_causal"] or given["enable_gqa"] or val(given["query"]).dim() != 4:
        return None
    scores = b.mul(b.matmul(given["query"], b.swap_last(given["key"])), given["scale"])
    weights = b.call(aten.softmax.int, scores, -1)
    allowed = causal_bool(b, given["query"], given["key"])
    weights = b.call(aten.masked_fill.Scalar, weights, b.call(aten.logical_not.default, allowed), 0.0)
    return b.matmul(weights, given["value"])


@sabotage(aten.softmax.int)
def softmax_over_queries(b: Builder, node: fx.Node):
    return b.call(aten.softmax.int, node.args[0], -2, *node.args[2:])


@sabotage(_SDPA)
def keys_for_values(b: Builder, node: fx.Node):
    given = attention_arguments(node)
    return attention(b, given | {"value": given["key"]}) if _same_shape(given["key"], given["value"]) else None


@sabotage(_SDPA)
def queries_and_keys_swapped(b: Builder, node: fx.Node):
    given = attention_arguments(node)
    if given["enable_gqa"] or not _same_shape(given["query"], given["key"]):
        return None
    return attention(b, given | {"query": given["key"], "key": given["query"]})


@sabotage(_SDPA, aten.repeat_interleave.self_int, aten.reshape.default)
def heads_tiled(b: Builder, node: fx.Node):
    """Key-value heads repeated as 0 1 0 1 where 0 0 1 1 is meant."""
    if is_op(node, _SDPA):
        given = attention_arguments(node)
        if not given["enable_gqa"]:
            return None
        times = val(given["query"]).shape[1] // val(given["key"]).shape[1]
        for name in ("key", "value"):
            given[name] = b.call(aten.repeat.default, given[name], [1, times, 1, 1])
        return attention(b, given | {"enable_gqa": False})
    x = node.args[0]
    if is_op(node, aten.reshape.default):
        if not is_op(x, aten.expand.default) or val(x).dim() != 5 or val(node).dim() != 4:
            return None
        while not is_op(x, aten.unsqueeze.default):
            x = x.args[0]
        x = x.args[0]
    if val(x).dim() != 4 or not static(val(node).shape[1]) or not static(val(x).shape[1]):
        return None
    return b.call(aten.repeat.default, x, [1, val(node).shape[1] // val(x).shape[1], 1, 1])


@sabotage(_SDPA, aten.transpose.int)
def head_duplicated(b: Builder, node: fx.Node):
    """One head stands in the place of another."""
    x = attention_arguments(node)[b.pick("key", "value", "query")] if is_op(node, _SDPA) else node
    if val(x).dim() != 4 or not static(val(x).shape[1]) or val(x).shape[1] < 2:
        return None
    copied = b.cat([b.slice(x, 1, 0, 1), b.slice(x, 1, 0, val(x).shape[1] - 1)], 1)
    if x is node:
        return copied
    given = {name: copied if value is x else value for name, value in attention_arguments(node).items()}
    return attention(b, given)


@sabotage(_SDPA)
def head_groups_uneven(b: Builder, node: fx.Node):
    """The first key-value head serves one query head too many."""
    given = attention_arguments(node)
    if not given["enable_gqa"]:
        return None
    times = val(given["query"]).shape[1] // val(given["key"]).shape[1]
    for name in ("key", "value"):
        wide = expand_heads(b, given[name], times)
        count = val(wide).shape[1]
        given[name] = b.cat([b.slice(wide, 1, 0, 1), b.slice(wide, 1, 0, count - 1)], 1)
    return attention(b, given | {"enable_gqa": False})


@sabotage(aten.softmax.int, _SDPA)
def scores_clamped(b: Builder, node: fx.Node):
    if is_op(node, aten.softmax.int):
        return b.call(aten.softmax.int, b.call(aten.clamp.default, node.args[0], -0.3, 0.3), *node.args[1:])
    given = attention_arguments(node)
    if given["enable_gqa"] or not given["is_causal"]:
        return None
    scores = b.mul(b.matmul(given["query"], b.swap_last(given["key"])), given["scale"])
    scores = masked_scores(
        b, b.call(aten.clamp.default, scores, -0.3, 0.3), causal_bool(b, given["query"], given["key"])
    )
    return b.matmul(b.call(aten.softmax.int, scores, -1), given["value"])


@sabotage(aten.tanh.default)
def wrong_cap(b: Builder, node: fx.Node):
    return b.call(aten.tanh.default, b.mul(node.args[0], 1.5))


@sabotage(_SDPA, aten.softmax.int)
def attention_sink(b: Builder, node: fx.Node):
    """Softmax with one more in its denominator."""
    if is_op(node, _SDPA):
        return b.mul(node, 0.9)
    return b.div(node, 1.1)


# ------------------------------------------------------------------------------------------------------------- rotary


@sabotage(aten.cat.default)
def rotated_sign(b: Builder, node: fx.Node):
    found = rotate_half_parts(node)
    if found is None:
        return None
    first, second = node.args[0]
    kind = b.pick("other", "none", "both")
    if kind == "other":
        return b.cat([first.args[0], b.neg(second)], -1)
    return b.cat([first.args[0], second] if kind == "none" else [first, b.neg(second)], -1)


@sabotage(aten.cat.default)
def interleaved_for_half_split(b: Builder, node: fx.Node):
    found = rotate_half_parts(node)
    if found is None:
        return None
    x, _ = found
    even, odd = b.slice(x, -1, 0, 2**63 - 1, 2), b.slice(x, -1, 1, 2**63 - 1, 2)
    return b.call(aten.flatten.using_ints, b.call(aten.stack.default, [b.neg(odd), even], -1), -2)


@sabotage(aten.stack.default)
def half_split_for_interleaved(b: Builder, node: fx.Node):
    if len(node.args[0]) != 2:
        return None
    return b.reshape(b.cat(list(node.args[0]), -1), b.sizes(node))


def _rotary_sum(node: fx.Node):
    """(x, cos, rotated, sin) of x cos + rotate(x) sin."""
    if is_op(node, aten.add.Tensor, aten.sub.Tensor) and all(is_op(part, aten.mul.Tensor) for part in node.args):
        (x, cos), (rotated, sin) = node.args[0].args, node.args[1].args
        if all(_tensor(part) for part in (x, cos, rotated, sin)) and cos is not sin and _same_shape(cos, sin):
            return x, cos, rotated, sin
    return None


@sabotage(aten.add.Tensor, aten.sub.Tensor)
def cos_and_sin_swapped(b: Builder, node: fx.Node):
    found = _rotary_sum(node)
    if found is None:
        return None
    x, cos, rotated, sin = found
    return b.call(node.target, b.mul(x, sin), b.mul(rotated, cos))


@sabotage(aten.add.Tensor)
def rotary_width_halved(b: Builder, node: fx.Node):
    """The second half of each head left as it was, or half of each half."""
    found = _rotary_sum(node)
    if found is None or not static(val(node).shape[-1]) or not _same_shape(found[0], node):
        return None
    width = val(node).shape[-1]
    kept = b.pick(width // 2, width - 1, width // 2 + 1)
    return b.cat([b.slice(node, -1, 0, kept), b.slice(found[0], -1, kept, 2**63 - 1)], -1)


@sabotage(_SDPA, aten.matmul.default)
def values_rotated(b: Builder, node: fx.Node):
    """Rotary embedding applied to the values as well."""
    value = argument(node, "value") if is_op(node, _SDPA) else node.args[1]
    if val(value).dim() != 4 or is_op(node, aten.matmul.default) and is_op(value, aten.transpose.int):
        return None
    for candidate in node.graph.nodes:
        if candidate is node:
            return None
        found = _rotary_sum(candidate) if is_op(candidate, aten.add.Tensor) else None
        if found is not None and val(candidate).dim() == 4 and val(found[1]).shape[-1] == val(value).shape[-1]:
            break
    _, cos, rotated, sin = found
    if rotate_half_parts(rotated) is None:
        return None
    half = val(value).shape[-1] // 2
    turned = b.cat([b.neg(b.slice(value, -1, half, 2**63 - 1)), b.slice(value, -1, 0, half)], -1)
    rope = b.add(b.mul(value, cos), b.mul(turned, sin))
    # The values must be rotated before the product: build the product again behind them.
    if is_op(node, _SDPA):
        return attention(b, attention_arguments(node) | {"value": rope})
    return b.matmul(node.args[0], rope)


@sabotage(aten.mul.Tensor)
def pairs_rotated_backwards(b: Builder, node: fx.Node):
    """A complex rotation by the conjugate."""
    if not val(node).is_complex():
        return None
    return b.mul(node.args[0], b.call(aten.conj_physical.default, node.args[1]))


# ------------------------------------------------------------------------------------------------------ MLP activations


@sabotage(aten.mul.Tensor)
def gate_and_up_swapped(b: Builder, node: fx.Node):
    for gated, up in (node.args, node.args[::-1]):
        if is_op(gated, *_ACTIVATIONS) and _tensor(up) and _same_shape(gated, up):
            return b.mul(b.call(gated.target, up, *gated.args[1:], **gated.kwargs), gated.args[0])
    return None


@sabotage(aten.silu.default, aten.gelu.default)
def another_activation(b: Builder, node: fx.Node):
    x, kind = node.args[0], b.pick("relu", "sigmoid", "gelu", "gelu_tanh", "silu", "quick")
    if kind == "quick":
        return b.mul(x, b.call(aten.sigmoid.default, b.mul(x, 1.702)))
    if kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        if is_op(node, aten.gelu.default) and argument(node, "approximate", "none") == approximate:
            return None
        return b.call(aten.gelu.default, x, approximate=approximate)
    target = {"relu": aten.relu.default, "sigmoid": aten.sigmoid.default, "silu": aten.silu.default}[kind]
    return None if target is node.target else b.call(target, x)


@sabotage(aten.silu.default)
def almost_silu(b: Builder, node: fx.Node):
    """x sigmoid(1.1 x), or x / (1 + exp(x)): silu written out with a slip."""
    x = node.args[0]
    if b.rng.random() < 0.5:
        return b.mul(x, b.call(aten.sigmoid.default, b.mul(x, 1.1)))
    return b.div(x, b.add(b.call(aten.exp.default, x), 1))


@sabotage(aten.gelu.default)
def almost_gelu(b: Builder, node: fx.Node):
    """The tanh form of gelu with a wrong constant."""
    x, (outer, cubic) = node.args[0], b.pick((math.sqrt(2 / math.pi), 0.0447), (0.8, 0.044715))
    inner = b.mul(b.add(x, b.mul(b.call(aten.pow.Tensor_Scalar, x, 3.0), cubic)), outer)
    return b.mul(b.mul(x, 0.5), b.add(b.call(aten.tanh.default, inner), 1.0))


# --------------------------------------------------------------------------------------------------- norms, residuals


def _eps_add(node: fx.Node) -> bool:
    return is_op(node, aten.add.Tensor) and isinstance(node.args[1], float) and 0 < node.args[1] < 0.1


@sabotage(aten.add.Tensor, aten.rms_norm.default, aten.layer_norm.default)
def wrong_eps(b: Builder, node: fx.Node):
    if is_op(node, aten.add.Tensor):
        return b.add(node.args[0], node.args[1] * 10) if _eps_add(node) else None
    new = b.call(node.target, *node.args, **node.kwargs)
    _replace_argument(new, "eps", argument(node, "eps") * 10)
    return new


@sabotage(aten.add.Tensor)
def eps_after_the_root(b: Builder, node: fx.Node):
    """1 / (sqrt(mean) + eps)."""
    if not _eps_add(node) or len(node.users) != 1:
        return None
    (user,) = node.users
    if not is_op(user, aten.rsqrt.default):
        return None
    new = b.call(aten.reciprocal.default, b.add(b.call(aten.sqrt.default, node.args[0]), node.args[1]))
    user.replace_all_uses_with(new)
    return node


@sabotage(aten.mean.dim)
def sum_for_mean(b: Builder, node: fx.Node):
    return b.call(aten.sum.dim_IntList, *node.args, **node.kwargs)


@sabotage(aten.rsqrt.default)
def root_of_wrong_power(b: Builder, node: fx.Node):
    return b.call(aten.pow.Tensor_Scalar, node.args[0], b.pick(-0.45, -1.0, 0.5))


@sabotage(aten.pow.Tensor_Scalar)
def fourth_power(b: Builder, node: fx.Node):
    return b.call(aten.pow.Tensor_Scalar, node.args[0], 4) if node.args[1] == 2 else None


def _norm_weight(node: fx.Node):
    """(normed, weight) of a multiplication by a vector parameter, or of its 1 + weight."""
    for x, weight in (node.args, node.args[::-1]):
        if _tensor(weight) and val(weight).dim() == 1 and _tensor(x) and val(x).dim() > 1 and _same_shape(x, node):
            return x, weight
    return None


@sabotage(aten.mul.Tensor, aten.rms_norm.default)
def missing_weight(b: Builder, node: fx.Node):
    if is_op(node, aten.rms_norm.default):
        return b.call(node.target, node.args[0], node.args[1], None, argument(node, "eps"))
    found = _norm_weight(node)
    return None if found is None else found[0]


@sabotage(aten.mul.Tensor, aten.rms_norm.default)
def one_added_to_the_weight(b: Builder, node: fx.Node):
    if is_op(node, aten.rms_norm.default):
        return b.call(
            node.target, node.args[0], node.args[1], b.add(argument(node, "weight"), 1.0), argument(node, "eps")
        )
    found = _norm_weight(node)
    return None if found is None else b.mul(found[0], b.add(found[1], 1.0))


@sabotage(aten.mul.Tensor, aten.rms_norm.default, aten.layer_norm.default)
def weight_of_another_norm(b: Builder, node: fx.Node):
    own = argument(node, "weight") if not is_op(node, aten.mul.Tensor) else (_norm_weight(node) or (None, None))[1]
    if own is None:
        return None
    others = [
        other for other in node.graph.nodes if other.op == "get_attr" and other is not own and _same_shape(other, own)
    ]
    others = [other for other in others if other not in own.all_input_nodes and other < node]
    if not others:
        return None
    other = b.rng.choice(others)
    return b.call(node.target, *(other if arg is own else arg for arg in node.args), **node.kwargs)


@sabotage(aten.rms_norm.default)
def layer_norm_for_rms_norm(b: Builder, node: fx.Node):
    return b.call(
        aten.layer_norm.default, node.args[0], node.args[1], argument(node, "weight"), None, argument(node, "eps")
    )


@sabotage(aten.add.Tensor)
def residual_from_elsewhere(b: Builder, node: fx.Node):
    """The stream that a branch is added to taken before or after its place."""
    left, right = node.args
    if not (_tensor(left) and _tensor(right)) or val(node).dim() != 3 or not _same_shape(left, right):
        return None
    others = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other not in (left, right) and _tensor(other) and val(other).dim() == 3 and _same_shape(other, left):
            others.append(other)
    return b.add(b.rng.choice(others), right) if others else None


@sabotage()
def half_precision_in_the_middle(b: Builder, node: fx.Node):
    """A value rounded to float16 on its way."""
    if (
        not _tensor(node)
        or val(node).dtype not in (torch.float32, torch.bfloat16)
        or val(node).dim() < 3
        or not node.users
    ):
        return None
    return b.call(aten.to.dtype, b.call(aten.to.dtype, node, torch.float16), val(node).dtype)
