"""Mutators that keep the function of a region graph in real arithmetic: other spellings of the same thing."""

import math
import random

import torch
from builder import (
    Builder,
    Mutator,
    argument,
    aten,
    attention,
    attention_arguments,
    causal_additive,
    causal_bool,
    dim_of,
    expand_heads,
    is_op,
    masked_scores,
    register,
    static,
    val,
)
from torch import fx

PRESERVING: dict[str, Mutator] = {}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def preserving(*targets):
    return register(PRESERVING, *targets)


def _tensor(node) -> bool:
    return isinstance(node, fx.Node) and isinstance(val(node), torch.Tensor)


def _float_tensor(node) -> bool:
    return _tensor(node) and val(node).dtype in _FLOATS


# ------------------------------------------------------------------------------------------------- the order of things


@preserving(aten.add.Tensor, aten.mul.Tensor)
def commute(b: Builder, node: fx.Node):
    left, right = node.args
    if not (_tensor(left) and _tensor(right)) or node.kwargs or left is right:
        return None
    return b.call(node.target, right, left)


def reorder(graph: fx.Graph, rng: random.Random) -> bool:
    """Another topological order: of the nodes that could come next, a random one comes next."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    before = list(graph.nodes)
    waiting = {node: len(set(node.all_input_nodes)) for node in graph.nodes if node.op not in ("placeholder", "output")}
    ready = [node for node, count in waiting.items() if count == 0]
    order, placed = list(placeholders), set()
    pending = list(placeholders)
    while pending or ready:
        if pending:
            node = pending.pop()
        else:
            node = ready.pop(rng.randrange(len(ready)))
            order.append(node)
        placed.add(node)
        for user in node.users:
            if user in waiting:
                waiting[user] -= 1
                if waiting[user] == 0:
                    ready.append(user)
    last = order[0]
    for node in order[1:]:
        last.append(node)
        last = node
    last.append(output)
    return list(graph.nodes) != before


PRESERVING["reorder"] = reorder


@preserving()
def duplicate(b: Builder, node: fx.Node):
    """Compute a value that has several users once more for one of them."""
    if len(node.users) < 2 or not _tensor(node):
        return None
    user = b.pick(*node.users)
    user.replace_input_with(node, b.call(node.target, *node.args, **node.kwargs))
    return node


@preserving(aten.mul.Tensor)
def reassociate(b: Builder, node: fx.Node):
    """(x r) w = x (r w) where r and w are each smaller than x."""
    inner, outer = node.args
    if not (is_op(inner, aten.mul.Tensor) and _tensor(outer) and len(inner.users) == 1):
        return None
    x, r = inner.args
    if not (_tensor(x) and _tensor(r)) or val(x).dim() != val(inner).dim() or val(r).shape[-1] != 1:
        return None
    return b.mul(x, b.mul(r, outer))


# -------------------------------------------------------------------------------------------------------- identities


def _any_float(b: Builder, node: fx.Node) -> bool:
    return _float_tensor(node) and len(node.users) > 0 and val(node).dim() > 0


@preserving()
def extra_copy(b: Builder, node: fx.Node):
    if not _any_float(b, node):
        return None
    return b.call(b.pick(aten.contiguous.default, aten.clone.default), node)


@preserving()
def extra_view(b: Builder, node: fx.Node):
    if not _any_float(b, node):
        return None
    rank, kind = (
        val(node).dim(),
        b.pick("view", "reshape", "transpose", "permute", "unsqueeze", "flatten", "slice", "expand"),
    )
    if kind == "view":
        return b.call(aten.view.default, node, b.sizes(node))
    if kind == "reshape":
        return b.reshape(node, b.sizes(node))
    if kind == "slice":
        return b.slice(node, b.rng.randrange(rank), 0, 2**63 - 1)
    if kind == "expand":
        return b.call(aten.expand.default, node, [-1] * rank)
    if kind == "unsqueeze":
        dim = b.rng.randrange(rank + 1)
        return b.call(aten.squeeze.dim, b.call(aten.unsqueeze.default, node, dim), dim)
    if rank < 2:
        return None
    if kind == "transpose":
        dims = b.rng.sample(range(rank), 2)
        return b.call(aten.transpose.int, b.call(aten.transpose.int, node, *dims), *reversed(dims))
    if kind == "permute":
        order = b.rng.sample(range(rank), rank)
        inverse = [order.index(dim) for dim in range(rank)]
        return b.call(aten.permute.default, b.call(aten.permute.default, node, order), inverse)
    return b.reshape(b.call(aten.flatten.using_ints, node, 0, 1), b.sizes(node))


@preserving()
def extra_identity(b: Builder, node: fx.Node):
    if not _any_float(b, node):
        return None
    kind = b.pick("to", "dropout", "neg", "alias")
    if kind == "to":
        return b.call(aten.to.dtype, node, val(node).dtype)
    if kind == "dropout":
        return b.call(aten.dropout.default, node, b.pick(0.0, 0.1), False)
    if kind == "alias":
        return b.call(aten.alias.default, node)
    return b.neg(b.neg(node))


# ------------------------------------------------------------------------------------------- slices, layouts, products


@preserving(aten.slice.Tensor)
def slice_spelling(b: Builder, node: fx.Node):
    """slice as narrow, chunk, split or select of a range, where the dimension is static."""
    x, dim = node.args[0], dim_of(node)
    size, step = val(x).shape[dim], argument(node, "step", 1)
    start, end = argument(node, "start", 0), argument(node, "end", 2**63 - 1)
    if not (static(size) and static(start) and static(end)) or step != 1:
        return None
    start, end, _ = slice(start, end).indices(size)
    kind = b.pick("narrow", "split", "chunk", "index", "slice")
    if kind == "narrow":
        return b.call(aten.narrow.default, x, dim, start, end - start)
    if kind == "split":
        parts = [length for length in (start, end - start, size - end) if length]
        whole = b.call(aten.split_with_sizes.default, x, parts, dim)
        return b.item(whole, 1 if start else 0)
    if kind == "chunk":
        length = end - start
        if size % length or start % length or length == size:
            return None
        if b.rng.random() < 0.5:
            return b.item(b.call(aten.chunk.default, x, size // length, dim), start // length)
        return b.item(b.call(aten.split.Tensor, x, length, dim), start // length)
    if kind == "index":
        return b.call(aten.index_select.default, x, dim, b.call(aten.arange.start, start, end))
    return b.slice(x, dim - val(x).dim(), start, end - size if end < size else 2**63 - 1)


@preserving()
def split_as_slice(b: Builder, node: fx.Node):
    """One part of a chunk or split as a slice, or chunk and split exchanged."""
    import operator

    if not (
        is_op(node, operator.getitem)
        and is_op(node.args[0], aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
    ):
        return None
    source, index = node.args
    dim, x = dim_of(source), source.args[0]
    lengths = [part.shape[dim] for part in val(source)]
    if not all(static(length) for length in lengths):
        return None
    if b.rng.random() < 0.3:
        return b.item(b.call(aten.split_with_sizes.default, x, lengths, dim), index)
    start = sum(lengths[:index])
    if b.rng.random() < 0.3:
        return b.call(aten.narrow.default, x, dim, start, lengths[index])
    return b.slice(x, dim, start, start + lengths[index])


@preserving(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int
)
def view_spelling(b: Builder, node: fx.Node):
    if b.rng.random() < 0.5 and node.target is not aten.reshape.default:
        return b.reshape(node.args[0], b.sizes(node))
    return b.call(aten.view.default, b.call(aten.contiguous.default, node.args[0]), b.sizes(node))


@preserving(aten.transpose.int, aten.permute.default, aten.t.default)
def transpose_spelling(b: Builder, node: fx.Node):
    x = node.args[0]
    rank = val(x).dim()
    order = list(range(rank))
    if is_op(node, aten.permute.default):
        order = [dim % rank for dim in node.args[1]]
    elif rank >= 2:
        first, second = (dim % rank for dim in node.args[1:3]) if is_op(node, aten.transpose.int) else (0, 1)
        order[first], order[second] = second, first
    moved = [dim for dim in range(rank) if order[dim] != dim]
    if len(moved) == 2 and b.rng.random() < 0.5:
        first, second = b.rng.sample(moved, 2)
        return b.call(aten.transpose.int, x, first - b.pick(0, rank), second)
    if len(moved) == 2 and b.rng.random() < 0.5:
        return b.call(aten.swapaxes.default, x, *moved) if hasattr(aten, "swapaxes") else None
    return b.call(aten.permute.default, x, order)


@preserving(aten.unsqueeze.default, aten.squeeze.dim)
def unsqueeze_spelling(b: Builder, node: fx.Node):
    x, rank = node.args[0], val(node).dim()
    if is_op(node, aten.unsqueeze.default) and b.rng.random() < 0.5:
        dim = node.args[1] % rank
        return b.call(aten.unsqueeze.default, x, dim - rank if node.args[1] >= 0 else dim)
    return b.reshape(x, b.sizes(node))


@preserving(aten.linear.default)
def linear_spelling(b: Builder, node: fx.Node):
    x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
    width_out, width_in = val(weight).shape
    kind = b.pick("matmul", "addmm", "einsum", "linear_add", "linear_3d")
    if kind == "matmul":
        out = b.matmul(x, b.call(aten.t.default, weight) if b.rng.random() < 0.5 else b.swap_last(weight))
    elif kind == "addmm" and val(x).dim() == 3:
        flat, turned = (
            b.call(aten.view.default, b.call(aten.contiguous.default, x), [-1, width_in]),
            b.swap_last(weight),
        )
        if bias is not None:
            flat = b.call(aten.addmm.default, bias, flat, turned)
        else:
            flat = b.call(aten.mm.default, flat, turned)
        return b.call(aten.view.default, flat, [*b.sizes(x)[:-1], width_out])
    elif kind == "einsum" and val(x).dim() == 3:
        out = b.call(aten.einsum.default, b.pick("btd,od->bto", "...d,od->...o", "bsi,ei->bse"), [x, weight])
    elif kind == "linear_add" and bias is not None:
        out = b.call(aten.linear.default, x, weight)
    elif kind == "linear_3d" and val(x).dim() == 3:
        flat = b.call(aten.linear.default, b.reshape(x, [-1, width_in]), weight, *([bias] if bias is not None else []))
        return b.reshape(flat, [*b.sizes(x)[:-1], width_out])
    else:
        return None
    return out if bias is None else b.add(out, bias) if b.rng.random() < 0.5 else b.add(bias, out)


@preserving(aten.matmul.default)
def matmul_spelling(b: Builder, node: fx.Node):
    """A product of two 4-d tensors as einsum, or as bmm of views; a product with a transposed weight as linear."""
    left, right = node.args
    if val(right).dim() == 2 and is_op(right, aten.t.default, aten.transpose.int):
        return b.call(aten.linear.default, left, right.args[0])
    if val(left).dim() != 4 or val(right).dim() != 4:
        return None
    kind = b.pick("einsum", "bmm", "transposed")
    if kind == "einsum":
        if is_op(right, aten.transpose.int) and {dim % 4 for dim in right.args[1:]} == {2, 3}:
            return b.call(aten.einsum.default, b.pick("bhqd,bhkd->bhqk", "bhid,bhjd->bhij"), [left, right.args[0]])
        return b.call(aten.einsum.default, "bhqk,bhkd->bhqd", [left, right])
    if kind == "transposed":
        return b.swap_last(b.matmul(b.swap_last(right), b.swap_last(left)))
    batch, heads, rows, inner = b.sizes(left)
    columns = b.size(right, -1)
    flat_left, flat_right = b.reshape(left, [-1, rows, inner]), b.reshape(right, [-1, b.size(right, -2), columns])
    return b.reshape(b.call(aten.bmm.default, flat_left, flat_right), [batch, heads, rows, columns])


# --------------------------------------------------------------------------------------------------------- arithmetic


def _constant(node: fx.Node) -> float | None:
    return node.args[1] if len(node.args) == 2 and isinstance(node.args[1], int | float) and not node.kwargs else None


@preserving(aten.mul.Tensor, aten.div.Tensor)
def split_constant(b: Builder, node: fx.Node):
    constant = _constant(node)
    if constant is None or constant == 0 or not math.isfinite(constant) or not _float_tensor(node):
        return None
    x, scaled = node.args[0], is_op(node, aten.mul.Tensor)
    if b.rng.random() < 0.4:
        return b.div(x, 1.0 / constant) if scaled else b.mul(x, 1.0 / constant)
    part = b.pick(2.0, 0.5, 3.0, -1.5)
    first = b.mul(x, part) if b.rng.random() < 0.5 else b.div(x, 1.0 / part)
    return b.mul(first, (constant if scaled else 1.0 / constant) / part)


@preserving(aten.sub.Tensor, aten.add.Tensor, aten.neg.default)
def sign_spelling(b: Builder, node: fx.Node):
    """a - b = a + (-b); a + (-b) = a - b; -a = a * -1."""
    if is_op(node, aten.neg.default):
        return b.mul(node.args[0], -1) if _float_tensor(node) else None
    left, right = node.args
    if node.kwargs or not (_float_tensor(left) and _float_tensor(right)):
        return None
    if is_op(node, aten.sub.Tensor):
        return b.add(left, b.neg(right))
    return b.sub(left, right.args[0]) if is_op(right, aten.neg.default) else None


@preserving(aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor)
def square_spelling(b: Builder, node: fx.Node):
    x = node.args[0]
    if (
        is_op(node, aten.pow.Tensor_Scalar)
        and node.args[1] != 2
        or is_op(node, aten.mul.Tensor)
        and x is not node.args[1]
    ):
        return None
    others = {aten.pow.Tensor_Scalar: (x, 2), aten.square.default: (x,), aten.mul.Tensor: (x, x)}
    others.pop(node.target)
    target = b.pick(*others)
    return b.call(target, *others[target])


@preserving(aten.rsqrt.default)
def rsqrt_spelling(b: Builder, node: fx.Node):
    x, kind = node.args[0], b.pick("pow", "reciprocal", "one_over", "divide")
    if kind == "pow":
        return b.call(aten.pow.Tensor_Scalar, x, -0.5)
    root = b.call(aten.sqrt.default, x)
    if kind == "reciprocal":
        return b.call(aten.reciprocal.default, root)
    if kind == "one_over":
        return b.mul(b.call(aten.reciprocal.default, root), 1.0)
    (user, *more) = node.users
    if more or not is_op(user, aten.mul.Tensor) or not _tensor(user.args[0]) or user.args[0] is node:
        return None
    b.anchor = user
    user.replace_all_uses_with(b.div(user.args[0], root))
    return node


@preserving(aten.mean.dim)
def mean_spelling(b: Builder, node: fx.Node):
    x, dims, keep = node.args[0], node.args[1], argument(node, "keepdim", False)
    if node.kwargs.get("dtype") is not None or len(dims) != 1 or not static(val(x).shape[dims[0]]):
        return None
    count, kind = val(x).shape[dims[0]], b.pick("sum_div", "sum_mul", "keepdim", "dim")
    if kind == "keepdim" and keep:
        return b.call(aten.unsqueeze.default, b.call(aten.mean.dim, x, dims), dims[0])
    if kind == "dim":
        return b.call(aten.mean.dim, x, [dims[0] % val(x).dim() - (0 if dims[0] < 0 else val(x).dim())], keep)
    total = b.call(aten.sum.dim_IntList, x, dims, keep)
    return b.mul(total, 1.0 / count) if kind == "sum_mul" else b.div(total, count)


@preserving(aten.mul.Tensor)
def distribute_one(b: Builder, node: fx.Node):
    """x (1 + w) = x + x w."""
    for x, factor in (node.args, node.args[::-1]):
        if is_op(factor, aten.add.Tensor) and _constant(factor) == 1 and _tensor(x):
            product = b.mul(x, factor.args[0])
            return b.add(x, product) if b.rng.random() < 0.5 else b.add(product, x)
    return None


# -------------------------------------------------------------------------------------------------------------- norms


@preserving(aten.rms_norm.default, aten.layer_norm.default)
def norm_written_out(b: Builder, node: fx.Node):
    x, shape = node.args[0], node.args[1]
    weight, bias, eps = argument(node, "weight"), argument(node, "bias"), argument(node, "eps")
    if len(shape) != 1 or eps is None:
        return None
    if is_op(node, aten.layer_norm.default):
        x = b.sub(x, b.call(aten.mean.dim, x, [-1], True))
    squares = b.call(aten.pow.Tensor_Scalar, x, 2)
    scaled = b.mul(x, b.call(aten.rsqrt.default, b.add(b.call(aten.mean.dim, squares, [-1], True), eps)))
    if weight is not None:
        scaled = b.mul(weight, scaled) if b.rng.random() < 0.5 else b.mul(scaled, weight)
    return scaled if bias is None else b.add(scaled, bias)


# ------------------------------------------------------------------------------------------------------- activations


@preserving(aten.silu.default)
def silu_written_out(b: Builder, node: fx.Node):
    x = node.args[0]
    if b.rng.random() < 0.5:
        gate = b.call(aten.sigmoid.default, x)
        return b.mul(x, gate) if b.rng.random() < 0.5 else b.mul(gate, x)
    return b.div(x, b.add(b.call(aten.exp.default, b.neg(x)), 1))


@preserving(aten.gelu.default)
def gelu_written_out(b: Builder, node: fx.Node):
    x = node.args[0]
    half = b.mul(x, 0.5)
    if argument(node, "approximate", "none") == "tanh":
        cube = b.call(aten.pow.Tensor_Scalar, x, 3.0) if b.rng.random() < 0.5 else b.mul(b.mul(x, x), x)
        inner = b.mul(b.add(x, b.mul(cube, 0.044715)), math.sqrt(2.0 / math.pi))
        return b.mul(half, b.add(b.call(aten.tanh.default, inner), 1.0))
    inner = b.call(aten.erf.default, b.div(x, math.sqrt(2.0)) if b.rng.random() < 0.5 else b.mul(x, math.sqrt(0.5)))
    return b.mul(half, b.add(inner, 1.0))


# ------------------------------------------------------------------------------------------------------------- rotary


def rotate_half_parts(node: fx.Node):
    """(x, half) where node = cat([-x[half:], x[:half]], -1), else None."""
    import operator

    if not is_op(node, aten.cat.default) or dim_of_cat(node) != val(node).dim() - 1 or len(node.args[0]) != 2:
        return None
    negated, plain = node.args[0]
    if not is_op(negated, aten.neg.default):
        return None

    def part(piece):
        if is_op(piece, aten.slice.Tensor) and argument(piece, "step", 1) == 1:
            start, _, _ = slice(argument(piece, "start", 0), argument(piece, "end", 2**63 - 1)).indices(
                val(piece.args[0]).shape[-1]
            )
            return (piece.args[0], start) if dim_of(piece) == val(piece).dim() - 1 else None
        if is_op(piece, operator.getitem) and is_op(piece.args[0], aten.chunk.default, aten.split.Tensor):
            source = piece.args[0]
            return (source.args[0], sum(p.shape[-1] for p in val(source)[: piece.args[1]]))
        return None

    first, second = part(plain), part(negated.args[0])
    if first is None or second is None or first[0] is not second[0]:
        return None
    x, half = first[0], val(plain).shape[-1]
    if first[1] != 0 or second[1] != half or 2 * half != val(x).shape[-1]:
        return None
    return x, half


def dim_of_cat(node: fx.Node) -> int:
    return (node.args[1] if len(node.args) > 1 else 0) % val(node).dim()


@preserving(aten.cat.default)
def rotate_half_spelling(b: Builder, node: fx.Node):
    found = rotate_half_parts(node)
    if found is None:
        return None
    x, half = found
    kind = b.pick("chunk", "roll", "index", "slices", "negate_after", "stack")
    if kind == "chunk":
        parts = b.call(aten.chunk.default, x, 2, -1)
        return b.cat([b.neg(b.item(parts, 1)), b.item(parts, 0)], -1)
    if kind == "stack":
        parts = b.call(aten.split.Tensor, x, half, -1)
        stacked = b.call(aten.stack.default, [b.neg(b.item(parts, 1)), b.item(parts, 0)], -2)
        return b.call(aten.flatten.using_ints, stacked, -2)
    if kind == "slices":
        return b.cat([b.call(aten.neg.default, b.slice(x, -1, half, 2 * half)), b.slice(x, -1, 0, half)], -1)
    ones = b.call(aten.ones.default, [half], dtype=val(x).dtype)
    if kind == "negate_after":
        swapped = b.cat([b.slice(x, -1, half, 2**63 - 1), b.slice(x, -1, 0, half)], -1)
    elif kind == "roll":
        swapped = b.call(aten.roll.default, x, [half], [-1])
    else:
        index = b.call(aten.remainder.Scalar, b.add(b.call(aten.arange.default, 2 * half), half), 2 * half)
        swapped = b.call(aten.index_select.default, x, -1, index)
    return b.mul(swapped, b.cat([b.neg(ones), ones], 0))


@preserving(aten.add.Tensor)
def rotary_by_halves(b: Builder, node: fx.Node):
    """x cos + rotate(x) sin = cat(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2)."""
    for straight, turned in (node.args, node.args[::-1]):
        if not (is_op(straight, aten.mul.Tensor) and is_op(turned, aten.mul.Tensor)):
            continue
        for rotated, sin in (turned.args, turned.args[::-1]):
            found = rotate_half_parts(rotated) if isinstance(rotated, fx.Node) else None
            if found is None or found[0] not in straight.args:
                continue
            x, half = found
            cos = next((other for other in straight.args if other is not x), x)
            if val(cos).shape[-1] != 2 * half or val(sin).shape[-1] != 2 * half:
                continue
            (x1, x2), (c1, c2), (s1, s2) = (
                [b.slice(t, -1, 0, half), b.slice(t, -1, half, 2**63 - 1)] for t in (x, cos, sin)
            )
            return b.cat([b.sub(b.mul(x1, c1), b.mul(x2, s1)), b.add(b.mul(x2, c2), b.mul(x1, s2))], -1)
    return None


# ---------------------------------------------------------------------------------------------------------- attention


@preserving(aten.scaled_dot_product_attention.default)
def attention_expanded(b: Builder, node: fx.Node):
    """enable_gqa=True as keys and values repeated for every query head."""
    given = attention_arguments(node)
    if not given["enable_gqa"]:
        return None
    times = val(given["query"]).shape[1] // val(given["key"]).shape[1]
    for name in ("key", "value"):
        given[name] = expand_heads(b, given[name], times)
    return attention(b, given | {"enable_gqa": False})


@preserving(aten.repeat_interleave.self_int, aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def heads_spelling(b: Builder, node: fx.Node):
    """repeat_interleave, or unsqueeze + expand + reshape, over the heads in another spelling."""
    if is_op(node, aten.repeat_interleave.self_int):
        x, times = node.args[0], node.args[1]
        if val(node).dim() != 4 or argument(node, "dim") is None or dim_of(node) != 1 or not isinstance(times, int):
            return None
        return expand_heads(b, x, times)
    wide = node.args[0]
    if is_op(wide, aten.clone.default, aten.contiguous.default):
        wide = wide.args[0]
    if val(node).dim() != 4 or not is_op(wide, aten.expand.default) or val(wide).dim() != 5:
        return None
    narrow = wide.args[0]
    if not is_op(narrow, aten.slice.Tensor, aten.unsqueeze.default):
        return None
    while is_op(narrow, aten.slice.Tensor):
        narrow = narrow.args[0]
    if not is_op(narrow, aten.unsqueeze.default) or narrow.args[1] % 5 != 2 or val(narrow.args[0]).dim() != 4:
        return None
    x, times = narrow.args[0], val(wide).shape[2]
    if not static(times) or not static(val(x).shape[1]) or val(node).shape[1] != val(x).shape[1] * times:
        return None
    return expand_heads(b, x, times)


@preserving(aten.scaled_dot_product_attention.default)
def attention_mask_spelling(b: Builder, node: fx.Node):
    """is_causal=True as a mask."""
    given = attention_arguments(node)
    if not given["is_causal"] or given["attn_mask"] is not None:
        return None
    make = b.pick(causal_bool, causal_additive)
    mask = make(b, given["query"], given["key"])
    for _ in range(b.pick(0, 2)):
        mask = b.call(aten.unsqueeze.default, mask, 0)
    return attention(b, given | {"attn_mask": mask, "is_causal": False})


@preserving(aten.scaled_dot_product_attention.default)
def attention_scale(b: Builder, node: fx.Node):
    """Part of the scale multiplied into the queries or keys."""
    given = attention_arguments(node)
    part = b.pick(2.0, 0.25, given["scale"], given["scale"] ** 0.5)
    name = b.pick("query", "key")
    given[name] = b.mul(given[name], part) if b.rng.random() < 0.5 else b.div(given[name], 1.0 / part)
    return attention(b, given | {"scale": given["scale"] / part})


@preserving(aten.scaled_dot_product_attention.default)
def attention_written_out(b: Builder, node: fx.Node):
    given = attention_arguments(node)
    query, key, value, scale = given["query"], given["key"], given["value"], given["scale"]
    if val(query).dim() != 4 or (given["dropout_p"] or 0.0) > 0:
        return None
    if given["enable_gqa"]:
        times = val(query).shape[1] // val(key).shape[1]
        key, value = expand_heads(b, key, times), expand_heads(b, value, times)
    place = b.pick("query", "key", "scores", "divide", "both")
    if place in ("query", "both"):
        query = b.mul(query, scale if place == "query" else math.sqrt(scale))
    if place in ("key", "both"):
        key = b.mul(key, scale if place == "key" else math.sqrt(scale))
    scores = b.matmul(query, b.swap_last(key))
    if place in ("scores", "divide"):
        scores = b.mul(scores, scale) if place == "scores" else b.div(scores, 1.0 / scale)
    mask = given["attn_mask"]
    if given["is_causal"]:
        if b.rng.random() < 0.5:
            scores = masked_scores(b, scores, causal_bool(b, query, key))
        else:
            scores = b.add(scores, causal_additive(b, query, key))
    elif mask is not None:
        scores = masked_scores(b, scores, mask) if val(mask).dtype == torch.bool else b.add(scores, mask)
    if b.rng.random() < 0.5:
        probabilities = b.call(aten.softmax.int, scores, b.pick(-1, 3), torch.float32)
        probabilities = b.call(aten.to.dtype, probabilities, val(query).dtype)
    else:
        probabilities = b.call(aten.softmax.int, scores, b.pick(-1, 3))
    if b.rng.random() < 0.3:
        probabilities = b.call(aten.dropout.default, probabilities, 0.0, False)
    return b.matmul(probabilities, value)


def written_out_parts(node: fx.Node):
    """(query, key, value, mask or None, scale) where node = matmul(softmax(query key' scale + mask), value), else None."""
    if not is_op(node, aten.matmul.default) or val(node).dim() != 4:
        return None
    softmax, value = node.args
    while is_op(softmax, aten.to.dtype, aten.dropout.default):
        softmax = softmax.args[0]
    if not is_op(softmax, aten.softmax.int) or softmax.args[1] % 4 != 3:
        return None
    scores, mask, scale = softmax.args[0], None, 1.0
    if is_op(scores, aten.add.Tensor) and _tensor(scores.args[1]):
        scores, mask = scores.args
    if is_op(scores, aten.mul.Tensor, aten.div.Tensor) and _constant(scores) is not None:
        scale = scores.args[1] if is_op(scores, aten.mul.Tensor) else 1.0 / scores.args[1]
        scores = scores.args[0]
    if not is_op(scores, aten.matmul.default) or not is_op(scores.args[1], aten.transpose.int):
        return None
    if {dim % 4 for dim in scores.args[1].args[1:]} != {2, 3}:
        return None
    return scores.args[0], scores.args[1].args[0], value, mask, scale


@preserving(aten.matmul.default)
def attention_fused(b: Builder, node: fx.Node):
    """Written-out attention as scaled_dot_product_attention."""
    found = written_out_parts(node)
    if found is None:
        return None
    query, key, value, mask, scale = found
    if len({val(t).dtype for t in (query, key, value, *([mask] if mask is not None else []))}) > 1:
        return None
    given = dict(
        query=query, key=key, value=value, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale, enable_gqa=False
    )
    return attention(b, given)


@preserving(aten.matmul.default)
def scale_placement(b: Builder, node: fx.Node):
    """(q k') c = (q c) k' = q (k c)' = (q sqrt c) (k sqrt c)'."""
    users = list(node.users)
    if len(users) != 1 or not is_op(users[0], aten.mul.Tensor, aten.div.Tensor) or _constant(users[0]) is None:
        return None
    user, (left, right) = users[0], node.args
    scale = _constant(user) if is_op(user, aten.mul.Tensor) else 1.0 / _constant(user)
    if val(left).dim() != 4 or scale <= 0:
        return None
    kind = b.pick("left", "right", "both")
    left = b.mul(left, scale if kind == "left" else math.sqrt(scale)) if kind != "right" else left
    right = b.mul(right, scale if kind == "right" else math.sqrt(scale)) if kind != "left" else right
    user.replace_all_uses_with(b.matmul(left, right))
    return node
