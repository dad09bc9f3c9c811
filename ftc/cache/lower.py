"""Cached attention of one token a sequence on the CPU, lowered for a compiled step: writing becomes plain indexing that the compiler fuses with what
comes before it, once for a step is worked out where, and reading one call of the compiled kernel."""

import torch
from torch import Tensor, fx

from ftc.dialect import fp8_latent
from ftc.dialect.library import LIBRARY
from ftc.kernels import cpu_decode
from ftc.rewrite.lockstep import arguments

aten, dialect = torch.ops.aten, torch.ops.ftc
PAGED, LATENT = dialect.paged_attention.default, dialect.paged_latent_attention.default

LIBRARY.define(
    "paged_decode(Tensor query, Tensor keys, Tensor values, Tensor block_table, Tensor first, Tensor last, *, float scale, float softcap, int value_width) -> Tensor"
)


def _decode(query, keys, values, block_table, first, last, *, scale, softcap, value_width):
    return cpu_decode.decode(query, keys, values, block_table, first, last, scale=scale, softcap=softcap or None, value_width=value_width)


def _fake(query, keys, values, block_table, first, last, *, scale, softcap, value_width):
    return query.new_empty(*query.shape[:3], value_width)


LIBRARY.impl("paged_decode", _decode, "CPU")
torch.library.register_fake("ftc::paged_decode", _fake)


def lower_decode(graph: fx.Graph, device: torch.device) -> int:
    """Lower every cached attention that the compiled kernel can do, in place; returns how many are left. Every sequence must have exactly one new token."""
    sites = [node for node in graph.nodes if node.target in (PAGED, LATENT)]
    if device.type != "cpu" or cpu_decode.library() is None:
        return max(len(sites), 1)
    done, where = 0, None
    for node in sites:
        if not _plain(node):
            continue
        with graph.inserting_before(node):
            bound = arguments(node)
            where = where or _place(graph, bound)
            new = (_heads if node.target is PAGED else _latent)(graph, bound, where)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        done += 1
    if done:
        graph.lint()
    return len(sites) - done


def _plain(node: fx.Node) -> bool:
    """Whether the kernel reads the caches: of the queries' dtype, or packed latents; and a latent attention is absorbed for one token."""
    bound = arguments(node)
    parts = [bound[name] for name in (("query", "key_cache", "value_cache") if node.target is PAGED else ("q_pe", "cache"))]
    absorbed = node.target is PAGED or bound.get("absorb_up_to", 0) >= 1
    query, *caches = (part.meta["val"].dtype for part in parts)
    stored = {query, torch.uint8} if node.target is LATENT else {query}
    return absorbed and query in (torch.float32, torch.bfloat16) and set(caches) <= stored


def _place(graph: fx.Graph, bound: dict) -> dict[str, fx.Node]:
    """Where each sequence's new token goes, worked out once for all layers: block, offset, and the end of what it sees."""
    call = graph.call_function
    cache = bound.get("key_cache", bound.get("cache"))
    size = int(cache.meta["val"].shape[1])
    last = call(aten.to.dtype, (call(aten.add.Tensor, (bound["cached"], 1)), torch.int64))
    at = call(aten.sub.Tensor, (last, 1))
    column = call(aten.floor_divide.default, (at, size))
    block = call(aten.squeeze.dim, (call(aten.gather.default, (bound["block_table"], 1, call(aten.unsqueeze.default, (column, 1)))), 1))
    block = call(aten.to.dtype, (block, torch.int64))
    return {"block": block, "offset": call(aten.remainder.Scalar, (at, size)), "last": last, "first": call(aten.zeros_like.default, (last,))}


def _first(graph: fx.Graph, where: dict[str, fx.Node], window: int | None) -> fx.Node:
    if window is None:
        return where["first"]
    begin = graph.call_function(aten.sub.Tensor, (where["last"], window))
    return graph.call_function(aten.clamp_min.default, (begin, 0))


def _write(graph: fx.Graph, where: dict[str, fx.Node], cache: fx.Node, rows: fx.Node) -> None:
    graph.call_function(aten.index_put_.default, (cache, [where["block"], where["offset"]], rows))


def _heads(graph: fx.Graph, bound: dict, where: dict[str, fx.Node]) -> fx.Node:
    call = graph.call_function
    for tokens, cache in (("key", "key_cache"), ("value", "value_cache")):
        _write(graph, where, bound[cache], call(aten.select.int, (bound[tokens], 2, 0)))
    given = (bound["query"], bound["key_cache"], bound["value_cache"], bound["block_table"], _first(graph, where, bound.get("window")), where["last"])
    return call(dialect.paged_decode.default, given, _named(bound, int(bound["value"].meta["val"].shape[3])))


def _named(bound: dict, value_width: int) -> dict:
    return {"scale": bound["scale"], "softcap": bound.get("softcap") or 0.0, "value_width": value_width}


def _latent(graph: fx.Graph, bound: dict, where: dict[str, fx.Node]) -> fx.Node:
    """The absorbed form: W_UK on the query's side, W_UV on the output's."""
    call, groups = graph.call_function, int(bound["groups"])
    nope, width = int(bound["q_nope"].meta["val"].shape[3]), int(bound["latent"].meta["val"].shape[2])
    parts = [call(aten.select.int, (bound[name], 1, 0)) for name in ("latent", "k_pe")]
    packed = bound["cache"].meta["val"].dtype == torch.uint8
    rows = call(fp8_latent.pack, tuple(parts)) if packed else call(aten.cat.default, (parts, -1))
    _write(graph, where, bound["cache"], rows)
    weights = call(aten.unflatten.int, (bound["kv_b"], 0, [groups, -1]))
    w_uk = call(aten.slice.Tensor, (weights, 1, 0, nope))
    w_uv = call(aten.slice.Tensor, (weights, 1, nope, 2**63 - 1))
    absorbed = call(_absorb, (bound["q_nope"], w_uk))
    query = call(aten.cat.default, ([absorbed, bound["q_pe"]], -1))
    keys = call(aten.unsqueeze.default, (bound["cache"], 2))
    values = keys if packed else call(aten.slice.Tensor, (keys, 3, 0, width))
    given = (query, keys, values, bound["block_table"], where["first"], where["last"])
    mixed = call(dialect.paged_decode.default, given, _named(bound, width))
    return call(_leave, (mixed, w_uv))


def _absorb(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    """q_nope [B, H, 1, N] by W_UK [G, N, L] of its head's group: [B, H, 1, L]."""
    batch, heads, _, nope = q_nope.shape
    groups = w_uk.shape[0]
    rows = q_nope.reshape(batch, groups, heads // groups, nope).transpose(0, 1).reshape(groups, -1, nope)
    return torch.bmm(rows, w_uk).view(groups, batch, heads // groups, -1).transpose(0, 1).reshape(batch, heads, 1, -1)


def _leave(mixed: Tensor, w_uv: Tensor) -> Tensor:
    """What the heads mixed of the latents, [B, H, 1, L], by W_UV [G, M, L]: [B, H, 1, M]."""
    return _absorb(mixed, w_uv.transpose(1, 2))
