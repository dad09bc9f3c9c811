"""What mutators are written with: copies of a region graph, new nodes with true meta["val"], and the driver that picks a place."""

import functools
import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy to mutate; meta is copied, its FakeTensors are shared."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def val(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, fx.Node) else node


def is_op(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument called `name` of an ATen node, wherever it stands."""
    for position, described in enumerate(node.target._schema.arguments):
        if described.name == name:
            if not described.kwarg_only and position < len(node.args):
                return node.args[position]
            value = node.kwargs.get(name, described.default_value if described.has_default_value() else default)
            return default if value is None else value
    return default


def static(size: Any) -> bool:
    return isinstance(size, int)


def dim_of(node: fx.Node, name: str = "dim", default: int = 0) -> int:
    """The dimension argument, counted from the front."""
    rank = val(node.args[0]).dim() if isinstance(node.args[0], fx.Node) else val(node).dim()
    return argument(node, name, default) % rank


class Builder:
    """Makes nodes after `anchor`, in order, each with its meta["val"] from running the op on fake tensors."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node, rng: random.Random):
        self.graph, self.anchor, self.rng = graph, anchor, rng
        self.made: list[fx.Node] = []
        fakes = (node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), FakeTensor))
        self.mode = next(fakes).fake_mode

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_after(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: self.anchor.meta[key] for key in ("stack_trace",) if key in self.anchor.meta}
        self.anchor = node
        self.made.append(node)
        fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), val)
        env = self.mode.shape_env
        with self.mode, env.suppress_guards(), torch.no_grad():
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of a dimension: an int where static, else a node."""
        size = val(node).shape[dim]
        return size if static(size) else self.call(aten.sym_size.int, node, dim % val(node).dim())

    def sizes(self, node: fx.Node) -> list[Any]:
        return [self.size(node, dim) for dim in range(val(node).dim())]

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def add(self, a: Any, b: Any) -> fx.Node:
        return self.call(aten.add.Tensor, a, b)

    def sub(self, a: Any, b: Any) -> fx.Node:
        return self.call(aten.sub.Tensor, a, b)

    def mul(self, a: Any, b: Any) -> fx.Node:
        return self.call(aten.mul.Tensor, a, b)

    def div(self, a: Any, b: Any) -> fx.Node:
        return self.call(aten.div.Tensor, a, b)

    def neg(self, a: Any) -> fx.Node:
        return self.call(aten.neg.default, a)

    def cat(self, parts: list[fx.Node], dim: int) -> fx.Node:
        return self.call(aten.cat.default, parts, dim)

    def slice(self, a: fx.Node, dim: int, start: Any, end: Any, step: int = 1) -> fx.Node:
        return self.call(aten.slice.Tensor, a, dim, start, end, *([step] if step != 1 else []))

    def item(self, parts: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, parts, index)

    def matmul(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.call(aten.matmul.default, a, b)

    def reshape(self, a: fx.Node, shape: list[Any]) -> fx.Node:
        return self.call(aten.reshape.default, a, shape)

    def swap_last(self, a: fx.Node) -> fx.Node:
        """The last two dimensions exchanged, in one of the ways to write it."""
        rank = val(a).dim()
        order = [*range(rank - 2), rank - 1, rank - 2]
        if self.rng.random() < 0.3:
            return self.call(aten.permute.default, a, order)
        return self.call(aten.transpose.int, a, *self.pick((-1, -2), (-2, -1), (rank - 2, rank - 1)))


Build = Callable[[Builder, fx.Node], fx.Node | None]
Mutator = Callable[[fx.Graph, random.Random], bool]


def same_meaning(new: Any, old: Any) -> bool:
    """Whether two meta values agree: dtype and sizes."""
    if not isinstance(old, Tensor):
        return type(new) is type(old)
    if new.dtype != old.dtype or new.dim() != old.dim():
        return False
    return all(static(a) != static(b) or not static(a) or a == b for a, b in zip(new.shape, old.shape, strict=True))


def contiguous(node: fx.Node) -> bool:
    value = val(node)
    if not isinstance(value, Tensor):
        return False
    env = value.fake_mode.shape_env
    with env.suppress_guards():
        return value.is_contiguous()


def register(table: dict[str, Mutator], *targets: Any) -> Callable[[Build], Mutator]:
    """Put the decorated `build(b, node) -> replacement or None` into `table` as a mutator (graph, rng) -> applied somewhere.

    It is offered the call_function nodes of `targets` (of any target where none is given) in random order until it gives a
    replacement, which then takes over all uses of the node.
    """

    def decorate(build: Build) -> Mutator:
        @functools.wraps(build)
        def mutate(graph: fx.Graph, rng: random.Random) -> bool:
            nodes = [
                node for node in graph.nodes if node.op == "call_function" and (not targets or node.target in targets)
            ]
            rng.shuffle(nodes)
            for node in nodes:
                users = list(node.users)
                builder = Builder(graph, node, rng)
                new = build(builder, node)
                if new is None:
                    sweep(builder.made)
                    continue
                if new is not node:
                    assert same_meaning(val(new), val(node)), f"{build.__name__}: {val(new)} for {node.format_node()}"
                    if contiguous(node) and not contiguous(new):
                        new = builder.call(aten.contiguous.default, new)  # a later view may count on it
                    for user in users:
                        user.replace_input_with(node, new)
                sweep([*builder.made, node, *users])
                return True
            return False

        table[build.__name__] = mutate
        return mutate

    return decorate


def sweep(nodes: list[fx.Node]) -> None:
    """Erase those of `nodes` that nothing uses, and what only they used."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and not node._erased and not node.users:
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a scaled_dot_product_attention node by name, `scale` filled in."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    found = {name: argument(node, name) for name in names}
    if found["scale"] is None:
        found["scale"] = val(found["query"]).shape[-1] ** -0.5
    return found


def attention(b: Builder, given: dict[str, Any]) -> fx.Node:
    """A scaled_dot_product_attention node from arguments by name."""
    return b.call(
        aten.scaled_dot_product_attention.default,
        given["query"],
        given["key"],
        given["value"],
        given["attn_mask"],
        given["dropout_p"] or 0.0,
        bool(given["is_causal"]),
        scale=given["scale"],
        enable_gqa=bool(given["enable_gqa"]),
    )


def expand_heads(b: Builder, x: fx.Node, times: int, spelling: str | None = None) -> fx.Node:
    """x [B, G, S, K] with each head repeated `times` in place: [B, G * times, S, K]."""
    batch, groups, length, width = b.sizes(x)
    spelling = spelling or b.pick(*KV_SPELLINGS)
    if spelling == "repeat_interleave":
        return b.call(aten.repeat_interleave.self_int, x, times, 1)
    if spelling == "index_select":
        return b.call(aten.index_select.default, x, 1, head_index(b, groups, times))
    if spelling == "index":
        return b.call(aten.index.Tensor, x, [None, head_index(b, groups, times)])
    if spelling == "stack":
        wide = b.call(aten.stack.default, [x] * times, 2)
    elif spelling == "index_none":
        wide = b.call(aten.expand.default, b.call(aten.unsqueeze.default, x, -3), [batch, groups, times, length, width])
    else:
        unsqueezed = b.call(aten.unsqueeze.default, x, 2)
        if spelling == "expand":
            wide = b.call(aten.expand.default, unsqueezed, [-1, -1, times, -1, -1])
        elif spelling == "repeat":
            wide = b.call(aten.repeat.default, unsqueezed, [1, 1, times, 1, 1])
        else:
            wide = b.cat([unsqueezed] * times, 2)
    return b.reshape(wide, [batch, groups * times, length, width])


KV_SPELLINGS = ("repeat_interleave", "index_select", "index", "stack", "index_none", "expand", "repeat", "cat")


def head_index(b: Builder, groups: int, times: int) -> fx.Node:
    positions = b.call(aten.arange.default, groups * times)
    if b.rng.random() < 0.5:
        return b.call(aten.floor_divide.default, positions, times)
    return b.call(aten.div.Tensor_mode, positions, times, rounding_mode="floor")


def causal_bool(b: Builder, query: fx.Node, key: fx.Node, diagonal: int = 0, spelling: str | None = None) -> fx.Node:
    """bool [T, S], True where key <= query + diagonal."""
    rows, columns = b.size(query, -2), b.size(key, -2)
    spelling = spelling or b.pick("tril", "not_triu", "arange", "arange_less")
    if spelling == "tril":
        ones = b.call(aten.ones.default, [rows, columns], dtype=torch.bool)
        return b.call(aten.tril.default, ones, *([diagonal] if diagonal else []))
    if spelling == "not_triu":
        ones = b.call(aten.ones.default, [rows, columns], dtype=torch.bool)
        return b.call(aten.logical_not.default, b.call(aten.triu.default, ones, 1 + diagonal))
    q = b.call(aten.unsqueeze.default, b.call(aten.arange.default, rows), -1)
    k = b.call(aten.unsqueeze.default, b.call(aten.arange.default, columns), 0)
    if diagonal:
        q = b.add(q, diagonal)
    return b.call(aten.le.Tensor, k, q) if spelling == "arange" else b.call(aten.ge.Tensor, q, k)


def causal_additive(b: Builder, query: fx.Node, key: fx.Node, diagonal: int = 0) -> fx.Node:
    """float [T, S], zero where attention is allowed and -inf, or the dtype's lowest number, elsewhere."""
    dtype = val(query).dtype
    low = b.pick(float("-inf"), torch.finfo(dtype).min)
    if b.rng.random() < 0.5:
        full = b.call(aten.full.default, [b.size(query, -2), b.size(key, -2)], low, dtype=dtype)
        return b.call(aten.triu.default, full, 1 + diagonal)
    zeros = b.call(aten.zeros.default, [b.size(query, -2), b.size(key, -2)], dtype=dtype)
    forbidden = b.call(aten.logical_not.default, causal_bool(b, query, key, diagonal))
    return b.call(aten.masked_fill.Scalar, zeros, forbidden, low)


def masked_scores(b: Builder, scores: fx.Node, allowed: fx.Node) -> fx.Node:
    """Scores with -inf, or the lowest number, where `allowed` is False."""
    low = b.pick(float("-inf"), torch.finfo(val(scores).dtype).min)
    if b.rng.random() < 0.5:
        return b.call(aten.masked_fill.Scalar, scores, b.call(aten.logical_not.default, allowed), low)
    return b.call(aten.where.ScalarOther, allowed, scores, low)
