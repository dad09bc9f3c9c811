"""Parameters sharded over data ranks, gathered and reduced by nodes of the graph (Zhang et al. 2024, SimpleFSDP, arXiv:2411.00284, section 3).

    forward     w = wait(all_gather(shard)) ... y = f(w, x)              a shard goes in where the parameter went in
    backward    w = wait(all_gather(shard)) ... dshard = wait(reduce_scatter(dw))    gathered again, nothing is kept in between

The nodes are ordinary ones of the graph, so an order may run a gather of one microbatch under the compute of another. Rows of the first dim are divided,
as FSDP2 does: rank r holds rows r ceil(R/n) to (r + 1) ceil(R/n) - 1, filled up with zeros at the end. Parameters that are used one after the other
travel in one message, a *bucket*, the same in both graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ftc.errors import FtcError, nearest
from ftc.pipeline.merge_trace import Half, Slot, Traced

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
GATHERS = frozenset({c10d.all_gather_into_tensor.default, c10d.wait_tensor.default, aten.cat.default, aten.clone.default})  # for `merge.read_once`


@dataclass(frozen=True)
class Sharding:
    """`degree` ranks of the process group called `group`. A bucket holds parameters of up to `bucket_bytes` of what is sent for each rank.
    `store_dtype`: of the shards, where they are kept in another dtype than the graph computes in (cast before they are sent; a gradient is cast
    to it before it is reduced)."""

    group: str
    degree: int
    bucket_bytes: int = 32 * 2**20
    store_dtype: torch.dtype | None = None

    def __post_init__(self):
        if self.degree < 1 or self.bucket_bytes < 0:
            raise FtcError(f"degree {self.degree} must be at least 1 and bucket_bytes {self.bucket_bytes} at least 0 (0: every parameter alone)")

    def rows(self, size: int) -> int:
        """Rows of a rank's shard."""
        return -(-size // self.degree)


def shard_of(whole: Tensor, rank: int, degree: int) -> Tensor:
    """The rank's rows of a parameter [R, ...], filled up with zeros to ceil(R / degree); a copy. A scalar counts as one row."""
    rows = whole.detach().reshape(whole.shape or (1,))
    size = -(-rows.shape[0] // degree)
    shard = rows.new_zeros(size, *rows.shape[1:])
    own = rows[rank * size : (rank + 1) * size]
    shard[: own.shape[0]] = own
    return shard


def gather_parameters(traced: Traced, names: Collection[str], sharding: Sharding) -> Traced:
    """The two graphs with the parameters `names` as shards: Slot("shard", name) goes in, Slot("shard gradient", name) comes out, summed over ranks.

    Same bits as with whole parameters, gradients up to the order of the sum over ranks. FtcError for a name that the graphs have no parameter of.
    """
    held = {str(slot.key): node for slot, node in traced.forward.placeholders().items() if slot.kind == "parameter"}
    for name in names:
        if name not in held:
            raise FtcError(f"there is no parameter {name!r}; {nearest(name, held)}")
    buckets = _buckets(traced.forward, {name: held[name] for name in held if name in set(names)}, sharding)
    return replace(traced, forward=_gathered(traced.forward, buckets, sharding), backward=_gathered(traced.backward, buckets, sharding))


def _buckets(forward: Half, held: Mapping[str, fx.Node], sharding: Sharding) -> list[list[str]]:
    """Names in the order of their first use, cut where a bucket is full or the dtype changes."""
    place = {node: i for i, node in enumerate(forward.graph.nodes)}
    first = lambda node: min((place[user] for user in node.users), default=0)  # noqa: E731
    buckets: list[list[str]] = []
    size, dtype = 0, None
    for name in sorted(held, key=lambda name: (first(held[name]), name)):
        value = held[name].meta["val"]
        own = sharding.rows(value.shape[0] if value.dim() else 1) * (value[0].numel() if value.dim() else 1) * value.element_size()
        if not buckets or size + own > sharding.bucket_bytes or value.dtype != dtype:
            buckets.append([])
            size, dtype = 0, value.dtype
        buckets[-1].append(name)
        size += own
    return buckets


class _Editor:
    """Adds nodes at one place, with their values worked out on the meta device."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph

    def __call__(self, target, *args, **kwargs) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        meta = lambda n: torch.empty_strided(n.meta["val"].shape, n.meta["val"].stride(), dtype=n.meta["val"].dtype, device="meta")  # noqa: E731
        if target is c10d.all_gather_into_tensor.default:
            value = meta(args[0])
            node.meta["val"] = value.new_empty(args[1] * value.shape[0], *value.shape[1:])
        elif target is c10d.reduce_scatter_tensor.default:
            value = meta(args[0])
            node.meta["val"] = value.new_empty(value.shape[0] // args[2], *value.shape[1:])
        elif target is c10d.wait_tensor.default:
            node.meta["val"] = meta(args[0])
        else:
            node.meta["val"] = target(*fx.node.map_arg(args, meta), **kwargs)
        return node


def _gathered(half: Half, buckets: list[list[str]], sharding: Sharding) -> Half:
    new = half.copy()
    graph, edit = new.graph, _Editor(new.graph)
    old = {str(slot.key): node for slot, node in new.placeholders().items() if slot.kind == "parameter"}
    place = {node: i for i, node in enumerate(graph.nodes)}
    inputs = dict(zip(new.graph.find_nodes(op="placeholder"), new.inputs, strict=True))
    for bucket in buckets:
        used = [name for name in bucket if name in old]
        if not any(old[name].users for name in used):
            continue
        whole_values = {name: old[name].meta["val"] for name in used}
        first = min((user for name in used for user in old[name].users), key=place.__getitem__)
        shards = {}
        for name in used:
            with graph.inserting_before(old[name]):
                shards[name] = graph.placeholder(f"{old[name].name}_shard")
            shards[name].meta["val"] = _shard_value(whole_values[name], sharding)
            inputs[shards[name]] = Slot("shard", name)
        with graph.inserting_before(first):
            for name, value in _gather(edit, shards, whole_values, sharding).items():
                old[name].replace_all_uses_with(value)
    for name in (name for bucket in buckets for name in bucket if name in old):
        if inputs[old[name]].kind == "parameter" and not old[name].users:
            inputs.pop(old[name])
            graph.erase_node(old[name])
    outputs = _reduced(new, edit, buckets, sharding)
    graph.lint()
    return Half(graph, [inputs[node] for node in graph.find_nodes(op="placeholder")], outputs)


def _shard_value(whole: Tensor, sharding: Sharding) -> Tensor:
    shape = whole.shape or (1,)
    return torch.empty(sharding.rows(shape[0]), *shape[1:], dtype=sharding.store_dtype or whole.dtype, device="meta")


def _gather(edit: _Editor, shards: dict[str, fx.Node], wholes: dict[str, Tensor], sharding: Sharding) -> dict[str, fx.Node]:
    """The whole parameters of one bucket, from one message."""
    dtype = next(iter(wholes.values())).dtype
    parts = {name: shard if shard.meta["val"].dtype == dtype else edit(aten._to_copy.default, shard, dtype=dtype) for name, shard in shards.items()}
    flat = [edit(aten.view.default, part, [-1]) for part in parts.values()]
    message = flat[0] if len(flat) == 1 else edit(aten.cat.default, flat)
    gathered = edit(c10d.wait_tensor.default, edit(c10d.all_gather_into_tensor.default, message, sharding.degree, sharding.group))
    table = edit(aten.view.default, gathered, [sharding.degree, -1])
    found, offset = {}, 0
    for name, part in parts.items():
        size, shape = part.meta["val"].numel(), tuple(wholes[name].shape)
        rows = table
        if len(parts) > 1:
            rows = edit(aten.clone.default, edit(aten.slice.Tensor, table, 1, offset, offset + size), memory_format=torch.contiguous_format)
        whole = edit(aten.view.default, rows, [sharding.degree * part.meta["val"].shape[0], *part.meta["val"].shape[1:]])
        if shape[:1] != whole.meta["val"].shape[:1]:
            whole = edit(aten.slice.Tensor, whole, 0, 0, (shape or (1,))[0])
        found[name] = whole if shape else edit(aten.view.default, whole, [])
        offset += size
    return found


def _reduced(half: Half, edit: _Editor, buckets: list[list[str]], sharding: Sharding) -> list[Slot]:
    """Put the gradients' reductions at the end of each bucket's last gradient; returns what the graph gives out."""
    graph = half.graph
    output = next(iter(graph.find_nodes(op="output")))
    results = list(output.args[0])
    slots = list(half.outputs)
    number = {str(slot.key): i for i, slot in enumerate(slots) if slot.kind == "parameter gradient"}
    place = {node: i for i, node in enumerate(graph.nodes)}
    for bucket in buckets:
        wanted = [name for name in bucket if name in number and isinstance(results[number[name]], fx.Node)]
        if not wanted:
            continue
        last = max((results[number[name]] for name in wanted), key=place.__getitem__)
        before = last.next
        while before.op == "placeholder":
            before = before.next
        with graph.inserting_before(before):
            for name, value in _reduce(edit, {name: results[number[name]] for name in wanted}, sharding).items():
                results[number[name]] = value
                slots[number[name]] = Slot("shard gradient", name)
    output.args = (tuple(results),)
    return slots


def _reduce(edit: _Editor, grads: dict[str, fx.Node], sharding: Sharding) -> dict[str, fx.Node]:
    """This rank's rows of the sums over ranks, of one bucket, in one message."""
    n, tables, shapes = sharding.degree, [], {}
    for name, grad in grads.items():
        shape = tuple(grad.meta["val"].shape) or (1,)
        rows = sharding.rows(shape[0])
        if sharding.store_dtype not in (None, grad.meta["val"].dtype):
            grad = edit(aten._to_copy.default, grad, dtype=sharding.store_dtype)
        if not grad.meta["val"].is_contiguous():
            grad = edit(aten.clone.default, grad, memory_format=torch.contiguous_format)
        flat = edit(aten.view.default, grad, [-1])
        missing = (n * rows - shape[0]) * (flat.meta["val"].numel() // shape[0] if shape[0] else 0)
        flat = edit(aten.constant_pad_nd.default, flat, [0, missing]) if missing else flat
        tables.append(edit(aten.view.default, flat, [n, -1]))
        shapes[name] = (rows, *shape[1:])
    table = tables[0] if len(tables) == 1 else edit(aten.cat.default, tables, 1)
    message = edit(aten.view.default, table, [-1])
    own = edit(c10d.wait_tensor.default, edit(c10d.reduce_scatter_tensor.default, message, "sum", n, sharding.group))
    found, offset = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        found[name] = edit(aten.view.default, edit(aten.slice.Tensor, own, 0, offset, offset + size), list(shape))
        offset += size
    return found
